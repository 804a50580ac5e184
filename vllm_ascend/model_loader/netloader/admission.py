"""Who is let in, and when: `Turns` for those who take weights, `Guard` for those who fail to show that they may.

`LogLimit` keeps those who are not let in from filling the log.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Self, TypeVar

_Value = TypeVar("_Value")

_FREE_FAILURES: Final = 3
"""Failures of an address before it has to wait: a wrong file is corrected by trying again."""
_LONGEST_BLOCK: Final = 60.0
_MOST_DOUBLINGS: Final = 6
"""Of one second: enough for the longest block, and no overflow however often an address fails."""
_LOG_INTERVAL: Final = 60.0
_REMEMBERED: Final = 1024
"""Addresses; the one that failed least recently is forgotten first."""


class Turns:
    """Lets `limit` sessions at a time transfer, the others in the order in which they came, hosts taking turns.

    One that is slow does not count: whoever takes next to nothing delays nobody. Thread-safe.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._changed = threading.Condition()
        self._waiting: list[Turn] = []
        self._taken: list[Turn] = []

    def set_limit(self, limit: int) -> None:
        with self._changed:
            self._limit = limit
            self._changed.notify_all()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def queue(self, host: str) -> Turn:
        """A place at the end, to be left by `with`."""
        turn = Turn(self, host)
        with self._changed:
            self._waiting.append(turn)
        return turn

    def _has_come(self, turn: Turn) -> bool:
        if turn in self._taken:
            return True
        free = self._limit - sum(not taken.is_slow() for taken in self._taken)
        return self._in_order().index(turn) < free

    def _in_order(self) -> list[Turn]:
        """The waiting, those first whose host has the fewest turns now: one host that queues often delays itself."""
        turns_of = Counter(taken.host for taken in self._taken)
        return sorted(self._waiting, key=lambda turn: turns_of[turn.host])

    def wait(self, turn: Turn, timeout: float) -> bool:
        """Whether its turn has come, within `timeout` seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._has_come(turn), timeout):
                return False
            if turn in self._waiting:
                self._waiting.remove(turn)
                self._taken.append(turn)
            return True

    def ahead_of(self, turn: Turn) -> int:
        """How many will have their turn before this one."""
        with self._changed:
            return self._in_order().index(turn) if turn in self._waiting else 0

    def leave(self, turn: Turn) -> None:
        with self._changed:
            for turns in (self._waiting, self._taken):
                with contextlib.suppress(ValueError):
                    turns.remove(turn)
            self._changed.notify_all()


@dataclass(eq=False)
class Turn:
    """A place among the waiting, then among those who transfer. `is_slow` may be set once it is known."""

    _turns: Turns
    host: str
    is_slow: Callable[[], bool] = field(default=lambda: False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._turns.leave(self)

    def wait(self, timeout: float) -> bool:
        return self._turns.wait(self, timeout)

    @property
    def ahead(self) -> int:
        return self._turns.ahead_of(self)


@dataclass
class _Record:
    failures: int = 0
    blocked_until: float = 0.0


class LogLimit:
    """Says of an address whether to log what it does: once a minute. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._again: OrderedDict[str, float] = OrderedDict()

    def admits(self, host: str) -> bool:
        with self._lock:
            now = self._clock()
            if now < self._again.get(host, now):
                return False
            _remember(self._again, host, now + _LOG_INTERVAL)
            return True


class Guard:
    """Slows down addresses that fail to authenticate: each failure doubles the time that they are not listened to."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._log_limit = LogLimit(clock)
        self._records: OrderedDict[str, _Record] = OrderedDict()

    def admits(self, host: str) -> bool:
        with self._lock:
            record = self._records.get(host)
            return record is None or self._clock() >= record.blocked_until

    def failed(self, host: str) -> bool:
        """Notes a failure; whether it is to be logged, which is once a minute for an address."""
        with self._lock:
            record = self._records.get(host) or _Record()
            _remember(self._records, host, record)
            record.failures += 1
            if record.failures > _FREE_FAILURES:
                doublings = min(record.failures - _FREE_FAILURES - 1, _MOST_DOUBLINGS)
                record.blocked_until = self._clock() + min(2.0**doublings, _LONGEST_BLOCK)
        return self._log_limit.admits(host)

    def succeeded(self, host: str) -> None:
        with self._lock:
            self._records.pop(host, None)


def _remember(by_host: OrderedDict[str, _Value], host: str, value: _Value) -> None:
    by_host.pop(host, None)
    by_host[host] = value
    if len(by_host) > _REMEMBERED:
        by_host.popitem(last=False)
