"""Which chunks a client still needs: handed out to a transport, verified as they arrive, and kept across sources.

The `Inventory` of a client outlives a source that fails; a `Delivery` is what one session brings. Which chunks it asks
for is up to its `Requests`, as several sessions may bring chunks of the same weights at once. A chunk whose digest is
not the one that the source has told is asked for again, and a source that delivers the same chunk damaged too often is
given up. So is a source that sends next to nothing while there is another way to the weights (`LeastRate`).
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Final, NamedTuple

from vllm_ascend.model_loader.netloader.errors import Damaged, PeerError
from vllm_ascend.model_loader.netloader.transport import digests
from vllm_ascend.model_loader.netloader.transport.digests import CHUNK_BYTES, PIECE_BYTES
from vllm_ascend.model_loader.netloader.transport.rate import LeastRate
from vllm_ascend.model_loader.netloader.weights.manifest import chunks
from vllm_ascend.model_loader.netloader.weights.memory import Landing, Memory
from vllm_ascend.model_loader.netloader.wire.wakeup import Wakeup

logger = logging.getLogger(__name__)

TRIES_PER_CHUNK: Final = 3
"""How often a source may deliver one chunk damaged before it is given up."""


class Chunk(NamedTuple):
    """Bytes [offset, offset + length) of the manifest's address space, the `number`th of its chunks."""

    number: int
    offset: int
    length: int


class Progress:
    """How many bytes of the weights a client has, told to a progress bar as differences.

    The figure falls where bytes turn out to be damaged or to be other ones than the next source holds. Thread-safe.
    """

    def __init__(self, show: Callable[[int], None]) -> None:
        """`show` is called with each difference, by one thread at a time."""
        self._show = show
        self._nbytes = 0
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        """Notes that `nbytes` more bytes have come, or fewer where it is negative."""
        with self._lock:
            self._nbytes += nbytes
            self._show(nbytes)

    def set(self, nbytes: int) -> None:
        """Notes that the client has `nbytes` bytes in all."""
        with self._lock:
            difference, self._nbytes = nbytes - self._nbytes, nbytes
            self._show(difference)


class Inventory:
    """Which chunks of a memory of `nbytes` bytes have arrived and passed, and by which digests."""

    def __init__(self, nbytes: int) -> None:
        self.chunks = tuple(Chunk(number, *place) for number, place in enumerate(chunks(nbytes, CHUNK_BYTES)))
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


class Requests(ABC):
    """The chunks that one session asks its source for. Thread-safe."""

    @property
    @abstractmethod
    def remaining(self) -> int:
        """The number of chunks that the session may still have to bring."""

    @property
    @abstractmethod
    def is_complete(self) -> bool:
        """Whether every chunk has passed, whoever brought it."""

    @property
    @abstractmethod
    def is_over(self) -> bool:
        """Whether no chunk will be handed out any more."""

    @abstractmethod
    def next(self, *, wait: bool) -> Chunk | None:
        """The next chunk to fetch. Where there is none now, None, or with `wait` only when this is over."""

    @abstractmethod
    def begin(self, chunk: Chunk) -> bool:
        """Notes that `chunk` arrives. Whether it may do so in its own place, because nobody else can bring it."""

    @abstractmethod
    def claim(self, chunk: Chunk) -> bool:
        """Whether `chunk`, which has passed, is to be settled, because nobody else has brought it before."""

    @abstractmethod
    def arrived(self, chunk: Chunk, digest: bytes | None) -> None:
        """Notes that `chunk`, which was claimed, has settled. `digest` is the one by which it has passed."""

    @abstractmethod
    def damaged(self, chunk: Chunk) -> None:
        """Notes that `chunk` has arrived damaged, so that it has to be fetched again."""

    @abstractmethod
    def stop(self) -> None:
        """Hands out no further chunk. From any thread; idempotent."""

    @abstractmethod
    def close(self) -> None:
        """Notes that nothing arrives any more. Idempotent."""

    @abstractmethod
    def listen(self, listener: Callable[[], None], *, only_the_end: bool = False) -> None:
        """Calls `listener`, which may not block, whenever there may be another chunk, and when this is over."""

    @abstractmethod
    def forget(self, listener: Callable[[], None]) -> None:
        """Does not call `listener` any more. Idempotent."""


