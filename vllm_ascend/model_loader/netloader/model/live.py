"""The parameters of a model on an accelerator as the memory that is served: nothing is held beside them.

A chunk of the address space is a part of one tensor or spans many. It is sent from where it lies if it lies in one
piece, and from a bucket otherwise; it arrives in a bucket and is copied to its tensors when it has passed. Buckets have
the size of a chunk, and as many exist as chunks are under way.

Post-processing may change what was loaded. `remember` notes every tensor's checksum beforehand, and keeps copies where
INT8_CACHE says so; `reconcile` finds out afterwards which tensors are still what they were, wherever they lie now, and
serves the others from their copies.
"""

from __future__ import annotations

import bisect
import errno
import hashlib
from collections.abc import Collection, Iterator, Mapping
from typing import Final, NamedTuple

import torch

from vllm_ascend.model_loader.netloader.errors import UnsupportedModel
from vllm_ascend.model_loader.netloader.model.buffers import (
    DTYPES,
    TensorLanding,
    TensorMemory,
    as_bytes,
    as_tensor,
    flat,
    has_plain_format,
    own_stream,
)
from vllm_ascend.model_loader.netloader.weights.manifest import Manifest, TensorSpec, chunks, is_dense
from vllm_ascend.model_loader.netloader.weights.memory import Readable

_ROW_BYTES: Final = 1 << 13
_CHECKSUM_BYTES: Final = 1 << 24
"""At a time, so that what the sums take beside the weights is bounded."""


class _Part(NamedTuple):
    """All bytes of one tensor of the manifest, in the order in which they lie."""

    spec: TensorSpec
    memory: torch.Tensor


