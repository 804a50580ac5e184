"""What vLLM knows as the load format ``netloader``: a name with next to nothing behind it.

vLLM runs the entry points of plug-ins in each of its processes, whatever the process loads, and an exception there ends
it. So nothing of Netloader is imported before somebody asks for its loader, and only they hear if it is broken.
"""

from __future__ import annotations

from typing import Any

from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER, register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader


class RegisteredLoader(BaseModelLoader):
    """Makes a `loader.NetLoader` when it is called. vLLM registers only subclasses of its own BaseModelLoader."""

    def __new__(cls, load_config: Any) -> Any:
        """Raises BrokenInstallation if Netloader cannot be imported, or what `NetLoader` raises."""
        return _loader_class()(load_config)


def register() -> None:
    """Makes the load format known to vLLM, in this process. Idempotent."""
    if _LOAD_FORMAT_TO_MODEL_LOADER.get("netloader") is not RegisteredLoader:
        register_model_loader("netloader")(RegisteredLoader)


def _loader_class() -> Any:
    try:
        from vllm_ascend.model_loader.netloader.loader import NetLoader
    except Exception as error:
        from vllm_ascend.model_loader.netloader.installation import what_is_broken

        raise what_is_broken(error) from error
    return NetLoader
