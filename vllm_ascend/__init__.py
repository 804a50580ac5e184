"""vLLM plugin entry points. Importing this package costs nothing: vLLM and torch are imported by what it points to."""

from __future__ import annotations

__version__ = "0.1.0"


def register() -> str | None:
    """`vllm.platform_plugins` entry point: the platform class for this machine, or None to let vLLM choose.

    The NPU platform is not part of this version, so vLLM's own platform stands everywhere; on a machine that has
    an Ascend NPU and torch_npu, a warning says so.
    """
    if _has_npu():
        import logging

        logging.getLogger(__name__).warning(
            "an Ascend NPU is present, but this version of vllm-ascend has no NPU platform yet: vLLM's own platform "
            "is used. Netloader works on it."
        )
    return None


def register_netloader() -> None:
    """`vllm.general_plugins` entry point: makes ``--load-format netloader`` known to vLLM in every process."""
    from vllm_ascend.model_loader.netloader import register_netloader as register_load_format

    register_load_format()


def _has_npu() -> bool:
    import glob
    import importlib.util

    return bool(glob.glob("/dev/davinci[0-9]*")) and importlib.util.find_spec("torch_npu") is not None
