"""The order in which a client asks sources, and who is asked again. No I/O.

Configured sources come first, then whom they name: other ranks of their own instance, of which they know, and
replicas, which have taken their weights and said so. A replica is believed only if its contents are those of the source
that named it, and it is asked once. Thread-safe: sources name others while this client waits for its turn.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from vllm_ascend.model_loader.netloader.endpoint import Endpoint

TRIES: Final = 3
"""How often a source may fail in the middle before it is given up."""
REFERRALS_FOLLOWED: Final = 64
"""Endpoints that are tried because others named them: so many ranks, and so many replicas."""


@dataclass(frozen=True)
class Contents:
    """What somebody else is said to hold: its root digest, and the fingerprint of the checkpoint that it comes from."""

    root: str
    fingerprint: str


@dataclass(frozen=True)
class Candidate:
    """One that may be asked. `contents` are those that `referrer` promised; whoever is configured has promised none."""

    endpoint: Endpoint
    referrer: Endpoint | None = None
    contents: Contents | None = None

    @property
    def is_replica(self) -> bool:
        """Whether it is trusted with nothing but time."""
        return self.contents is not None


class Route:
    """Who is asked next. `configured` is in order; `slow_at_last` lets those that are too slow be asked in the end."""

    def __init__(self, configured: Sequence[Endpoint], *, slow_at_last: bool = False) -> None:
        self._lock = threading.Lock()
        self._known = set(configured)
        self._next = deque(map(Candidate, configured))
        self._later: list[Candidate] = []
        self._slow: list[Candidate] = []
        self._slow_at_last = slow_at_last
        self._failures: Counter[Endpoint] = Counter()
        self._referrals: Counter[bool] = Counter()
        """How many endpoints were added, replicas or not."""

    def next(self) -> Candidate | None:
        """The next of this round, None at its end."""
        with self._lock:
            return self._next.popleft() if self._next else None

    @property
    def has_next(self) -> bool:
        return bool(self._next)

    @property
    def has_later(self) -> bool:
        """Whether another round is worth a pause."""
        return bool(self._later)

    def begin_round(self) -> bool:
        """Lets those be asked again that are worth it; whether there are any."""
        with self._lock:
            if not self._later and self._slow_at_last:
                self._later, self._slow = self._slow, []
            self._next.extend(self._later)
            self._later = []
            return bool(self._next)

    def failed(self, candidate: Candidate) -> None:
        """It went away in the middle: worth another try, unless that has happened too often."""
        with self._lock:
            self._failures[candidate.endpoint] += 1
            if not candidate.is_replica and self._failures[candidate.endpoint] < TRIES:
                self._later.append(candidate)

    def postponed(self, candidate: Candidate) -> None:
        """Others came first: worth another try, at a replica not too often."""
        with self._lock:
            self._failures[candidate.endpoint] += candidate.is_replica
            if self._failures[candidate.endpoint] < TRIES or not candidate.is_replica:
                self._later.append(candidate)

    def too_slow(self, candidate: Candidate) -> None:
        """It sends next to nothing: worth another try only in the end, and at a replica never."""
        with self._lock:
            if not candidate.is_replica:
                self._slow.append(candidate)

    def refer(self, candidate: Candidate, address: Endpoint, referrals: Sequence[str]) -> int:
        """Adds other ranks of the instance of `candidate`, reached at `address`; how many of them are new.

        The ranks of an instance know each other, so only one that is configured is believed.
        """
        if candidate.referrer is not None:
            return 0
        return self._add(Candidate(each, candidate.endpoint) for each in _endpoints(address, referrals))

    def name_replicas(
        self, candidate: Candidate, address: Endpoint, referrals: Sequence[str], contents: Contents
    ) -> int:
        """Adds those that have taken `contents` from `candidate`, reached at `address`; how many of them are new.

        A replica names nobody: it could send this client to any third party.
        """
        if not contents.root or candidate.is_replica:
            return 0
        endpoints = _endpoints(address, referrals)
        return self._add(Candidate(each, candidate.endpoint, contents) for each in endpoints)

    def forget_replicas(self) -> None:
        """None of them is asked any more."""
        with self._lock:
            self._next = deque(each for each in self._next if not each.is_replica)
            self._later = [each for each in self._later if not each.is_replica]

    def _add(self, candidates: Iterable[Candidate]) -> int:
        """Puts those that are new first, in their order."""
        new: list[Candidate] = []
        with self._lock:
            for candidate in candidates:
                kind = candidate.is_replica
                if candidate.endpoint not in self._known and self._referrals[kind] < REFERRALS_FOLLOWED:
                    self._known.add(candidate.endpoint)
                    self._referrals[kind] += 1
                    new.append(candidate)
            self._next.extendleft(reversed(new))
        return len(new)


def _endpoints(address: Endpoint, referrals: Sequence[str]) -> Iterator[Endpoint]:
    """The endpoints in `referrals`, those without a host on that of `address`; what is none is left out."""
    own_host = str(address).rpartition(":")[0]
    for referral in referrals:
        with contextlib.suppress(ValueError):
            yield Endpoint.parse(own_host + referral if referral.startswith(":") else referral)
