"""What a client still needs: the chunks that are missing in its memory, handed out, verified, and kept across sources.

The `Inventory` outlives a source that fails; a `Delivery` is what one session brings. A chunk whose digest is not the
one that the source has told goes back to the queue; when that happens to a chunk too often, the source is given up.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable
from typing import Final, NamedTuple

from vllm_ascend.model_loader.netloader.digests import CHUNK_BYTES, PIECE_BYTES, Seal
from vllm_ascend.model_loader.netloader.errors import ProtocolError
from vllm_ascend.model_loader.netloader.manifest import chunks
from vllm_ascend.model_loader.netloader.memory import Landing, Memory, Readable

logger = logging.getLogger(__name__)

TRIES_PER_CHUNK: Final = 3
"""How often a source may deliver one chunk damaged before it is given up."""


class Damaged(ProtocolError):
    """A source went on delivering bytes that are not those of its digests."""


class Chunk(NamedTuple):
    """Bytes [offset, offset + length) of the manifest's address space."""

    number: int
    offset: int
    length: int


class Inventory:
    """Which chunks of a memory of `nbytes` have arrived and passed."""

    def __init__(self, nbytes: int) -> None:
        self.chunks = tuple(Chunk(number, *place) for number, place in enumerate(chunks(nbytes, CHUNK_BYTES)))
        self.shown = 0
        """Bytes of which the progress bar knows."""
        self._passed_by: dict[int, Seal | None] = {}

    def missing(self, data: Readable, seal: Seal | None) -> list[Chunk]:
        """The chunks to fetch from a source: those not held, and those that the source holds differently.

        Without a seal, what another session brought cannot be compared, and everything is fetched.
        """
        held = self._passed_by.items()
        self._passed_by = {number: seal for number, by in held if _holds(data, self.chunks[number], by, seal)}
        return [chunk for chunk in self.chunks if chunk.number not in self._passed_by]

    def add(self, chunk: Chunk, seal: Seal | None) -> None:
        """Notes that `chunk` has arrived and passed by `seal`."""
        self._passed_by[chunk.number] = seal

    def require_complete(self) -> None:
        """Raises ProtocolError where a transport came to its end without every chunk."""
        absent = len(self.chunks) - len(self._passed_by)
        if absent:
            raise ProtocolError(f"{absent} of {len(self.chunks)} chunks did not arrive")


class Delivery:
    """The missing chunks of one session. Thread-safe: `take` a chunk, `begin` it, `finish` it."""

    def __init__(
        self, memory: Memory, inventory: Inventory, seal: Seal | None, progress: Callable[[int], None], source: str
    ) -> None:
        self.memory = memory
        self.received = 0
        """Bytes, the damaged ones included."""
        self._is_open = True
        self._inventory = inventory
        self._seal = seal
        self._progress = progress
        self._source = source
        self._lock = threading.Lock()
        self._damaged: Counter[int] = Counter()
        missing = inventory.missing(memory.contents(), seal)
        held = sum(chunk.length for chunk in inventory.chunks) - sum(chunk.length for chunk in missing)
        self._show(held - inventory.shown)
        self._queue = deque(missing)

    @property
    def remaining(self) -> int:
        """Chunks that nobody has taken yet."""
        return len(self._queue)

    def take(self) -> Chunk | None:
        try:
            return self._queue.popleft()
        except IndexError:
            return None

    def begin(self, chunk: Chunk) -> Arrival:
        if not self._is_open:
            raise ValueError("the delivery is over")
        return Arrival(chunk, self.memory.landing(chunk.offset, chunk.length), self._seal, self._advance)

    def finish(self, arrival: Arrival) -> None:
        """Takes in a chunk of which all bytes have arrived. Raises Damaged when it was so once too often."""
        chunk = arrival.chunk
        if arrival.passes():
            arrival.landing.settle()
            with self._lock:
                self._inventory.add(chunk, self._seal)
            return
        with self._lock:
            self._show(-arrival.nbytes)
            self._damaged[chunk.number] += 1
            times = self._damaged[chunk.number]
        place = f"chunk {chunk.number} (bytes {chunk.offset} to {chunk.offset + chunk.length - 1})"
        if times >= TRIES_PER_CHUNK:
            raise Damaged(f"{place} arrived damaged {times} times")
        logger.warning("%s from %s arrived damaged: its digest differs; fetching it again", place, self._source)
        self._queue.append(chunk)

    @property
    def damaged(self) -> int:
        """How many chunks arrived damaged, each time counted."""
        return self._damaged.total()

    def close(self) -> None:
        """Nothing may arrive any more."""
        self._is_open = False

    def _advance(self, nbytes: int) -> None:
        with self._lock:
            self.received += nbytes
            self._show(nbytes)

    def _show(self, nbytes: int) -> None:
        self._inventory.shown += nbytes
        self._progress(nbytes)


class Arrival:
    """One chunk on its way in, digested as it comes."""

    def __init__(self, chunk: Chunk, landing: Landing, seal: Seal | None, progress: Callable[[int], None]) -> None:
        self.chunk = chunk
        self.landing = landing
        self._expected = seal.digests[chunk.number] if seal is not None else None
        self._digest = seal.algorithm.start(chunk.number) if seal is not None else None
        self._progress = progress
        self.nbytes = 0
        """That have arrived."""
        self._digested = 0

    def advance(self, nbytes: int) -> None:
        """Notes that the next `nbytes` of the chunk have landed."""
        self.nbytes += nbytes
        self._progress(nbytes)
        if self.nbytes - self._digested >= PIECE_BYTES:
            self._catch_up()

    def passes(self) -> bool:
        """Whether all bytes are there and are the ones that the source has told of."""
        self._catch_up()
        if self.nbytes != self.chunk.length:
            return False
        return self._digest is None or self._digest.finish() == self._expected

    def _catch_up(self) -> None:
        if self._digest is not None and self.nbytes > self._digested:
            self._digest.update(self.landing.arrived(self._digested, self.nbytes))
        self._digested = self.nbytes


def _holds(data: Readable, chunk: Chunk, passed_by: Seal | None, seal: Seal | None) -> bool:
    """Whether what passed by one seal passes by another too."""
    if passed_by is None or seal is None:
        return False
    expected = seal.digests[chunk.number]
    if passed_by.algorithm == seal.algorithm:
        return passed_by.digests[chunk.number] == expected
    return seal.algorithm.of(data[chunk.offset : chunk.offset + chunk.length], chunk.number) == expected
