"""Memory on an accelerator, and what differs between it and host memory for whoever works with tensors.

Bytes in host memory are reached by a `memoryview`, those on a device only as tensors. `tensor_in`, `chunk_in` and
`landing_tensor` give tensors over either kind of memory, so that nobody else has to ask which one it is.
"""

from __future__ import annotations

from abc import abstractmethod

import torch

from vllm_ascend.model_loader.netloader.model.views import as_tensor, view_of
from vllm_ascend.model_loader.netloader.weights.arena import Arena
from vllm_ascend.model_loader.netloader.weights.manifest import TensorSpec
from vllm_ascend.model_loader.netloader.weights.memory import Landing, Memory, Readable


class DeviceMemory(Memory):
    """Weights on `device`, whose chunks can be sent from there without a detour through host memory."""

    device: torch.device

    @abstractmethod
    def chunk(self, offset: int, length: int) -> torch.Tensor:
        """Bytes [offset, offset + length) of the served ones, as a one-dimensional uint8 tensor on `device`.

        It is the memory itself where the bytes lie in one piece, and a copy otherwise. Do not write to it.
        """

    @abstractmethod
    def tensor(self, spec: TensorSpec) -> torch.Tensor:
        """The tensor that `spec` describes, over the memory in which its bytes lie."""


class DeviceLanding(Landing):
    """The place where a chunk arrives, either as host bytes or as a tensor: whichever is asked for is made."""

    @property
    @abstractmethod
    def tensor(self) -> torch.Tensor:
        """A one-dimensional uint8 tensor on the memory's device, for a process group to fill."""


def tensor_in(memory: Memory, spec: TensorSpec) -> torch.Tensor:
    """The tensor that `spec` describes, over its bytes in `memory`. It keeps the mapping of an arena alive."""
    if isinstance(memory, DeviceMemory):
        return memory.tensor(spec)
    assert isinstance(memory, Arena)
    block = torch.empty(0, dtype=torch.uint8, device="cpu")
    if spec.nbytes:
        block = torch.frombuffer(memory.block(spec.offset, spec.nbytes), dtype=torch.uint8)
    return view_of(block, spec)


def chunk_in(memory: Memory, served: Readable, offset: int, length: int) -> torch.Tensor:
    """Bytes [offset, offset + length) that `memory` serves, as a one-dimensional uint8 tensor where they lie.

    `served` is the reader of `memory`. Do not write to the tensor.
    """
    if isinstance(memory, DeviceMemory):
        return memory.chunk(offset, length)
    return as_tensor(served[offset : offset + length])


def landing_tensor(landing: Landing) -> torch.Tensor:
    """The place where a chunk arrives, as a one-dimensional uint8 tensor for a process group to fill."""
    return landing.tensor if isinstance(landing, DeviceLanding) else as_tensor(landing.host)