class InOrder(Requests):
    """All chunks that are missing, one after another, for a session that brings them alone."""

    def __init__(self, inventory: Inventory, expected: Sequence[bytes] | None) -> None:
        """`expected` are the source's digests by chunk, None where nothing is verified."""
        self._inventory = inventory
        self._queue = deque(inventory.missing(expected))
        self._is_stopped = False

    @property
    def remaining(self) -> int:
        return len(self._queue)

    @property
    def is_complete(self) -> bool:
        return self._inventory.is_complete

    @property
    def is_over(self) -> bool:
        return self._is_stopped or not self._queue

    def next(self, *, wait: bool) -> Chunk | None:
        try:
            return None if self._is_stopped else self._queue.popleft()
        except IndexError:
            return None

    def begin(self, chunk: Chunk) -> bool:
        return True

    def claim(self, chunk: Chunk) -> bool:
        return True

    def arrived(self, chunk: Chunk, digest: bytes | None) -> None:
        self._inventory.add(chunk, digest)

    def damaged(self, chunk: Chunk) -> None:
        self._queue.append(chunk)

    def stop(self) -> None:
        self._is_stopped = True

    def close(self) -> None:
        self._is_stopped = True

    def listen(self, listener: Callable[[], None], *, only_the_end: bool = False) -> None:
        return

    def forget(self, listener: Callable[[], None]) -> None:
        return


