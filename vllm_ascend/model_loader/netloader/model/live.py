"""The parameters of a model on an accelerator as the memory that is served, so that nothing is held beside them.

A chunk of the manifest's address space is a part of one tensor, or spans several. One that lies in one piece is sent
from where it is, any other from a bucket, into which it is gathered. A chunk that arrives does so in a bucket, and is
copied to its tensors once it has been verified. Buckets have the size of a chunk, and there are as many as chunks are
under way.

Post-processing may change what was loaded. Before it, `remember` notes a checksum of every tensor, and copies the
tensors that INT8_CACHE covers. After it, `reconcile` finds out which tensors are still what they were, wherever they
lie now, and serves the others from their copies.
"""

from __future__ import annotations

import bisect
import errno
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch

from vllm_ascend.model_loader.netloader.errors import UnsupportedModel
from vllm_ascend.model_loader.netloader.model.device_memory import DeviceLanding, DeviceMemory
from vllm_ascend.model_loader.netloader.model.streams import finish_work, own_stream
from vllm_ascend.model_loader.netloader.model.views import as_bytes, as_tensor, flat, has_plain_format, view_of
from vllm_ascend.model_loader.netloader.weights.manifest import Manifest, TensorSpec, chunks, is_dense
from vllm_ascend.model_loader.netloader.weights.memory import Readable

_ROW_BYTES: Final = 1 << 13
_CHECKSUM_BYTES: Final = 1 << 24
"""Bytes that are summed at a time, which bounds what the sums take beside the weights."""


@dataclass(frozen=True)
class Int8Cache:
    """Which originals are copied before post-processing may change them, and where to.

    `place` is INT8_CACHE: ``hbm``, ``dram``, or ``no``. `names` is INT8_CACHE_NAME: copied are the tensors whose name
    contains one of them, or with None all tensors.
    """

    place: str = "no"
    names: tuple[str, ...] | None = None

    def may_cover(self, name: str) -> bool:
        """Whether the tensor `name` is among those that `names` allows, whatever the place."""
        return self.names is None or any(part in name for part in self.names)


class _Part(NamedTuple):
    """A tensor of the manifest, and all its bytes as a one-dimensional uint8 tensor."""

    spec: TensorSpec
    memory: torch.Tensor


class LiveMemory(DeviceMemory):
    """Weights that are served from the tensors of a model.

    Closing it leaves the tensors to the model, and drops the copies of originals.
    """

    def __init__(self, manifest: Manifest, tensors: Mapping[str, torch.Tensor], device: torch.device) -> None:
        """`tensors` are those that `manifest` describes, by name, each dense and on `device`."""
        self.nbytes = manifest.nbytes
        self.device = device
        self._specs = [spec for spec in manifest.tensors if spec.nbytes]
        self._ends = [spec.end for spec in self._specs]
        self._checksums: dict[str, bytes] = {}
        self._copies: dict[str, torch.Tensor] = {}
        self._servable = False
        self.hold(tensors)

    def hold(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Serves the bytes of `tensors` from now on. They are as `manifest` describes them, perhaps in other places."""
        self._parts = {spec.name: _Part(spec, flat(tensors[spec.name])) for spec in self._specs}
        finish_work(self.device)

    @property
    def servable(self) -> bool:
        return self._servable

    def landing(self, offset: int, length: int) -> DeviceLanding:
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
        if spec.nbytes == 0:
            return view_of(torch.empty(0, dtype=torch.uint8, device=self.device), spec)
        return view_of(self._parts[spec.name].memory, spec)

    def pieces(self, offset: int, length: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Bytes [offset, offset + length) tensor by tensor, each with where it begins relative to `offset`.

        What lies between two tensors belongs to none. Raises OSError after `close`.
        """
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
        finish_work(self.device)
        self._servable = True

    def close(self) -> None:
        self._servable = False
        self._parts, self._copies = {}, {}

    def remember(self, cache: Int8Cache) -> None:
        """Notes what every tensor holds, and copies those that `cache` covers. Call it before post-processing."""
        for name, part in self._parts.items():
            self._checksums[name] = checksum(part.memory)
            if cache.place != "no" and cache.may_cover(name):
                self._copies[name] = part.memory.clone() if cache.place == "hbm" else part.memory.to("cpu", copy=True)
        finish_work(self.device)

    def reconcile(self, current: Mapping[str, torch.Tensor]) -> list[str]:
        """Finds the originals again. Call it after post-processing, with the tensors that the model holds by now.

        Returns the names of the tensors that were changed. Raises UnsupportedModel, naming the tensors, if the original
        of one is kept nowhere.
        """
        in_use = {tensor.untyped_storage().data_ptr() for tensor in current.values()}
        changed: list[str] = []
        lost: list[str] = []
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
        """The memory in which the model itself still has what was loaded into `part`, None if there is none."""
        original = self._checksums[part.spec.name]
        if part.memory.untyped_storage().data_ptr() in in_use and checksum(part.memory) == original:
            return part.memory
        if now is None or now.nbytes != part.spec.nbytes or not _lies_plainly(now):
            return None
        elsewhere = flat(now)
        return elsewhere if checksum(elsewhere) == original else None


class _LiveLanding(DeviceLanding):
    """A bucket for one chunk, in host memory or on the device."""

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
    """All bytes of a memory on a device; each slice is copied to the host when it is read."""

    def __init__(self, memory: LiveMemory) -> None:
        self._memory = memory

    @property
    def nbytes(self) -> int:
        return self._memory.nbytes

    def __getitem__(self, part: slice) -> memoryview:
        begin, end, _ = part.indices(self.nbytes)
        return _to_host(self._memory.chunk(begin, end - begin)).toreadonly()


def checksum(memory: torch.Tensor) -> bytes:
    """A checksum of the bytes of `memory`, a one-dimensional uint8 tensor, made on its own device.

    It consists of sums over rows and columns, so it is cheap. It reveals accidents, and is no defence against anybody.
    """
    digest = hashlib.blake2b(digest_size=16)
    with own_stream(memory.device):
        for offset, length in chunks(memory.nbytes, _CHECKSUM_BYTES):
            for sums in _sums(memory[offset : offset + length]):
                digest.update(_to_host(sums.contiguous().view(torch.uint8)))
    return digest.digest()


def _sums(block: torch.Tensor) -> Iterator[torch.Tensor]:
    """The sums of the columns and of the rows of `block`, seen as a table, and the bytes that do not fill a row."""
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


def _lies_plainly(tensor: torch.Tensor) -> bool:
    is_strided = tensor.layout is torch.strided
    return is_strided and is_dense(tuple(tensor.shape), tensor.stride()) and has_plain_format(tensor)