class LiveMemory(TensorMemory):
    """The memory of `tensors`, which are dense and lie as `manifest` describes them."""

    def __init__(self, manifest: Manifest, tensors: Mapping[str, torch.Tensor], device: torch.device) -> None:
        self.nbytes = manifest.nbytes
        self.device = device
        self._specs = [spec for spec in manifest.tensors if spec.nbytes]
        self._ends = [spec.end for spec in self._specs]
        self._checksums: dict[str, bytes] = {}
        self._copies: dict[str, torch.Tensor] = {}
        self._servable = False
        self.hold(tensors)

    def hold(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """From now on the bytes are those of `tensors`."""
        self._parts = {spec.name: _Part(spec, flat(tensors[spec.name])) for spec in self._specs}
        _finish_work(self.device)

    @property
    def servable(self) -> bool:
        return self._servable

    def landing(self, offset: int, length: int) -> TensorLanding:
        return _LiveLanding(self, offset, length)

    def contents(self) -> Readable:
        return _HostCopies(self)

    reader = contents

    def chunk(self, offset: int, length: int) -> torch.Tensor:
        pieces = list(self.pieces(offset, length))
        if len(pieces) == 1 and pieces[0][1].nbytes == length and pieces[0][1].device == self.device:
            return pieces[0][1]
        with own_stream(self.device):
            bucket = torch.zeros(length, dtype=torch.uint8, device=self.device)  # what lies between tensors is zero
            for begin, piece in pieces:
                bucket[begin : begin + piece.nbytes].copy_(piece)
        return bucket

    def tensor(self, spec: TensorSpec) -> torch.Tensor:
        dtype = DTYPES[spec.dtype]
        if spec.nbytes == 0:
            return torch.empty_strided(spec.shape, spec.strides, dtype=dtype, device=self.device)
        memory = self._parts[spec.name].memory
        start = memory.storage_offset() // dtype.itemsize
        empty = torch.empty(0, dtype=dtype, device=memory.device)
        return empty.set_(memory.untyped_storage(), start, spec.shape, spec.strides)

    def pieces(self, offset: int, length: int) -> Iterator[tuple[int, torch.Tensor]]:
        """The tensors' bytes within [offset, offset + length), and where each begins relative to `offset`."""
        parts = self._parts
        if self.nbytes and not parts:
            raise OSError(errno.EBADF, "these weights are given up")
        for spec in self._specs[bisect.bisect_right(self._ends, offset) :]:
            part = parts[spec.name]
            begin, end = max(part.spec.offset, offset), min(part.spec.end, offset + length)
            if begin >= end:
                return
            yield begin - offset, part.memory[begin - part.spec.offset : end - part.spec.offset]

    def seal(self) -> None:
        _finish_work(self.device)
        self._servable = True

    def close(self) -> None:
        self._servable = False
        self._parts, self._copies = {}, {}

    def remember(self, cache: str, names: Collection[str] | None) -> None:
        """Call it before post-processing. `cache` is INT8_CACHE, `names` what INT8_CACHE_NAME restricts it to."""
        for name, part in self._parts.items():
            self._checksums[name] = checksum(part.memory)
            if cache != "no" and (names is None or any(wanted in name for wanted in names)):
                self._copies[name] = part.memory.clone() if cache == "hbm" else part.memory.to("cpu", copy=True)
        _finish_work(self.device)

    def reconcile(self, current: Mapping[str, torch.Tensor]) -> list[str]:
        """Call it after post-processing, with what the model holds by now; returns the names of what was changed.

        Raises UnsupportedModel, naming the tensors, where the original of one is kept nowhere.
        """
        in_use = {tensor.untyped_storage().data_ptr() for tensor in current.values()}
        changed, lost = [], []
        for name, part in self._parts.items():
            kept = self._unchanged(part, current.get(name), in_use)
            if kept is None:
                changed.append(name)
                kept = self._copies.get(name)
            if kept is None:
                lost.append(name)
            else:
                self._parts[name] = part._replace(memory=kept)
        self._copies, self._checksums = {}, {}
        if lost:
            raise UnsupportedModel(
                f"post-processing changed {len(lost)} tensors ({', '.join(lost[:8])}{', ...' if lost[8:] else ''}) and "
                f'nothing keeps their originals: set INT8_CACHE to "hbm" or "dram", with INT8_CACHE_NAME, if set, '
                f"covering them"
            )
        return changed

    def _unchanged(self, part: _Part, now: torch.Tensor | None, in_use: set[int]) -> torch.Tensor | None:
        """Where the model itself still has what was loaded; None where it does not."""
        original = self._checksums[part.spec.name]
        if part.memory.untyped_storage().data_ptr() in in_use and checksum(part.memory) == original:
            return part.memory
        if now is None or now.nbytes != part.spec.nbytes or not _is_plain(now):
            return None
        elsewhere = flat(now)
        return elsewhere if checksum(elsewhere) == original else None


class _LiveLanding(TensorLanding):
    """A bucket in host memory or on the device, whichever is asked for."""

    def __init__(self, memory: LiveMemory, offset: int, length: int) -> None:
        self._memory = memory
        self._offset = offset
        self._length = length
        self._host: memoryview | None = None
        self._tensor: torch.Tensor | None = None

    @property
    def host(self) -> memoryview:
        if self._host is None:
            self._host = memoryview(bytearray(self._length))
        return self._host

    @property
    def tensor(self) -> torch.Tensor:
        if self._tensor is None:
            with own_stream(self._memory.device):
                self._tensor = torch.empty(self._length, dtype=torch.uint8, device=self._memory.device)
        return self._tensor

    def arrived(self, begin: int, end: int) -> memoryview:
        return self.host[begin:end] if self._tensor is None else _to_host(self._tensor[begin:end])

    def settle(self) -> None:
        bucket = as_tensor(self.host) if self._tensor is None else self._tensor
        with own_stream(self._memory.device):
            for begin, piece in self._memory.pieces(self._offset, self._length):
                piece.copy_(bucket[begin : begin + piece.nbytes])


class _HostCopies:
    """Reads from the device as if it were host memory."""

    def __init__(self, memory: LiveMemory) -> None:
        self._memory = memory

    @property
    def nbytes(self) -> int:
        return self._memory.nbytes

    def __getitem__(self, part: slice) -> memoryview:
        begin, end, _ = part.indices(self.nbytes)
        return _to_host(self._memory.chunk(begin, end - begin)).toreadonly()


def checksum(memory: torch.Tensor) -> bytes:
    """Made on the memory's device out of sums over rows and columns: cheap, against accidents, not against anybody."""
    digest = hashlib.blake2b(digest_size=16)
    with own_stream(memory.device):
        for offset, length in chunks(memory.nbytes, _CHECKSUM_BYTES):
            for sums in _sums(memory[offset : offset + length]):
                digest.update(_to_host(sums.contiguous().view(torch.uint8)))
    return digest.digest()


def _sums(block: torch.Tensor) -> Iterator[torch.Tensor]:
    """Of the columns and rows of `block` as a table, and the bytes that do not fill a row."""
    even = block.nbytes - block.nbytes % _ROW_BYTES
    if even:
        words = block[:even].view(torch.int32) if block.storage_offset() % 4 == 0 else block[:even]
        table = words.view(even // _ROW_BYTES, -1)
        yield table.sum(0, dtype=torch.int64)
        yield table.sum(1, dtype=torch.int64)
    yield block[even:]


def _to_host(memory: torch.Tensor) -> memoryview:
    with own_stream(memory.device):
        return as_bytes(memory.cpu())


def _is_plain(tensor: torch.Tensor) -> bool:
    is_strided = tensor.layout is torch.strided
    return is_strided and is_dense(tuple(tensor.shape), tensor.stride()) and has_plain_format(tensor)


def _finish_work(device: torch.device) -> None:
    """What the model's own stream still does to the tensors is done afterwards."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
