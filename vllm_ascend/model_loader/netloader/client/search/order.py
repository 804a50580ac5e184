"""In which order a client asks sources, and who is asked again: a value without I/O, threads or a clock of its own.

Whoever drives it takes the next step (`next`), does it, and says what came of it: the source failed, is busy, or refers
to others. A candidate of which nothing is said was asked for the last time.

Configured sources are asked in their order, and so are the other ranks of their own instance, of which they know.
Replicas are asked beside them (`replicas`).

Sources that failed in the middle are asked again in the next round, which begins after a pause; those that are too slow
are asked again only where there is no disk to fall back to, when nobody else is left.
"""

from __future__ import annotations

import random
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from vllm_ascend.model_loader.netloader.client.candidates import Candidate, endpoints_in
from vllm_ascend.model_loader.netloader.client.search.replicas import ReplicaOrder
from vllm_ascend.model_loader.netloader.client.search.steps import Ask, AwaitTurn, LeaveQueues, Pause, Step
from vllm_ascend.model_loader.netloader.client.swarm.peering import SESSIONS
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import (
    SourceError,
    SourceFailed,
    SourceTooSlow,
    TransportError,
)

TRIES: Final = 3
"""How often a source may fail in the middle of a session before it is given up."""
REFERRALS_FOLLOWED: Final = 64
"""How many ranks are asked because others named them."""


