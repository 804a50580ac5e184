"""Another processor, as far as vLLM asks for one. Python imports this at its start where PYTHONPATH has this directory.

CPU_FEATURES="amx_tile=off,avx512_bf16=off" answers `torch.cpu._is_amx_tile_supported()` and the like. vLLM decides by
them which kernels it builds, how it packs weights, and which of them it drops.

What is there can be switched off. Of what is not there, only amx_tile can be switched on: most of vLLM's kernels for it
go through a library that does without such instructions. The others are left as they are.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

WITH_TILE_INSTRUCTIONS = {
    "vllm.v1.attention.backends.cpu_attn",
    "vllm.model_executor.layers.fused_moe.experts.cpu_moe",
}
"""vLLM's modules whose kernels for AMX die on other processors."""


def forced(question: Callable[[], bool], wanted: bool) -> Callable[[], bool]:
    there = question()

    def answer() -> bool:
        asking = sys._getframe(1).f_globals["__name__"]
        believes_it = asking.startswith("vllm.") and asking not in WITH_TILE_INSTRUCTIONS
        return (there or believes_it) if wanted else False

    return answer


class TorchCpu(MetaPathFinder):
    """Changes the module torch.cpu once it is there."""

    def __init__(self, features: dict[str, bool]) -> None:
        self._features = features

    def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
        if name != "torch.cpu":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_change(module: ModuleType) -> None:
            execute(module)
            for feature, wanted in self._features.items():
                question = f"_is_{feature}_supported"
                setattr(module, question, forced(getattr(module, question), wanted))

        spec.loader.exec_module = execute_and_change  # type: ignore[method-assign]
        return spec


if chosen := os.environ.get("CPU_FEATURES"):
    pairs = (each.strip().split("=") for each in chosen.split(","))
    sys.meta_path.insert(0, TorchCpu({feature: {"on": True, "off": False}[wanted] for feature, wanted in pairs}))
