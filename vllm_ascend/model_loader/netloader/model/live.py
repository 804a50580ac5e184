"""The parameters of a model on an accelerator as the memory that is served, so that nothing is held beside them.

A chunk of the manifest's address space is a part of one tensor, or spans several. One that lies in one piece is sent
from where it is, any other from a bucket, into which it is gathered. A chunk that arrives does so in a bucket, and is
copied to its tensors once it has been verified. Buckets have the size of a chunk, and there are as many as chunks are
under way.

Post-processing may move, rearrange or replace what was loaded. Before it, `remember` notes what is needed to find the
bytes again, and lets go of the tensors (`originals`). After it, `reconcile` finds out how each tensor is read from now
on: as it is, through an inverse, piece by piece (`inverses`), or from a copy.
"""

from __future__ import annotations

import bisect
import errno
import logging
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn

from vllm_ascend.model_loader.netloader.errors import UnsupportedModel
from vllm_ascend.model_loader.netloader.model.device_memory import DeviceLanding, DeviceMemory
from vllm_ascend.model_loader.netloader.model.inverses import AsLoaded, Contents
from vllm_ascend.model_loader.netloader.model.originals import (
    Holdings,
    Int8Cache,
    Original,
    kept_bytes_of,
    remember,
)
from vllm_ascend.model_loader.netloader.model.streams import finish_work, own_stream
from vllm_ascend.model_loader.netloader.model.views import as_bytes, as_tensor, flat, view_of
from vllm_ascend.model_loader.netloader.weights.manifest import Manifest, TensorSpec
from vllm_ascend.model_loader.netloader.weights.memory import Readable

