"""Sleep mode: the memory of weights and KV cache is given back, and taken again on waking.

vLLM's own mechanism is an allocator for CUDA. Here the storages behind the tensors are emptied and filled; the tensors
stay, and so does all that refers to them. Their addresses change, which is why there are no graphs with sleep mode.
torch-npu resizes storages in plain formats only, so there is no FRACTAL_NZ either (`ops.layout`).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from vllm.device_allocator.sleep_mode_backend import SleepModeBackend

WEIGHTS, KV_CACHE = "weights", "kv_cache"
"""vLLM's tags."""


@dataclass(frozen=True)
class _Asleep:
    storage: torch.UntypedStorage
    size: int
    content: torch.UntypedStorage | None
    """In host memory; None if nothing was kept."""


class NPUSleepMode(SleepModeBackend):
    """`tensors` are those of a tag at the time of the call."""

    def __init__(self, tensors: dict[str, Callable[[], Iterable[torch.Tensor]]]) -> None:
        super().__init__()
        self._tensors = tensors
        self._asleep: dict[str, list[_Asleep]] = {}

    def suspend(self, level: int = 1) -> None:
        """Level 1 keeps the weights in host memory, level 2 does not; nothing keeps the KV cache."""
        self._release(WEIGHTS, keep=level == 1)
        self._release(KV_CACHE, keep=False)

    def discard(self, tags: tuple[str, ...]) -> None:
        for tag in tags:
            self._release(tag, keep=False)

    def resume(self, tags: list[str] | None = None) -> None:
        """What was not kept is zero: an attention operator multiplies what is behind the end of a sequence, too."""
        for tag in [*self._asleep] if tags is None else tags:
            for each in self._asleep.pop(tag, []):
                each.storage.resize_(each.size)
                if each.content is None:
                    each.storage.fill_(0)  # type: ignore[attr-defined]
                else:
                    each.storage.copy_(each.content)
        self._state = "SUSPENDED" if self._asleep else "RUNNING"

    def _release(self, tag: str, *, keep: bool) -> None:
        if tag in self._asleep:
            return
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in self._tensors[tag]()}
        torch.accelerator.synchronize()
        self._asleep[tag] = [_put_to_sleep(each, keep) for each in storages.values() if each.nbytes()]
        self._state = "SUSPENDED"
        gc.collect()
        torch.accelerator.empty_cache()

    @classmethod
    def preserves_communicators(cls) -> bool:
        return True


def _put_to_sleep(storage: torch.UntypedStorage, keep: bool) -> _Asleep:
    asleep = _Asleep(storage, storage.nbytes(), storage.cpu() if keep else None)
    storage.resize_(0)
    return asleep


def device_tensors(models: Iterable[Any]) -> Iterable[torch.Tensor]:
    """Parameters and buffers that are in device memory."""
    for model in models:
        for tensor in (*model.parameters(), *model.buffers()):
            if not tensor.is_cpu and not tensor.is_meta:
                yield tensor
