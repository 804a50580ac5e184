"""Sphinx configuration."""

from __future__ import annotations

import sys
from pathlib import Path

from vllm_ascend import __version__

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

project = "vllm-ascend"
copyright = "the vllm-ascend contributors"
version = release = __version__

extensions = ["myst_parser", "drawings"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"{project} {release}"
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_js_files = ["tables.js"]
