"""Who moves bytes, and who waits for that.

A server sends to a few clients at a time, so that the first ones finish, and become sources, sooner. That must not
allow those few to keep all others out. So the turns that a host has beyond its share do not count while others wait,
and neither does the turn of a client that takes far less than its share of what the server has been seen to send. If
there are so many slow clients that nobody else could be let in, the slowest one is ended for a host that has no turn.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, Protocol, Self

from vllm_ascend.model_loader.netloader.server.admission.hosts import network_of

SLOW_SHARE: Final = 4
"""A client is slow if it takes less than this fraction (one in so many) of its share of what the server can send."""
IN_PARTS: Final = 2
"""So many clients count as one while they take only parts here, and the rest from others."""
LEAST_CAPACITY: Final = 32 << 20
"""Bytes per second that every server is assumed to be able to send until it has been seen to send more."""
OVERCOMMITMENT: Final = 4
"""At most so many times the limit have a turn at once, however slow they are, because they share one line. Beyond that,
the slowest one makes room for a host that has none."""
_CAPACITY_HALVES: Final = 20.0
"""Seconds after which only half of the rate that the server has been seen to send is still taken for granted."""


class Meter(Protocol):
    """How fast a client takes bytes, in bytes per second."""

    def lately(self) -> float:
        """The rate over the last few seconds; infinite as long as it cannot be told."""

    def overall(self) -> float:
        """The rate since the client began."""


@dataclass(eq=False)
class Turn:
    """A client's place among those that wait, and then among those that move bytes.

    As a context manager it gives up its place at the end. `meter` and `end` are set once there is something to measure
    and something to end. `end` may not block.
    """

    _turns: Turns
    host: str
    meter: Meter | None = None
    end: Callable[[], None] | None = None
    is_ended: bool = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._turns.leave(self)


class _Occupancy:
    """Counts turns by host. There is room for `limit`; what a host has beyond `share` is in nobody else's way."""

    def __init__(self, turns: Iterable[Turn], share: int, limit: int) -> None:
        self._by_host = Counter(turn.host for turn in turns)
        self._share = share
        self._limit = limit
        self._all = self._by_host.total()
        self._within_shares = sum(min(count, share) for count in self._by_host.values())

    @property
    def is_full(self) -> bool:
        """Whether there is no room for any host."""
        return self._all >= self._limit and self._within_shares >= self._limit

    def has_room_for(self, host: str) -> bool:
        below_share = self._by_host[host] < self._share and self._within_shares < self._limit
        return below_share or self._all < self._limit

    def add(self, host: str) -> None:
        self._within_shares += self._by_host[host] < self._share
        self._by_host[host] += 1
        self._all += 1

    def remove(self, host: str) -> None:
        self._by_host[host] -= 1
        self._within_shares -= self._by_host[host] < self._share
        self._all -= 1