class Delivery:
    """The chunks that one session has to bring into `memory`.

    A transport takes a chunk (`take`), begins it, tells its `Arrival` of the bytes that have landed, and finishes it.
    Thread-safe, so that several connections can share one delivery. Whoever made it closes it.
    """

    def __init__(
        self,
        memory: Memory,
        requests: Requests,
        expected: Sequence[bytes] | None,
        *,
        progress: Progress,
        source: str,
        least_rate: LeastRate | None = None,
    ) -> None:
        """`expected` are the digests by chunk, or None where nothing is verified; `source` is named in messages."""
        self.memory = memory
        self.requests = requests
        self.received = 0
        """Bytes that have arrived, those of damaged chunks included."""
        self.brought = 0
        """Bytes of chunks that have arrived and passed, and that nobody else had brought before."""
        self.over = threading.Event()
        """Set when nothing may arrive any more."""
        self._expected = expected
        self._progress = progress
        self._source = source
        self._least_rate = least_rate
        self._lock = threading.Lock()
        self._damaged: Counter[int] = Counter()
        self._arriving: set[Arrival] = set()
        self._owed = 0
        self._owing_since = 0.0
        self._owing_seconds = 0.0

    @property
    def remaining(self) -> int:
        """The number of chunks that may still be taken."""
        return self.requests.remaining

    @property
    def is_complete(self) -> bool:
        """Whether every chunk has passed, whoever brought it."""
        return self.requests.is_complete

    @property
    def is_over(self) -> bool:
        """Whether no further chunk will be handed out."""
        return self.requests.is_over

    @property
    def damaged(self) -> int:
        """How many chunks arrived damaged; one that did so twice counts twice."""
        return self._damaged.total()

    @property
    def owing_seconds(self) -> float:
        """For how many seconds the source has owed chunks that were taken."""
        with self._lock:
            return self._owing_seconds + (time.monotonic() - self._owing_since if self._owed else 0.0)

    def take(self, *, wait: bool = False) -> Chunk | None:
        """The next chunk to fetch. None where there is none now, or with `wait` only when there will be none."""
        chunk = self.requests.next(wait=wait)
        if chunk is not None:
            self._owe(1)
        return chunk

    @contextlib.contextmanager
    def wakeup(self) -> Iterator[Wakeup]:
        """A wakeup that is set whenever there may be another chunk to take, and when there will be none."""
        with contextlib.closing(Wakeup()) as wakeup:
            self.requests.listen(wakeup.set)
            try:
                yield wakeup
            finally:
                self.requests.forget(wakeup.set)

    def begin(self, chunk: Chunk) -> Arrival:
        """Where the bytes of `chunk`, which was taken, are to land. Raises ValueError where the delivery is over."""
        if self.over.is_set():
            raise ValueError("the delivery is over")
        in_place = self.requests.begin(chunk)
        landing = self.memory.landing(chunk.offset, chunk.length, apart=not in_place)
        arrival = Arrival(chunk, landing, self._expected[chunk.number] if self._expected else None, self._advance)
        with self._lock:
            self._arriving.add(arrival)
        return arrival

    def finish(self, arrival: Arrival) -> None:
        """Takes in a chunk of which all bytes have landed, or asks for it again where it is damaged.

        Raises Damaged where that happened to this chunk once too often.
        """
        chunk = arrival.chunk
        self._owe(-1)
        passes = arrival.passes()
        with self._lock:
            self._arriving.discard(arrival)
        if passes:
            self._take_in(arrival)
            return

        self._progress.add(-arrival.nbytes)
        with self._lock:
            self._damaged[chunk.number] += 1
            times = self._damaged[chunk.number]
        place = f"chunk {chunk.number} (bytes {chunk.offset} to {chunk.offset + chunk.length - 1})"
        if times >= TRIES_PER_CHUNK:
            raise Damaged(f"{place} arrived damaged {times} times")
        logger.warning("%s from %s arrived damaged: its digest differs; fetching it again", place, self._source)
        self.requests.damaged(chunk)

    def break_off(self) -> None:
        """Hands out no further chunk. Those that are on their way may still arrive. For any thread."""
        self.requests.stop()

    def close(self) -> None:
        """Ends the delivery: no chunk can begin any more. Idempotent."""
        self.over.set()
        with self._lock:
            arriving, self._arriving = self._arriving, set()
        self._progress.add(-sum(arrival.nbytes for arrival in arriving))
        self.requests.close()

    def _take_in(self, arrival: Arrival) -> None:
        """Puts a chunk that has passed where it belongs, unless another session was sooner."""
        chunk = arrival.chunk
        if not self.requests.claim(chunk):
            self._progress.add(-arrival.nbytes)
            return
        # The bytes must be where they belong before another source, a client, or the end counts on them.
        try:
            arrival.landing.settle()
        except BaseException:
            self.requests.damaged(chunk)
            raise
        self.requests.arrived(chunk, arrival.expected)
        with self._lock:
            self.brought += chunk.length

    def _owe(self, count: int) -> None:
        with self._lock:
            now = time.monotonic()
            if self._owed:
                self._owing_seconds += now - self._owing_since
            elif self._least_rate is not None:
                self._least_rate.begin()
            self._owed += count
            self._owing_since = now

    def _advance(self, nbytes: int) -> None:
        with self._lock:
            self.received += nbytes
            self._progress.add(nbytes)
            if self._least_rate is not None:
                self._least_rate.note(nbytes)


class Arrival:
    """One chunk on its way in, digested as its bytes land. For one thread."""

    def __init__(self, chunk: Chunk, landing: Landing, expected: bytes | None, advanced: Callable[[int], None]) -> None:
        """`expected` is the digest of the chunk, or None where it is not verified; `advanced` hears of its bytes."""
        self.chunk = chunk
        self.landing = landing
        self.expected = expected
        self.nbytes = 0
        """How many bytes of the chunk have landed."""
        self._advanced = advanced
        self._digest = digests.start() if expected is not None else None
        self._digested = 0

    def advance(self, nbytes: int) -> None:
        """Notes that the next `nbytes` bytes of the chunk have landed. Raises SourceTooSlow where its source is."""
        self.nbytes += nbytes
        self._advanced(nbytes)
        if self.nbytes - self._digested >= PIECE_BYTES:
            self._catch_up()

    def passes(self) -> bool:
        """Whether all bytes of the chunk are there and have the digest that is expected."""
        self._catch_up()
        if self.nbytes != self.chunk.length:
            return False
        return self._digest is None or self._digest.digest() == self.expected

    def _catch_up(self) -> None:
        """Digests what has landed since the last time, while the processor's cache still has it."""
        if self._digest is not None and self.nbytes > self._digested:
            self._digest.update(self.landing.arrived(self._digested, self.nbytes))
        self._digested = self.nbytes