class SourceOrder:
    """Whom a client asks next.

    Thread-safe, since sources name others while the client waits for its turn. Nothing supposes that only one source is
    asked at a time.
    """

    def __init__(
        self,
        configured: Sequence[Endpoint],
        transports: Sequence[str],
        pauses: Iterator[float],
        *,
        wait_timeout: float = 300.0,
        replica_seconds: float = 30.0,
        follows_replicas: bool = True,
        disk_remains: bool = True,
        peers: int = SESSIONS,
        chance: random.Random | None = None,
    ) -> None:
        """`configured` are the endpoints in their order and `transports` the names of all that may be offered.

        `pauses` gives the seconds before each further round. `wait_timeout` is how many seconds may be spent in queues,
        and `replica_seconds` how many replicas may waste, all together. `follows_replicas` says whether replicas are
        asked at all, `peers` how many of them at once at most, and `disk_remains` that there is another way if no
        source delivers. `chance` chooses among replicas.
        """
        self._transports = tuple(transports)
        self._pauses = pauses
        self._wait_left = wait_timeout
        self._disk_remains = disk_remains
        self.replicas = ReplicaOrder(
            configured, transports, seconds=replica_seconds, follows=follows_replicas, peers=peers, chance=chance
        )
        """Those that are asked beside the sources."""
        self._lock = threading.Lock()

        self._ready = deque(Ask(candidate, self._transports) for candidate in map(Candidate, configured))
        """Those to ask in this round."""
        self._queued: set[Candidate] = set()
        """Those in whose queue the client has a place."""
        self._later: list[Candidate] = []
        """Those to ask in the next round."""
        self._slow: list[Candidate] = []
        """Those to ask when nobody else is left."""

        self._round_due: float | None = None
        """Seconds of waiting after which the next round begins beside it; None where only a turn or news end it."""
        self._known = set(configured)
        self._failures: Counter[Endpoint] = Counter()
        self._ranks = 0
        """How many ranks others have named."""

    def next(self) -> Step | None:
        """What to do next. None where nobody is left to be asked, beside those who are being asked now."""
        with self._lock:
            if self._ready:
                return self._ready.popleft()
            if self._queued:
                return self._wait()
            if self._later:
                self._begin_round()
                return Pause(next(self._pauses))
            if self._slow and not self._disk_remains:
                self._later, self._slow = self._slow, []
                self._begin_round()
                return self._ready.popleft()
            return None

    def helper(self) -> Ask | None:
        """The next source to ask beside one that delivers. None where nobody is left in this round."""
        with self._lock:
            return self._ready.popleft() if self._ready else None

    def pause_beside_replicas(self) -> float | None:
        """Seconds until sources that failed are to be asked again (`begin_round`) while replicas deliver.

        None where there are none. Replicas may lack what only a source has.
        """
        with self._lock:
            return next(self._pauses) if self._later else None

    def begin_round(self) -> None:
        """Begins the next round at once."""
        with self._lock:
            self._begin_round()

    def waited(self, seconds: float) -> None:
        """Notes how long an `AwaitTurn` took."""
        with self._lock:
            self._wait_left -= seconds
            if self._round_due is not None and seconds >= self._round_due:
                self._begin_round()

    def failed(self, candidate: Candidate, error: SourceError | TransportError, untried: Sequence[str] = ()) -> None:
        """Notes that `candidate` did not deliver, and decides by the error whether it is asked again.

        `untried` are the transports that it was offered beside the one that failed: where only the transport is to
        blame, the candidate is asked at once with those.
        """
        if candidate.is_replica:
            self.replicas.failed(candidate, error, untried)
            return
        with self._lock:
            match error:
                case SourceTooSlow():
                    self._slow.append(candidate)
                case SourceFailed():
                    self._failures[candidate.endpoint] += 1
                    if self._failures[candidate.endpoint] < TRIES:
                        self._later.append(candidate)
                case TransportError() if untried:
                    self._ready.appendleft(Ask(candidate, tuple(untried)))

    def busy(self, candidate: Candidate) -> bool:
        """Notes that others come first at `candidate`. Whether the client should keep its place in that queue.

        At a replica it does not.
        """
        if candidate.is_replica:
            self.replicas.busy(candidate)
            return False
        with self._lock:
            self._queued.add(candidate)
            return True

    def postponed(self, candidate: Candidate) -> None:
        """Notes that the turn at `candidate` was not used for the sake of another: it is asked again in the next round.

        A source may be postponed without end.
        """
        with self._lock:
            self._queued.discard(candidate)
            self._later.append(candidate)

    def retry(self, candidate: Candidate) -> None:
        """Notes that what kept `candidate` from delivering has been removed: it comes next."""
        with self._lock:
            self._ready.appendleft(Ask(candidate, self._transports))

    def left_queue(self, candidate: Candidate) -> None:
        """Notes that the client's turn at `candidate` is taken, or that its place there is lost."""
        with self._lock:
            self._queued.discard(candidate)

    def referred(self, candidate: Candidate, address: Endpoint, referrals: Sequence[str]) -> bool:
        """Notes that `candidate`, reached at `address`, has named other ranks of its instance. Whether it is believed.

        The ranks of an instance know each other, so only one that is configured is believed.
        """
        if candidate.referrer is not None or candidate.is_replica or not referrals:
            return False
        self._add(Candidate(each, candidate.endpoint) for each in endpoints_in(referrals, address))
        return True

    def may_leave(self, candidate: Candidate) -> bool:
        """Whether there is another way to the weights than `candidate`, which is being asked."""
        others = self._ready or self._queued or self._later
        return candidate.is_replica or self._disk_remains or bool(others)

    def _wait(self) -> Step:
        if self._wait_left <= 0:
            self._queued.clear()
            return LeaveQueues()
        self._round_due = next(self._pauses) if self._later else None
        return AwaitTurn(self._wait_left if self._round_due is None else min(self._round_due, self._wait_left))

    def _begin_round(self) -> None:
        self._ready.extend(Ask(candidate, self._transports) for candidate in self._later)
        self._later = []

    def _add(self, candidates: Iterable[Candidate]) -> bool:
        """Puts those that are new first, in their order; whether there are any."""
        new: list[Ask] = []
        with self._lock:
            for candidate in candidates:
                if candidate.endpoint not in self._known and self._ranks < REFERRALS_FOLLOWED:
                    self._known.add(candidate.endpoint)
                    self._ranks += 1
                    new.append(Ask(candidate, self._transports))
            self._ready.extendleft(reversed(new))
        return bool(new)