class Turns:
    """Lets about `limit` clients move bytes at a time. Hosts take turns; the clients of one host keep their order.

    `max_bandwidth` is in bytes per second, None for no limit. Nobody waits in here: `grant` says whose turn has come.
    It is to be asked when `on_free` is called, and now and then besides, because nothing tells when a client becomes
    slow. Thread-safe.
    """

    def __init__(
        self, limit: int, max_bandwidth: int | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limit = limit
        self._max_bandwidth = max_bandwidth
        self._clock = clock
        self._lock = threading.Lock()
        self._waiting: dict[Turn, None] = {}
        self._waiting_hosts: Counter[str] = Counter()
        self._taken: dict[Turn, None] = {}
        self._order: list[Turn] | None = None
        self._seen, self._seen_at = 0.0, clock()
        self.on_free: Callable[[], None] = lambda: None

    def configure(self, limit: int, max_bandwidth: int | None) -> None:
        """Replaces both limits. Those who have a turn keep it."""
        with self._lock:
            self._limit, self._max_bandwidth = limit, max_bandwidth
        self.on_free()

    @property
    def waiting(self) -> int:
        """How many clients wait for a turn."""
        return len(self._waiting)

    @property
    def taken(self) -> int:
        """How many clients have a turn."""
        return len(self._taken)

    def take(self, address: str, *, in_parts: bool = False) -> Turn | None:
        """A turn at once for a client at `address`, if there is one left and nobody waits for it.

        `in_parts` says that it will take much of what it wants from others, because here is not all of it yet.
        """
        with self._lock:
            if self._waiting or len(self._taken) >= self._limit * (IN_PARTS if in_parts else 1):
                return None
            turn = Turn(self, network_of(address))
            self._taken[turn] = None
            return turn

    def queue(self, address: str) -> Turn:
        """A place among those that wait, for a client at `address`."""
        with self._lock:
            turn = Turn(self, network_of(address))
            self._waiting[turn] = None
            self._waiting_hosts[turn.host] += 1
            self._order = None
            return turn

    def grant(self) -> list[Turn]:
        """Those of the waiting who have a turn from now on. Slow clients may be ended to make room for them."""
        with self._lock:
            if not self._waiting:
                return []
            granted, ended = self._choose()
            for turn in granted:
                self._forget_waiting(turn)
                self._taken[turn] = None
        for end in ended:
            end()
        return granted

    def _choose(self) -> tuple[list[Turn], list[Callable[[], None]]]:
        """Whose turn has come, and how those are ended who have to make room."""
        slow = self._capacity() / self._limit / SLOW_SHARE
        fast = [turn for turn in self._taken if turn.meter is None or turn.meter.lately() >= slow]
        share = max(1, self._limit // len({turn.host for turn in fast} | self._waiting_hosts.keys()))

        counting = _Occupancy(fast, share, self._limit)
        every = _Occupancy((turn for turn in self._taken if not turn.is_ended), share, OVERCOMMITMENT * self._limit)
        served = {turn.host for turn in self._taken}
        slowest = self._slowest(slow)

        granted: list[Turn] = []
        ended: list[Callable[[], None]] = []
        for turn in self._in_order():
            if counting.is_full or (every.is_full and not slowest):
                break
            if not counting.has_room_for(turn.host):
                continue

            if not every.has_room_for(turn.host) and turn.host not in served and slowest:
                victim, end = slowest.popleft()
                victim.is_ended = True
                ended.append(end)
                every.remove(victim.host)

            if every.has_room_for(turn.host):
                granted.append(turn)
                counting.add(turn.host)
                every.add(turn.host)
                served.add(turn.host)
        return granted, ended

    def _slowest(self, slow: float) -> deque[tuple[Turn, Callable[[], None]]]:
        """The turns below the rate `slow` that can be ended, and how; the slowest first, then the oldest."""
        rates = [
            (turn.meter.lately(), turn, turn.end)
            for turn in self._taken
            if turn.meter is not None and turn.end is not None and not turn.is_ended
        ]
        slowest = sorted((each for each in rates if each[0] < slow), key=lambda each: each[0])
        return deque((turn, end) for _, turn, end in slowest)

    def in_order(self) -> list[Turn]:
        """Those who wait, in the order in which their turns will come. It is made once for each change."""
        with self._lock:
            return self._in_order()

    def leave(self, turn: Turn) -> None:
        """Gives up a turn, or a place among those who wait. Idempotent."""
        with self._lock:
            if turn in self._waiting:
                self._forget_waiting(turn)
            elif turn in self._taken:
                if turn.meter is not None:
                    self._note_sent(turn.meter.overall())
                del self._taken[turn]
                self._order = None
            turn.meter = turn.end = None  # they keep the weights alive, and a turn may live longer
        self.on_free()

    def _forget_waiting(self, turn: Turn) -> None:
        del self._waiting[turn]
        self._waiting_hosts[turn.host] -= 1
        if not self._waiting_hosts[turn.host]:
            del self._waiting_hosts[turn.host]
        self._order = None

    def _in_order(self) -> list[Turn]:
        if self._order is None:
            self._order = arrange(self._waiting, self._taken)
        return self._order

    def _capacity(self) -> float:
        """Bytes per second that the server can send, as far as it is allowed to and has been seen to of late."""
        rates = [turn.meter.lately() for turn in self._taken if turn.meter is not None]
        self._note_sent(sum(rate for rate in rates if rate < math.inf))
        return min(max(self._seen, LEAST_CAPACITY), self._max_bandwidth or math.inf)

    def _note_sent(self, rate: float) -> None:
        now = self._clock()
        remembered = self._seen * 0.5 ** ((now - self._seen_at) / _CAPACITY_HALVES)
        self._seen, self._seen_at = max(rate, remembered), now


def arrange(waiting: Iterable[Turn], taken: Iterable[Turn]) -> list[Turn]:
    """`waiting`, which is in the order of arrival, in the order in which their turns come.

    The next of each host comes before any host's one after that. Turns that are `taken` count as earlier ones.
    """
    before = Counter(turn.host for turn in taken)
    places: list[tuple[int, int, Turn]] = []
    for arrival, turn in enumerate(waiting):
        places.append((before[turn.host], arrival, turn))
        before[turn.host] += 1
    return [turn for _, _, turn in sorted(places, key=lambda place: place[:2])]
