"""In which order a client asks sources, and who is asked again: a value without I/O, threads or a clock of its own.

Whoever drives it takes the next step (`next`), does it, and says what came of it: the source failed, is busy, refers to
others, or has named others meanwhile. A candidate of which nothing is said was asked for the last time.

Configured sources are asked in their order, and so are the other ranks of their own instance, of which they know.

Replicas are others that have the same weights or load them, as sources and other replicas say. They are asked beside
the sources, several at once (`replica`), and which of them is up to the `Peering`. A replica is trusted with nothing
but time. It is believed only if its contents are those that a source promised, it is never asked again once it has
failed, and all replicas together may waste only so many seconds.

Sources that failed in the middle are asked again in the next round, which begins after a pause; those that are too slow
are asked again only where there is no disk to fall back to, when nobody else is left.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from vllm_ascend.model_loader.netloader.client.swarm.peering import Peering
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import SourceError, SourceFailed, SourceTooSlow, TransportError

TRIES: Final = 3
"""How often a source may fail in the middle of a session before it is given up."""
REFERRALS_FOLLOWED: Final = 64
"""How many ranks are asked because others named them."""
REPLICAS_REMEMBERED: Final = 4096
"""How many endpoints of replicas are remembered."""
EXCUSED_RATE: Final = 1 << 20
"""Bytes per second of chunks that have passed, at which the time that a replica takes is not wasted."""


@dataclass(frozen=True)
class Contents:
    """What a replica is said to hold: its root digest, and the fingerprint of the checkpoint that it comes from."""

    root: str
    fingerprint: str


@dataclass(frozen=True)
class Candidate:
    """One that may be asked for the weights.

    `referrer` is the source that named it, None for a configured one. `contents` are those that the referrer promised
    of a replica; a configured source and a rank have promised none.
    """

    endpoint: Endpoint
    referrer: Endpoint | None = None
    contents: Contents | None = None

    @property
    def is_replica(self) -> bool:
        """Whether it is trusted with nothing but time."""
        return self.contents is not None


@dataclass(frozen=True)
class Ask:
    """The step to ask `candidate` for the weights, by the transports of these names."""

    candidate: Candidate
    transports: tuple[str, ...]


@dataclass(frozen=True)
class AwaitTurn:
    """The step to wait up to `seconds` for a turn at a busy source, and to say how long it took (`waited`)."""

    seconds: float


@dataclass(frozen=True)
class LeaveQueues:
    """The step to give up all places in queues, because WAIT_TIMEOUT is used up."""


@dataclass(frozen=True)
class Pause:
    """The step to do nothing for `seconds`, before the next round."""

    seconds: float


Step = Ask | AwaitTurn | LeaveQueues | Pause


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
        chance: random.Random | None = None,
    ) -> None:
        """`configured` are the endpoints in their order and `transports` the names of all that may be offered.

        `pauses` gives the seconds before each further round. `wait_timeout` is how many seconds may be spent in queues,
        and `replica_seconds` how many replicas may waste, all together. `follows_replicas` says whether replicas are
        asked at all, and `disk_remains` that there is another way if no source delivers. `chance` chooses among
        replicas.
        """
        self._transports = tuple(transports)
        self._pauses = pauses
        self._wait_left = wait_timeout
        self._replica_seconds_left = replica_seconds
        self._follows_replicas = follows_replicas
        self._disk_remains = disk_remains
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
        self._peering: Peering[Endpoint] = Peering(chance or random.Random(), itself=configured)
        self._replicas: dict[Endpoint, Candidate] = {}
        """Those that the peering knows."""

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

    def replica(self) -> Ask | None:
        """A replica to ask now, beside all others. None where there is none, or where enough are being asked."""
        with self._lock:
            endpoint = self._peering.choose() if self._follows_replicas else None
            return None if endpoint is None else Ask(self._replicas[endpoint], self._transports)

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
        with self._lock:
            self._peering.lost(candidate.endpoint)
            match error:
                case SourceTooSlow() if not candidate.is_replica:
                    self._slow.append(candidate)
                case SourceFailed():
                    self._failures[candidate.endpoint] += 1
                    if not candidate.is_replica and self._failures[candidate.endpoint] < TRIES:
                        self._later.append(candidate)
                case TransportError() if untried:
                    self._ready.appendleft(Ask(candidate, tuple(untried)))

    def busy(self, candidate: Candidate) -> bool:
        """Notes that others come first at `candidate`. Whether the client should keep its place in that queue.

        At a replica it does not: it is asked again if it is named again, a few times at most.
        """
        with self._lock:
            if candidate.is_replica:
                self._failures[candidate.endpoint] += 1
                may_be_named_again = self._failures[candidate.endpoint] < TRIES
                self._peering.lost(candidate.endpoint, was_busy=may_be_named_again)
                return False
            self._queued.add(candidate)
            return True

    def postponed(self, candidate: Candidate) -> None:
        """Notes that the turn at `candidate` was not used for the sake of another: it is asked again in the next round.

        A source may be postponed without end.
        """
        with self._lock:
            self._queued.discard(candidate)
            self._later.append(candidate)

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
        self._add(Candidate(each, candidate.endpoint) for each in _endpoints(address, referrals))
        return True

    def replicas_named(
        self, candidate: Candidate, address: Endpoint, referrals: Sequence[str], contents: Contents
    ) -> bool:
        """Notes that `candidate`, reached at `address`, has named others that have `contents` or load them.

        Returns whether any of them can be asked. Replicas name others too; whoever has named an endpoint, it has to
        have the contents that a source has promised.
        """
        if not self._follows_replicas or not contents.root:
            return False
        endpoints = list(_endpoints(address, referrals))
        with self._lock:
            for each in endpoints:
                if len(self._replicas) < REPLICAS_REMEMBERED:
                    self._replicas.setdefault(each, Candidate(each, candidate.endpoint, contents))
            known = [each for each in endpoints if each in self._replicas]
            self._peering.named(candidate.endpoint, known)
            return bool(known)

    def joined_here(self, endpoint: Endpoint, contents: Contents) -> bool:
        """Notes that a client of this process relays `contents` at `endpoint`. Whether it can be asked."""
        with self._lock:
            if not self._follows_replicas or len(self._replicas) >= REPLICAS_REMEMBERED:
                return False
            self._replicas.setdefault(endpoint, Candidate(endpoint, endpoint, contents))
            self._peering.joined_here(endpoint)
            return True

    def useless(self, seconds: Mapping[Endpoint, float]) -> Endpoint | None:
        """The replica that is to be left for another one, None where none is.

        `seconds` says for how long each of those that are being asked has had nothing that is missing.
        """
        with self._lock:
            return self._peering.to_leave(seconds)

    def ended(self, candidate: Candidate) -> None:
        """Notes that a session with `candidate` is over, without a failure."""
        with self._lock:
            self._peering.lost(candidate.endpoint)

    def follow_nobody(self) -> None:
        """Asks no replica any more."""
        with self._lock:
            self._follows_replicas = False

    def spent(self, candidate: Candidate, seconds: float, nbytes: int) -> None:
        """Notes how long a session with `candidate` took, and how many bytes of passed chunks it brought.

        Replicas that have wasted too much time together are all forgotten.
        """
        if not candidate.is_replica:
            return
        with self._lock:
            self._replica_seconds_left -= max(seconds - nbytes / EXCUSED_RATE, 0.0)
            if self._replica_seconds_left < 0:
                self._follows_replicas = False

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


def _endpoints(address: Endpoint, referrals: Sequence[str]) -> Iterator[Endpoint]:
    """The endpoints in `referrals`. Those without a host are on that of `address`; what is no endpoint is left out."""
    own_host = str(address).rpartition(":")[0]
    for referral in referrals:
        with contextlib.suppress(ValueError):
            yield Endpoint.parse(own_host + referral if referral.startswith(":") else referral)
