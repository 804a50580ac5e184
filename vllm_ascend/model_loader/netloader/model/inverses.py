"""How the bytes of a loaded tensor are read from memory in which post-processing has arranged them differently.

For its operators, post-processing transposes matrices and brings them into FRACTAL_NZ, matrix by matrix where several
are stacked, as experts are. Here is the inverse of each of these arrangements, in a closed list. An inverse looks at
memory alone, not at the shape, type or format that the model's tensor has by now. Whether the bytes were arranged like
that is not decided here: a caller believes in an inverse only after it has given bytes that are known.

FRACTAL_NZ is read as CANN documents it: a matrix is cut into strips of 32 bytes in width, which follow each other, and
each strip lies row by row, filled up with rows to a multiple of 16. So a few rows of a tensor, or of one that was
transposed before, are a few ranges of that memory, and no operator has to convert the whole tensor first.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Final

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from vllm_ascend.model_loader.netloader.model.streams import own_stream
from vllm_ascend.model_loader.netloader.model.views import as_bytes, flat, has_plain_format
from vllm_ascend.model_loader.netloader.weights.dtypes import ITEM_BYTES
from vllm_ascend.model_loader.netloader.weights.manifest import TensorSpec, is_dense

SCRATCH_BYTES: Final = 2 << 20
"""Bytes that are turned back at a time, which is the device memory that this takes."""
_STRIP_BYTES: Final = 32
_STRIP_ROWS: Final = 16
_ITEMS: Final = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""A type for items of each size that are moved without being understood."""


class Contents(ABC):
    """The bytes of one tensor as it was loaded, wherever and however they lie: `memory` holds them."""

    memory: torch.Tensor

    @abstractmethod
    def pieces(self, begin: int, end: int) -> Iterator[torch.Tensor]:
        """Bytes [begin, end), in order, as one-dimensional uint8 tensors. Do not write to them unless they lie there.

        A piece that is not the memory itself has about SCRATCH_BYTES at most.
        """

    def on_host(self, begin: int, end: int) -> memoryview:
        """A copy of bytes [begin, end) in host memory."""
        host = torch.empty(end - begin, dtype=torch.uint8, device="cpu")
        position = 0
        with own_stream(self.memory.device):
            for piece in self.pieces(begin, end):
                host[position : position + piece.nbytes].copy_(piece)
                position += piece.nbytes
        return as_bytes(host)


class AsLoaded(Contents):
    """Bytes that lie in `memory`, a one-dimensional uint8 tensor, as they were loaded."""

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory

    def pieces(self, begin: int, end: int) -> Iterator[torch.Tensor]:
        yield self.memory[begin:end]


