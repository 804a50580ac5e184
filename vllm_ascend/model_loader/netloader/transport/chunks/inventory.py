"""The chunks of a memory, and which of them have passed. It is kept across the sources of a fetch."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from vllm_ascend.model_loader.netloader.errors import PeerError
from vllm_ascend.model_loader.netloader.transport import digests
from vllm_ascend.model_loader.netloader.weights.manifest import chunks


class Chunk(NamedTuple):
    """Bytes [offset, offset + length) of the manifest's address space, the `number`th of its chunks."""

    number: int
    offset: int
    length: int


class Inventory:
    """Which chunks of a memory of `nbytes` bytes have arrived and passed, and by which digests."""

    def __init__(self, nbytes: int) -> None:
        self.chunks = tuple(Chunk(number, *place) for number, place in enumerate(chunks(nbytes, digests.CHUNK_BYTES)))
        self._held: dict[int, bytes | None] = {}

    def missing(self, expected: Sequence[bytes] | None) -> list[Chunk]:
        """The chunks to fetch from a source: those not held, and those that the source holds differently.

        `expected` are the source's digests by chunk. Without them, what another session brought cannot be compared,
        so everything is fetched.
        """
        if expected is None:
            self._held.clear()
        else:
            self._held = {number: digest for number, digest in self._held.items() if digest == expected[number]}
        return [chunk for chunk in self.chunks if chunk.number not in self._held]

    def add(self, chunk: Chunk, digest: bytes | None) -> None:
        """Notes that `chunk` has arrived and passed by `digest`, which is None where nothing is verified."""
        self._held[chunk.number] = digest

    @property
    def held(self) -> Collection[int]:
        """The numbers of the chunks that have arrived and passed."""
        return self._held.keys()

    @property
    def is_complete(self) -> bool:
        """Whether every chunk has arrived and passed."""
        return len(self._held) == len(self.chunks)

    @property
    def nbytes_held(self) -> int:
        """The size of all chunks that have passed, in bytes."""
        return sum(self.chunks[number].length for number in self._held.copy())

    def require_complete(self) -> None:
        """Raises PeerError where a transport came to its end without every chunk."""
        absent = len(self.chunks) - len(self._held)
        if absent:
            raise PeerError(f"{absent} of {len(self.chunks)} chunks did not arrive")
