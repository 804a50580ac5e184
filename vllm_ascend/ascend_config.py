"""A module that test suites for upstream's vllm-ascend import: they clear its settings between two engines.

Upstream keeps `additional_config` in a variable of the process. Here each engine has its own vLLM configuration and
nothing else, so there is nothing to clear.
"""

from __future__ import annotations


def clear_ascend_config() -> None:
    """Does nothing: this platform keeps no settings of an engine in its process."""
