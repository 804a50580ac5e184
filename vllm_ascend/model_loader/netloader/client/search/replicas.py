"""Which replicas a client asks, beside its sources: a value without I/O, threads or a clock of its own.

Replicas are others that have the same weights or load them, as sources and other replicas say. They are asked several
at once, and which of them is up to the `Peering`. A replica is trusted with nothing but time. It is believed only if
its contents are those that a source promised, it is never asked again once it has failed, and all replicas together may
waste only so many seconds.
"""

from __future__ import annotations

import random
import threading
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Final

from vllm_ascend.model_loader.netloader.client.candidates import Candidate, Contents, endpoints_in
from vllm_ascend.model_loader.netloader.client.search.steps import Ask
from vllm_ascend.model_loader.netloader.client.swarm.peering import DEGREE, SESSIONS, Peering
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import SourceError, TransportError

TRIES: Final = 3
"""How often a replica may be busy before it is asked no more."""
EXCUSED_RATE: Final = 1 << 20
"""Bytes per second of chunks that have passed, at which the time that a replica takes is not wasted."""


class ReplicaOrder:
    """The replicas that a client knows. Thread-safe, since others are named while it does something else."""

    def __init__(
        self,
        configured: Sequence[Endpoint],
        transports: Sequence[str],
        *,
        seconds: float,
        follows: bool,
        peers: int = SESSIONS,
        chance: random.Random | None = None,
    ) -> None:
        """`configured` are sources and never count as replicas, and `transports` are the names of all that may be
        offered. `seconds` is how much time replicas may waste, all together; `follows` says whether they are asked at
        all, and `peers` how many at once at most. `chance` chooses among them.
        """
        self._configured = tuple(configured)
        self._transports = tuple(transports)
        self._seconds_left = seconds
        self._follows = follows
        self._chance = chance or random.Random()
        self._lock = threading.Lock()

        self._given_up: set[Endpoint] = set()
        self._root = ""
        """What they have to hold, as far as that is known."""
        self._peers = peers
        self._peering = self._new_peering()
        self._known: dict[Endpoint, Candidate] = {}
        """Those that the peering knows."""
        self._again: deque[Ask] = deque()
        """Those to ask by another transport."""
        self._busy: Counter[Endpoint] = Counter()

    def next(self) -> Ask | None:
        """A replica to ask now, beside all others. None where there is none, or where enough are being asked."""
        with self._lock:
            if not self._follows:
                return None
            if self._again:
                return self._again.popleft()
            endpoint = self._peering.choose()
            return None if endpoint is None else Ask(self._known[endpoint], self._transports)

    def named(self, by: Candidate, address: Endpoint, referrals: Sequence[str], contents: Contents) -> bool:
        """Notes that `by`, reached at `address`, has named others that have `contents` or load them.

        Returns whether any of them can be asked. Replicas name others too; whoever has named an endpoint, it has to
        have the contents that a source has promised.
        """
        with self._lock:
            if not self._wants(contents):
                return False
            known = self._peering.named(by.endpoint, endpoints_in(referrals, address))
            for each in known:
                self._known.setdefault(each, Candidate(each, by.endpoint, contents))
            return bool(known)

    def joined_here(self, endpoint: Endpoint, contents: Contents) -> bool:
        """Notes that a client of this process relays `contents` at `endpoint`. Whether it can be asked."""
        with self._lock:
            if not self._wants(contents) or not self._peering.joined_here(endpoint):
                return False
            self._known.setdefault(endpoint, Candidate(endpoint, endpoint, contents))
            return True

    def agreed(self, root: str) -> None:
        """Notes that the weights to load are those with the root digest `root`, and forgets who has others."""
        with self._lock:
            if root == self._root:
                return
            if self._root:
                self._known = {each: replica for each, replica in self._known.items() if _holds(replica, root)}
                self._peering = self._new_peering()
            self._root = root

    def failed(self, candidate: Candidate, error: SourceError | TransportError, untried: Sequence[str] = ()) -> None:
        """Notes that `candidate` did not deliver; with other transports, `untried`, it may."""
        with self._lock:
            self._peering.lost(candidate.endpoint)
            if isinstance(error, TransportError) and untried:
                self._again.append(Ask(candidate, tuple(untried)))
            else:
                self._given_up.add(candidate.endpoint)

    def busy(self, candidate: Candidate) -> None:
        """Notes that others come first at `candidate`: it is asked again if it is named again, a few times at most."""
        with self._lock:
            self._busy[candidate.endpoint] += 1
            self._peering.lost(candidate.endpoint, was_busy=self._busy[candidate.endpoint] < TRIES)

    def ended(self, candidate: Candidate) -> None:
        """Notes that a session with `candidate` is over, without a failure."""
        with self._lock:
            self._peering.lost(candidate.endpoint)

    def spent(self, seconds: float, nbytes: int) -> None:
        """Notes how long a session took, and how many bytes of passed chunks it brought.

        Replicas that have wasted too much time together are all forgotten.
        """
        with self._lock:
            self._seconds_left -= max(seconds - nbytes / EXCUSED_RATE, 0.0)
            if self._seconds_left < 0:
                self._follows = False

    def useless(self, seconds: Mapping[Endpoint, float]) -> Endpoint | None:
        """The replica that is to be left for another one, None where none is.

        `seconds` says for how long each of those that are being asked has had nothing that is missing.
        """
        with self._lock:
            return self._peering.to_leave(seconds)

    def follow_nobody(self) -> None:
        """Asks no replica any more."""
        with self._lock:
            self._follows = False

    def _new_peering(self) -> Peering[Endpoint]:
        return Peering(
            self._chance,
            itself=(*self._configured, *self._given_up),
            degree=min(DEGREE, self._peers),
            sessions=min(SESSIONS, self._peers),
        )

    def _wants(self, contents: Contents) -> bool:
        return self._follows and bool(contents.root) and self._root in ("", contents.root)


def _holds(replica: Candidate, root: str) -> bool:
    return replica.contents is not None and replica.contents.root == root
