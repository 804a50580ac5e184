"""Tensors over the memory of weights, and streams of their own for the threads that move them.

Work on an accelerator is done in a stream of the thread's own, so that neither inference nor a transfer waits for the
other.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, Final

import torch

from vllm_ascend.model_loader.netloader.weights.arena import Arena
from vllm_ascend.model_loader.netloader.weights.dtypes import ITEM_BYTES
from vllm_ascend.model_loader.netloader.weights.manifest import Alias, Manifest, TensorSpec
from vllm_ascend.model_loader.netloader.weights.memory import Landing, Memory, Readable

DTYPES: Final[dict[str, torch.dtype]] = {name: getattr(torch, name) for name in ITEM_BYTES}
_PLAIN_FORMATS: Final = (-1, 0, 2, 30)
"""Formats of torch-npu's tensors whose bytes lie as torch's do: undefined, NCHW, ND, NCDHW (CANN, aclFormat)."""


class TensorMemory(Memory):
    """Memory on `device`, from which chunks can be sent without a way through the host."""

    device: torch.device

    @abstractmethod
    def chunk(self, offset: int, length: int) -> torch.Tensor:
        """Those of the served bytes as a tensor on `device`: the memory itself, or a copy where it is not in one piece.

        uint8, one-dimensional, not to be written to.
        """

    @abstractmethod
    def tensor(self, spec: TensorSpec) -> torch.Tensor:
        """A tensor of `spec`'s type, shape and strides over its bytes."""


class TensorLanding(Landing):
    """Where a chunk arrives either as host bytes or as a tensor."""

    @property
    @abstractmethod
    def tensor(self) -> torch.Tensor:
        """uint8, one-dimensional, on the memory's device: to be filled by a process group."""


def dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def manifest_of(tensors: Iterable[tuple[str, torch.Tensor]], aliases: Iterable[Alias] = ()) -> Manifest:
    """The manifest in which dense `tensors` lie one after another."""
    described = ((name, dtype_name(tensor), tuple(tensor.shape), tensor.stride()) for name, tensor in tensors)
    return Manifest.layout(described, aliases)


def tensor_in(memory: Memory, spec: TensorSpec) -> torch.Tensor:
    """A tensor of `spec`'s type, shape and strides over its bytes in `memory`, whose mapping it keeps alive."""
    if isinstance(memory, TensorMemory):
        return memory.tensor(spec)
    assert isinstance(memory, Arena)
    dtype = DTYPES[spec.dtype]
    if spec.nbytes == 0:
        return torch.empty_strided(spec.shape, spec.strides, dtype=dtype, device="cpu")
    return torch.frombuffer(memory.block(spec.offset, spec.nbytes), dtype=dtype).as_strided(spec.shape, spec.strides)


def chunk_in(memory: Memory, served: Readable, offset: int, length: int) -> torch.Tensor:
    """Bytes that `memory` serves, where they lie: `served` is its reader.

    uint8, one-dimensional, not to be written to.
    """
    if isinstance(memory, TensorMemory):
        return memory.chunk(offset, length)
    return as_tensor(served[offset : offset + length])


def landing_tensor(landing: Landing) -> torch.Tensor:
    """uint8, one-dimensional, where the chunk arrives: to be filled by a process group."""
    return landing.tensor if isinstance(landing, TensorLanding) else as_tensor(landing.host)


def bind_alias(base: torch.Tensor, alias: Alias) -> torch.Tensor:
    """The tensor that `alias` describes, on the storage of its base tensor."""
    dtype = DTYPES[alias.dtype]
    view = torch.empty(0, dtype=dtype, device=base.device)
    view.set_(base.untyped_storage(), alias.start // dtype.itemsize, alias.shape, alias.strides)
    return view


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """Of a one-dimensional tensor in host memory, over the same memory."""
    contents: Any = tensor.numpy()
    return memoryview(contents)


def as_tensor(memory: memoryview) -> torch.Tensor:
    """uint8, over the same memory."""
    if not memory.nbytes:
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch has no read-only tensors; what is read-only is only sent
        return torch.frombuffer(memory, dtype=torch.uint8)


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a dense tensor in the order in which they lie, over the same memory."""
    start, nbytes = tensor.storage_offset() * tensor.itemsize, tensor.numel() * tensor.itemsize
    empty = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return empty.set_(tensor.data.untyped_storage(), start, (nbytes,), (1,))


def has_plain_format(tensor: torch.Tensor) -> bool:
    """Whether the bytes lie as shape and strides say, which those of a private format such as FRACTAL_NZ do not."""
    return tensor.device.type != "npu" or torch.ops.npu.get_npu_format(tensor) in _PLAIN_FORMATS


@contextlib.contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Makes `device` this thread's, and a stream of the thread's own current; what is put into it is done at the end.

    On the CPU it does nothing.
    """
    if device.type == "cpu":
        yield
        return
    module: Any = torch.get_device_module(device)
    module.set_device(device)  # new threads begin with device 0
    streams = _streams_of_thread.__dict__
    stream = streams.get(str(device))
    if stream is None:
        stream = streams[str(device)] = module.Stream(device)
    with module.stream(stream):
        yield
    stream.synchronize()


_streams_of_thread = threading.local()
