"""What vLLM knows as the load format ``netloader``, in every process: a name, and next to nothing behind it.

vLLM runs the entry points of plug-ins in each of its processes, whatever they load, and an exception there ends them.
So nothing of Netloader is imported until somebody asks for its loader, and what is broken is told to them alone.
"""

from __future__ import annotations

from typing import Any

from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER, register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader


class RegisteredLoader(BaseModelLoader):
    """vLLM takes only subclasses of its BaseModelLoader. Calling this one makes a `loader.NetLoader`, which is one."""

    def __new__(cls, load_config: Any) -> Any:
        """Raises BrokenInstallation, or what making that loader raises."""
        return _loader_class()(load_config)


def register() -> None:
    """Idempotent."""
    if _LOAD_FORMAT_TO_MODEL_LOADER.get("netloader") is not RegisteredLoader:
        register_model_loader("netloader")(RegisteredLoader)


def _loader_class() -> Any:
    try:
        from vllm_ascend.model_loader.netloader.loader import NetLoader
    except Exception as error:
        from vllm_ascend.model_loader.netloader.installation import what_is_broken

        raise what_is_broken(error) from error
    return NetLoader
