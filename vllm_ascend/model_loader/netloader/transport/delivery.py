"""What a client still needs: the chunks that are missing in its memory, handed out, verified, and kept across sources.

The `Inventory` outlives a source that fails; a `Delivery` is what one session brings. A chunk whose digest is not the
one that the source has told goes back to the queue; when that happens to a chunk too often, the source is given up.
So is one that sends next to nothing while there is another way to the weights (`LeastRate`).
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from vllm_ascend.model_loader.netloader.errors import Damaged, PeerError
from vllm_ascend.model_loader.netloader.transport import digests
from vllm_ascend.model_loader.netloader.transport.digests import CHUNK_BYTES, PIECE_BYTES
from vllm_ascend.model_loader.netloader.transport.rate import LeastRate
from vllm_ascend.model_loader.netloader.weights.manifest import chunks
from vllm_ascend.model_loader.netloader.weights.memory import Landing, Memory

logger = logging.getLogger(__name__)

TRIES_PER_CHUNK: Final = 3
"""How often a source may deliver one chunk damaged before it is given up."""


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
        self._held: dict[int, bytes | None] = {}

    def missing(self, expected: Sequence[bytes] | None) -> list[Chunk]:
        """The chunks to fetch from a source: those not held, and those that the source holds differently.

        `expected` are the source's digests by chunk. Without them, what another session brought cannot be compared,
        and everything is fetched.
        """
        if expected is None:
            self._held.clear()
        else:
            self._held = {number: digest for number, digest in self._held.items() if digest == expected[number]}
        return [chunk for chunk in self.chunks if chunk.number not in self._held]

    def add(self, chunk: Chunk, digest: bytes | None) -> None:
        """Notes that `chunk` has arrived and passed by `digest`."""
        self._held[chunk.number] = digest

    @property
    def nbytes_held(self) -> int:
        """Bytes of the chunks that have passed."""
        return sum(self.chunks[number].length for number in self._held.copy())

    def require_complete(self) -> None:
        """Raises PeerError where a transport came to its end without every chunk."""
        absent = len(self.chunks) - len(self._held)
        if absent:
            raise PeerError(f"{absent} of {len(self.chunks)} chunks did not arrive")


class Delivery:
    """The missing chunks of one session. Thread-safe: `take` a chunk, `begin` it, `finish` it."""

    def __init__(
        self,
        memory: Memory,
        inventory: Inventory,
        expected: Sequence[bytes] | None,
        *,
        progress: Callable[[int], None],
        source: str,
        least_rate: LeastRate | None = None,
    ) -> None:
        """`expected` are the digests by chunk, None where nothing is verified."""
        self.memory = memory
        self.received = 0
        """Bytes, the damaged ones included."""
        self.over = threading.Event()
        """Set when nothing may arrive any more."""
        self._broken_off = False
        self._inventory = inventory
        self._expected = expected
        self._least_rate = least_rate
        self._progress = progress
        self._source = source
        self._lock = threading.Lock()
        self._damaged: Counter[int] = Counter()
        missing = inventory.missing(expected)
        held = sum(chunk.length for chunk in inventory.chunks) - sum(chunk.length for chunk in missing)
        self._show(held - inventory.shown)
        self._queue = deque(missing)

    @property
    def remaining(self) -> int:
        """Chunks that nobody has taken yet."""
        return len(self._queue)

    def take(self) -> Chunk | None:
        """The next chunk to fetch, None where there is no other."""
        try:
            return None if self._broken_off else self._queue.popleft()
        except IndexError:
            return None

    def break_off(self) -> None:
        """From now on there is nothing more to take; what is on its way may still arrive. From any thread."""
        self._broken_off = True

    def begin(self, chunk: Chunk) -> Arrival:
        if self.over.is_set():
            raise ValueError("the delivery is over")
        landing = self.memory.landing(chunk.offset, chunk.length)
        return Arrival(chunk, landing, self._expected[chunk.number] if self._expected else None, self._advance)

    def finish(self, arrival: Arrival) -> None:
        """Takes in a chunk of which all bytes have arrived. Raises Damaged when it was so once too often."""
        chunk = arrival.chunk
        if arrival.passes():
            arrival.landing.settle()
            with self._lock:
                self._inventory.add(chunk, arrival.expected)
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
        self.over.set()

    def _advance(self, nbytes: int) -> None:
        with self._lock:
            self.received += nbytes
            self._show(nbytes)
            if self._least_rate is not None:
                self._least_rate.note(nbytes)

    def _show(self, nbytes: int) -> None:
        self._inventory.shown += nbytes
        self._progress(nbytes)


class Arrival:
    """One chunk on its way in, digested as it comes."""

    def __init__(self, chunk: Chunk, landing: Landing, expected: bytes | None, progress: Callable[[int], None]) -> None:
        self.chunk = chunk
        self.landing = landing
        self.expected = expected
        """Its digest, None where it is not verified."""
        self._digest = digests.start() if expected is not None else None
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
        return self._digest is None or self._digest.digest() == self.expected

    def _catch_up(self) -> None:
        if self._digest is not None and self.nbytes > self._digested:
            self._digest.update(self.landing.arrived(self._digested, self.nbytes))
        self._digested = self.nbytes
