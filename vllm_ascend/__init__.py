"""vLLM plugin entry points. Importing this package costs nothing: vLLM and torch are imported by what it points to."""

from __future__ import annotations

__version__ = "0.1.0"


def register() -> str | None:
    """`vllm.platform_plugins` entry point: the NPU platform where there is an NPU, or None to let vLLM choose."""
    if _has_npu():
        return "vllm_ascend.platform.NPUPlatform"
    _tell_if_nothing_is_chosen()
    return None


def register_netloader() -> None:
    """`vllm.general_plugins` entry point: makes ``--load-format netloader`` known to vLLM in every process.

    Raises nothing, which would end the process, whatever it loads.
    """
    try:
        from vllm_ascend.model_loader.netloader import register_netloader as register_load_format

        register_load_format()
    except Exception as error:
        import logging

        logging.getLogger(__name__).warning("there is no load format netloader: %s: %s", type(error).__name__, error)


def _tell_if_nothing_is_chosen() -> None:
    """Without an NPU there is Netloader only. vLLM would not say why it knows no such load format."""
    import os

    plugins = os.environ.get("VLLM_PLUGINS")
    if plugins is not None and "ascend_model_loader" not in plugins.split(","):
        import logging

        logging.getLogger(__name__).warning(
            "VLLM_PLUGINS=%r leaves out 'ascend_model_loader', so there is no load format netloader", plugins
        )


def _has_npu() -> bool:
    """Whether torch_npu sees a device. Counting devices makes no context on any of them."""
    import importlib.util

    if importlib.util.find_spec("torch_npu") is None:
        return False
    try:
        import torch_npu
    except ImportError as error:
        import logging

        logging.getLogger(__name__).warning(
            "torch_npu is installed but cannot be imported (%s), so there is no NPU for vLLM: CANN's libraries are "
            "found after sourcing its set_env.sh",
            error,
        )
        return False
    return bool(torch_npu.npu.device_count())
