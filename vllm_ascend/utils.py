"""A module that test suites for upstream's vllm-ascend import: they have it patch vLLM before they start an engine.

Upstream replaces parts of vLLM before it is used. This platform uses vLLM's hooks, which vLLM itself calls in every
process.
"""

from __future__ import annotations


def adapt_patch(is_global_patch: bool = False) -> None:
    """Does nothing: nothing of vLLM has to be replaced before an engine starts."""
