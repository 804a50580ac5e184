"""What one session brings: chunks are handed out to a transport, verified as they arrive, and settled.

Which chunks it asks for is up to its `Requests`, as several sessions may bring chunks of the same weights at once. A
chunk whose digest is not the one that the source has told is asked for again, and a source that delivers the same chunk
damaged too often is given up. So is a source that sends next to nothing while there is another way to the weights
(`LeastRate`).
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Final

from vllm_ascend.model_loader.netloader.errors import Damaged
from vllm_ascend.model_loader.netloader.transport.chunks.arrival import Arrival, Progress
from vllm_ascend.model_loader.netloader.transport.chunks.inventory import Chunk
from vllm_ascend.model_loader.netloader.transport.chunks.requests import Requests
from vllm_ascend.model_loader.netloader.transport.rate import LeastRate
from vllm_ascend.model_loader.netloader.weights.memory import Memory
from vllm_ascend.model_loader.netloader.wire.wakeup import Wakeup

logger = logging.getLogger(__name__)

TRIES_PER_CHUNK: Final = 3
"""How often a source may deliver one chunk damaged before it is given up."""


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
