"""Where the weights of a rank lie, as transports, deliveries and digests see it.

The manifest's address space is one block of host memory (`arena`), or it is spread over the parameters themselves on an
accelerator (`live`). Bytes go in and out by chunks: host bytes for sockets and digests, tensors for process groups.
Whatever arrives lands first, and settles where it belongs only when it is known to be what was served; an arena, which
nobody computes with before it is complete, is its own landing place.

Work on an accelerator is done in a stream of the thread's own, so that neither inference nor a transfer waits for the
other.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Final, Protocol

import torch

from vllm_ascend.model_loader.netloader.weights.manifest import TensorSpec

_PLAIN_FORMATS: Final = (-1, 0, 2, 30)
"""Formats of torch-npu's tensors whose bytes lie as torch's do: undefined, NCHW, ND, NCDHW (CANN, aclFormat)."""


class Readable(Protocol):
    """Bytes that are read by slices, as those of a memoryview; a slice may be a copy."""

    @property
    def nbytes(self) -> int: ...

    def __getitem__(self, part: slice, /) -> memoryview: ...


class Landing(ABC):
    """Where one chunk arrives, either as host bytes or as a tensor. For one thread."""

    @property
    @abstractmethod
    def host(self) -> memoryview:
        """To be filled from a socket."""

    @property
    @abstractmethod
    def tensor(self) -> torch.Tensor:
        """uint8, one-dimensional, on the memory's device: to be filled by a process group."""

    @abstractmethod
    def arrived(self, begin: int, end: int) -> memoryview:
        """Host bytes [begin, end) of the chunk, which have come."""

    @abstractmethod
    def settle(self) -> None:
        """Puts the whole chunk where it belongs."""


class Memory(ABC):
    """`nbytes` of a rank's weights on `device`. Whoever made it closes it, unless a store has taken it over."""

    nbytes: int
    device: torch.device

    @property
    @abstractmethod
    def servable(self) -> bool:
        """Whether the bytes are complete and stay as they are, so that others may have them."""

    @property
    def descriptor(self) -> int | None:
        """A file that holds the bytes, for peers on this host and for the kernel to send from; None without one."""
        return None

    @abstractmethod
    def landing(self, offset: int, length: int) -> Landing:
        """For the next chunk to fill."""

    @abstractmethod
    def contents(self) -> Readable:
        """What lies there now."""

    @abstractmethod
    def reader(self) -> Readable:
        """What is served. Only for memory that is servable."""

    @abstractmethod
    def chunk(self, offset: int, length: int) -> torch.Tensor:
        """Those of the served bytes as a tensor on `device`: the memory itself, or a copy where it is not in one piece.

        uint8, one-dimensional, not to be written to.
        """

    @abstractmethod
    def tensor(self, spec: TensorSpec) -> torch.Tensor:
        """A tensor of `spec`'s type, shape and strides over its bytes."""

    @abstractmethod
    def seal(self) -> None:
        """Ends the filling: what is there now is served. Raises OSError where that cannot be had."""

    def free_with_tensors(self) -> None:
        """For memory that will not be served: from now on only the model's tensors keep it."""
        return

    @abstractmethod
    def close(self) -> None:
        """Gives up what is held beside the model's tensors. Idempotent."""

    def discard(self) -> None:
        """Gives it up with all that has arrived, which nobody uses: its pages are free at once. Idempotent."""
        self.close()


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