logger = logging.getLogger(__name__)


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
        self._contents: dict[str, Contents] = {}
        self._originals: dict[str, Original] = {}
        self._proofs: dict[str, Callable[[Contents], bool]] = {}
        """By name, what tells whether contents are still what was loaded. Only of what the model uses."""
        self._servable = False
        self.hold(tensors)

    def hold(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Serves the bytes of `tensors` from now on. They are as `manifest` describes them, perhaps in other places."""
        self._contents = {spec.name: AsLoaded(flat(tensors[spec.name])) for spec in self._specs}
        finish_work(self.device)

    @property
    def servable(self) -> bool:
        return self._servable

    def landing(self, offset: int, length: int, *, apart: bool = False) -> DeviceLanding:
        return _LiveLanding(self, offset, length)

    def contents(self) -> Readable:
        return _HostCopies(self)

    reader = contents

    def chunk(self, offset: int, length: int) -> torch.Tensor:
        first = next(self._parts(offset, length), None)
        if first is not None:
            contents, begin, end, _ = first
            if isinstance(contents, AsLoaded) and end - begin == length and contents.memory.device == self.device:
                return contents.memory[begin:end]
        with own_stream(self.device):
            bucket = torch.zeros(length, dtype=torch.uint8, device=self.device)  # what lies between tensors is zero
            self._gather(bucket, offset)
        return bucket

    def tensor(self, spec: TensorSpec) -> torch.Tensor:
        if spec.nbytes == 0:
            return view_of(torch.empty(0, dtype=torch.uint8, device=self.device), spec)
        contents = self._contents[spec.name]
        assert isinstance(contents, AsLoaded), "this tensor is spread over other memory"
        return view_of(contents.memory, spec)

    def pieces(self, offset: int, length: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Bytes [offset, offset + length) piece by piece, each with where it begins relative to `offset`.

        What lies between two tensors belongs to none. Raises OSError after `close`.
        """
        for contents, begin, end, position in self._parts(offset, length):
            within = 0
            for piece in contents.pieces(begin, end):
                yield position + within, piece
                within += piece.nbytes

    def seal(self) -> None:
        finish_work(self.device)
        self._servable = True

    def close(self) -> None:
        self._servable = False
        self._contents, self._originals, self._proofs = {}, {}, {}

    def remember(self, cache: Int8Cache) -> None:
        """Notes what every tensor holds, copies those that `cache` covers, and lets go of them.

        Call it before post-processing. Until `reconcile`, nothing can be read. Raises UnsupportedModel if the device
        fails at it, for example because it has no memory left.
        """
        parts = [(spec, self._contents[spec.name].memory) for spec in self._specs]
        self._contents = {}
        try:
            self._originals = remember(parts, cache, kept_bytes_of(self.nbytes), self.device)
            finish_work(self.device)
        except RuntimeError as error:
            raise UnsupportedModel(
                f"{self.device} failed when the weights were noted and copied (INT8_CACHE is {cache.place!r}) before "
                f"post-processing: {error}"
            ) from error

    def reconcile(self, model: nn.Module) -> list[str]:
        """Finds the originals again in `model`. Call it after post-processing.

        Returns the names of the tensors that were changed. Raises UnsupportedModel, naming the tensors, if one is
        neither to be had by an inverse nor kept.
        """
        finish_work(self.device)
        holdings, originals, self._originals = Holdings(model), self._originals, {}
        found = {name: original.find(holdings) for name, original in originals.items()}
        if lost := [name for name, contents in found.items() if contents is None]:
            raise _not_found(lost)

        self._contents = {name: contents for name, contents in found.items() if contents is not None}
        self._proofs = {
            name: originals[name].proof for name, each in self._contents.items() if not originals[name].is_copy(each)
        }
        return [
            name
            for name, contents in self._contents.items()
            if originals[name].is_copy(contents) or not isinstance(contents, AsLoaded)
        ]

    def is_as_loaded(self) -> bool:
        """Whether the model's tensors still have the bytes that were loaded. Their device reads them all for it."""
        contents = self._contents
        with own_stream(self.device):
            changed = [name for name, proves in self._proofs.items() if not proves(contents[name])]
        if changed:
            logger.error(
                "%d tensors (%s) were changed after loading by something that Netloader does not know of, so these "
                "weights are given to nobody: reload, or start again",
                len(changed),
                ", ".join(changed[:8]) + (", ..." if changed[8:] else ""),
            )
        return not changed

    def _parts(self, offset: int, length: int) -> Iterator[tuple[Contents, int, int, int]]:
        """The tensors that bytes [offset, offset + length) belong to.

        Each comes with the bytes of it from begin to before end, and where these begin relative to `offset`.
        """
        known = self._contents
        if self._specs and not known:
            raise OSError(errno.EBADF, "these weights are given up, or being processed")
        for spec in self._within(offset, length):
            begin, end = max(spec.offset, offset), min(spec.end, offset + length)
            yield known[spec.name], begin - spec.offset, end - spec.offset, begin - offset

    def _within(self, offset: int, length: int) -> Iterator[TensorSpec]:
        for spec in self._specs[bisect.bisect_right(self._ends, offset) :]:
            if spec.offset >= offset + length:
                return
            yield spec

    def _gather(self, bucket: torch.Tensor, offset: int) -> None:
        for begin, piece in self.pieces(offset, bucket.nbytes):
            bucket[begin : begin + piece.nbytes].copy_(piece)


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
    """All bytes of a memory on a device; each slice is copied to the host when it is read, piece by piece."""

    def __init__(self, memory: LiveMemory) -> None:
        self._memory = memory

    @property
    def nbytes(self) -> int:
        return self._memory.nbytes

    def __getitem__(self, part: slice) -> memoryview:
        begin, end, _ = part.indices(self.nbytes)
        host = torch.zeros(max(end - begin, 0), dtype=torch.uint8, device="cpu")
        with own_stream(self._memory.device):
            for start, piece in self._memory.pieces(begin, host.nbytes):
                host[start : start + piece.nbytes].copy_(piece)
        return as_bytes(host).toreadonly()


def _not_found(names: list[str]) -> UnsupportedModel:
    return UnsupportedModel(
        f"post-processing changed {len(names)} tensors ({', '.join(names[:8])}{', ...' if names[8:] else ''}) in a way "
        f'that no known inverse undoes, and nothing keeps their originals: set INT8_CACHE to "hbm" or "dram", with '
        f"INT8_CACHE_NAME, if set, covering them"
    )


def _to_host(memory: torch.Tensor) -> memoryview:
    with own_stream(memory.device):
        return as_bytes(memory.cpu())
