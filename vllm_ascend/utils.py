"""A module that test suites for upstream's vllm-ascend import, before they start an engine.

Upstream replaces parts of vLLM before it is used. This platform uses vLLM's hooks, which vLLM itself calls in every
process.
"""

from __future__ import annotations

import importlib.metadata


def adapt_patch(is_global_patch: bool = False) -> None:
    """Does nothing: nothing of vLLM has to be replaced before an engine starts."""


def vllm_version_is(version: str) -> bool:
    """Whether the installed vLLM is this release, whatever it was built for: "0.32.0" is "0.32.0+cpu", too."""
    return importlib.metadata.version("vllm").partition("+")[0] == version
