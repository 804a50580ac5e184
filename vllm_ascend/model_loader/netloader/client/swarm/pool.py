"""The chunks of one fetch, shared by the sessions that bring them.

Which chunk is asked of whom is up to the `Swarm`, which knows neither threads nor time; here are both. One lock guards
everything. Sessions that find nothing to ask for wait under it, each on a condition of its own, and are woken by what
gives them something: most news concerns one session, and waking all of them would take more time than the news does.

Where one session works alone, its chunks arrive in their own places. Where several do, the same chunk may be on its way
from two sources, and one of them may send anything. So there a chunk arrives apart and is put into its place by whoever
has claimed it, which is done once: what has passed, and is served to others by now, is never written again.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterable
from typing import Final

from vllm_ascend.model_loader.netloader.client.swarm.policy import Swarm
from vllm_ascend.model_loader.netloader.client.verification import Evidence
from vllm_ascend.model_loader.netloader.transport.chunks.inventory import Chunk, Inventory
from vllm_ascend.model_loader.netloader.transport.chunks.log import ChunkLog
from vllm_ascend.model_loader.netloader.transport.chunks.requests import Requests

_LATE_SECONDS: Final = 0.25
"""How often a session without work looks whether another one is late: nothing but time tells."""


class Pool:
    """All chunks of the contents that `evidence` describes, those that `inventory` has already included."""

    def __init__(
        self,
        inventory: Inventory,
        evidence: Evidence,
        chance: random.Random,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`chance` puts the chunks into the order in which this client asks for those that are equally rare."""
        self.evidence = evidence
        self.passed = ChunkLog(len(inventory.chunks))
        """The chunks that are in their places for good."""
        self.passed_at = clock()
        """When the latest chunk passed."""
        self._inventory = inventory
        self._clock = clock
        self._lock = threading.Lock()
        self._arriving_in_place: dict[int, Share] = {}
        self._claimed: set[int] = set()

        held = sorted(inventory.held)
        for number in held:
            self.passed.add(number)
        self._swarm: Swarm[Share] = Swarm([chunk.length for chunk in inventory.chunks], chance, held=held)

    @property
    def sessions(self) -> int:
        """How many sessions bring chunks now."""
        return len(self._swarm.sources)

    @property
    def is_complete(self) -> bool:
        """Whether every chunk has passed and is in its place."""
        return self._swarm.is_complete

    def join(self, *, has_all: bool) -> Share:
        """Another session, whose source has all chunks, or none as far as is known. Whoever asked closes it."""
        share = Share(self)
        with self._lock:
            self._swarm.joined(share, None if has_all else ())
        return share

    def tell_all(self) -> None:
        """Wakes all sessions that wait. For whoever holds the lock."""
        for share in self._swarm.sources:
            share.tell()


class Share(Requests):
    """What one session has to do with a `Pool`."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._changed = threading.Condition(pool._lock)
        self._listeners: set[Callable[[], None]] = set()
        self._end_listeners: set[Callable[[], None]] = set()
        self._is_stopped = False
        self._is_closed = False
        self._heard: tuple[set[int], set[int]] = (set(), set())

    @property
    def remaining(self) -> int:
        return self._pool._swarm.missing

    @property
    def is_complete(self) -> bool:
        return self._pool.is_complete

    @property
    def is_over(self) -> bool:
        return self._is_stopped or self._pool.is_complete

    @property
    def is_useful(self) -> bool:
        """Whether the source has anything that is missing here."""
        pool = self._pool
        with pool._lock:
            return not self._is_closed and pool._swarm.is_useful(self)

    def has(self, chunks: Iterable[int]) -> None:
        """Notes that the source says it has `chunks` now."""
        pool = self._pool
        with pool._lock:
            if not self._is_closed and pool._swarm.has(self, chunks):
                self.tell()

    def sent(self, chunks: Iterable[int]) -> None:
        """Notes that the source says it has sent `chunks` to somebody."""
        with self._pool._lock:
            self._pool._swarm.sent(chunks)

    def next(self, *, wait: bool) -> Chunk | None:
        pool = self._pool
        with pool._lock:
            while not self._is_closed and not self.is_over:
                number = pool._swarm.next_for(self, pool._clock())
                if number is not None and number in pool._arriving_in_place:
                    # It is late at the one who works on it, but nobody may write to that place beside it.
                    pool._swarm.damaged(self, number)
                elif number is not None:
                    return pool._inventory.chunks[number]
                elif wait:
                    self._changed.wait(_LATE_SECONDS)
                else:
                    break
        return None

    def begin(self, chunk: Chunk) -> bool:
        pool = self._pool
        with pool._lock:
            is_there = chunk.number in pool._claimed or chunk.number in pool.passed
            is_alone = pool.sessions == 1 and not self._is_closed and not is_there
            if is_alone:
                pool._arriving_in_place[chunk.number] = self
            return is_alone

    def claim(self, chunk: Chunk) -> bool:
        pool = self._pool
        with pool._lock:
            if chunk.number in pool._claimed or chunk.number in pool.passed:
                pool._swarm.arrived(self, chunk.number, pool._clock())
                return False
            pool._claimed.add(chunk.number)
            return True

    def arrived(self, chunk: Chunk, digest: bytes | None) -> None:
        pool = self._pool
        with pool._lock:
            pool._arriving_in_place.pop(chunk.number, None)
            pool._claimed.discard(chunk.number)
            pool._inventory.add(chunk, digest)
            pool.passed.add(chunk.number)
            pool.passed_at = pool._clock()
            pool._swarm.arrived(self, chunk.number, pool.passed_at)
            self.tell()
            if self.is_complete:
                pool.tell_all()

    def damaged(self, chunk: Chunk) -> None:
        pool = self._pool
        with pool._lock:
            if pool._arriving_in_place.get(chunk.number) is self:
                del pool._arriving_in_place[chunk.number]
            pool._claimed.discard(chunk.number)
            if not self._is_closed:
                pool._swarm.damaged(self, chunk.number)
            pool.tell_all()

    def stop(self) -> None:
        self._is_stopped = True
        with self._pool._lock:
            self.tell()

    def close(self) -> None:
        pool = self._pool
        with pool._lock:
            self._is_stopped = True
            if self._is_closed:
                return
            self._is_closed = True
            mine = [number for number, share in pool._arriving_in_place.items() if share is self]
            for number in mine:
                del pool._arriving_in_place[number]
            pool._swarm.gone(self)
            self.tell()
            pool.tell_all()

    def listen(self, listener: Callable[[], None], *, only_the_end: bool = False) -> None:
        with self._pool._lock:
            (self._end_listeners if only_the_end else self._listeners).add(listener)
            if self.is_over:
                listener()

    def forget(self, listener: Callable[[], None]) -> None:
        with self._pool._lock:
            self._listeners.discard(listener)
            self._end_listeners.discard(listener)

    def tell(self) -> None:
        """Wakes the session where it waits for something to do. For whoever holds the lock of the pool."""
        self._changed.notify_all()
        for listener in self._listeners:
            listener()
        if self.is_complete:
            for listener in self._end_listeners:
                listener()
