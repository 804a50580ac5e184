"""Sphinx configuration."""

from __future__ import annotations

from vllm_ascend import __version__

project = "vllm-ascend"
copyright = "the vllm-ascend contributors"
version = release = __version__

extensions = ["myst_parser"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"{project} {release}"
html_copy_source = False