class Rearranged(Contents):
    """Bytes of a stack of matrices that lie in another order; whatever rows are read are gathered as they were."""

    def __init__(self, spec: TensorSpec, memory: torch.Tensor) -> None:
        """`memory` holds all bytes of the stack, and what the arrangement adds to them."""
        self.step = 1
        """Of so many rows, counted from the first of a matrix, one costs as much as all."""
        self.matrices, self.rows, self.columns = matrices_of(spec)
        self.item_bytes = ITEM_BYTES[spec.dtype]
        self.memory = memory.view(_ITEMS[self.item_bytes])

    @classmethod
    @abstractmethod
    def size(cls, spec: TensorSpec) -> int:
        """Bytes that a stack of matrices like `spec` takes in this arrangement."""

    @abstractmethod
    def block(self, matrix: int, first: int, last: int) -> torch.Tensor:
        """Rows [first, last) of a matrix of the loaded tensor, perhaps as a view. `first` is a multiple of `step`."""

    def pieces(self, begin: int, end: int) -> Iterator[torch.Tensor]:
        row_bytes = self.columns * self.item_bytes
        most = max(SCRATCH_BYTES // row_bytes // self.step, 1) * self.step
        while begin < end:
            matrix, row = divmod(begin // row_bytes, self.rows)
            first = row - row % self.step
            before = matrix * self.rows
            last = min(first + most, self.rows, -(-end // row_bytes) - before)
            block = self.block(matrix, first, last).reshape(-1).contiguous().view(torch.uint8)

            start = (before + first) * row_bytes
            stop = min(end, start + block.nbytes)
            yield block[begin - start : stop - start]
            begin = stop


class Transposed(Rearranged):
    """Matrices that were transposed."""

    @classmethod
    def size(cls, spec: TensorSpec) -> int:
        return spec.nbytes

    def block(self, matrix: int, first: int, last: int) -> torch.Tensor:
        return self.memory.view(self.matrices, self.columns, self.rows)[matrix, :, first:last].t()


class Fractal(Rearranged):
    """Matrices in FRACTAL_NZ."""

    @classmethod
    def size(cls, spec: TensorSpec) -> int:
        matrices, rows, columns = matrices_of(spec)
        return matrices * _fractal_bytes(rows, columns * ITEM_BYTES[spec.dtype])

    def block(self, matrix: int, first: int, last: int) -> torch.Tensor:
        width = _STRIP_BYTES // self.item_bytes
        strips = self.memory.view(self.matrices, -(-self.columns // width), -1, width)[matrix, :, first:last]
        return strips.transpose(0, 1).reshape(last - first, -1)[:, : self.columns]


class TransposedFractal(Rearranged):
    """Matrices that were transposed, then brought into FRACTAL_NZ. Each strip holds some rows of the loaded tensor."""

    def __init__(self, spec: TensorSpec, memory: torch.Tensor) -> None:
        super().__init__(spec, memory)
        self.step = _STRIP_BYTES // self.item_bytes

    @classmethod
    def size(cls, spec: TensorSpec) -> int:
        matrices, rows, columns = matrices_of(spec)
        return matrices * _fractal_bytes(columns, rows * ITEM_BYTES[spec.dtype])

    def block(self, matrix: int, first: int, last: int) -> torch.Tensor:
        strips = self.memory.view(self.matrices, -(-self.rows // self.step), -1, self.step)
        chosen = strips[matrix, first // self.step : -(-last // self.step), : self.columns]
        return chosen.transpose(1, 2).reshape(-1, self.columns)[: last - first]


ARRANGEMENTS: Final[tuple[type[Rearranged], ...]] = (TransposedFractal, Transposed, Fractal)
"""All that can be turned back, the likeliest first."""


def matrices_of(spec: TensorSpec) -> tuple[int, int, int]:
    """The memory of a tensor as a stack of matrices: their number, rows and columns. A vector is one row."""
    dimensions = sorted(zip(spec.strides, spec.shape, strict=True), reverse=True)
    *stacked, rows, columns = (1, 1, *(size for _, size in dimensions if size > 1))
    return math.prod(stacked), rows, columns


def readings(spec: TensorSpec, memory: torch.Tensor) -> Iterator[Contents]:
    """What `memory`, a one-dimensional uint8 tensor, may be of the tensor that `spec` describes, as loaded first."""
    if memory.nbytes == spec.nbytes:
        yield AsLoaded(memory)
    item_bytes, (_, rows, _) = ITEM_BYTES[spec.dtype], matrices_of(spec)
    if rows == 1 or item_bytes not in _ITEMS or memory.storage_offset() % item_bytes:
        return
    yield from (kind(spec, memory) for kind in ARRANGEMENTS if kind.size(spec) == memory.nbytes)


def has_memory(tensor: torch.Tensor) -> bool:
    """Whether `tensor` has a storage with its values, and not inner tensors or nothing."""
    return not (tensor.layout is not torch.strided or tensor.is_meta or is_traceable_wrapper_subclass(tensor))


def memory_of(tensor: torch.Tensor) -> torch.Tensor | None:
    """The memory of `tensor` as a one-dimensional uint8 tensor, None where it is not one block of plain memory.

    Of a tensor in a private format it is that in which the device has arranged it.
    """
    if not has_memory(tensor):
        return None
    if not has_plain_format(tensor):
        return _device_bytes(tensor)
    return flat(tensor) if is_dense(tuple(tensor.shape), tensor.stride()) else None


def _device_bytes(tensor: torch.Tensor) -> torch.Tensor | None:
    """All bytes of the storage of `tensor`, which has it alone.

    A part of a storage is a storage of its own, over the same memory. torch-npu knows no private format of it, and
    whatever is done with it leaves the format of the model's tensor alone.
    """
    if tensor.storage_offset():
        return None
    whole = tensor.data.untyped_storage()
    same: torch.UntypedStorage = whole[0 : whole.nbytes()]
    empty = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return empty.set_(same, 0, (same.nbytes(),), (1,))


def _fractal_bytes(rows: int, row_bytes: int) -> int:
    return -(-row_bytes // _STRIP_BYTES) * -(-rows // _STRIP_ROWS) * _STRIP_ROWS * _STRIP_BYTES
