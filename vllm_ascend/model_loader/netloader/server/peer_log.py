"""All that peers cause to be logged passes through here, and only so much of it gets into the log.

Whoever can open connections can cause lines, and most lines repeat words of the peer. So words are cut short and shown
without control characters. Lines of one kind have the same wording, apart from what is filled in; only a few of a kind
from one host, and a few more from all hosts together, are written in a minute. The others are counted, and the count is
logged with the next line of that kind, or after the minute.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from vllm_ascend.model_loader.netloader.errors import one_line
from vllm_ascend.model_loader.netloader.server.admission.hosts import network_of

INTERVAL: Final = 60.0
"""Seconds in which the lines below are counted."""
LINES_OF_A_HOST: Final = 5
"""Lines of one kind that one host may cause in an interval."""
LINES_OF_ALL: Final = 30
"""Lines of one kind that all hosts together may cause in an interval."""
WORDS: Final = 300
"""Characters of each text that is filled in; the rest is cut."""
_REMEMBERED: Final = 1024
"""Pairs of host and kind; the one whose interval began first is forgotten first."""


class _Line(NamedTuple):
    level: int
    text: str


@dataclass
class _Interval:
    begin: float
    lines: int = 0
    left_out: int = 0
    last_left_out: _Line | None = None


class PeerLog:
    """Writes to `logger` what peers cause. Thread-safe."""

    def __init__(self, logger: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._logger = logger
        self._clock = clock
        self._lock = threading.Lock()
        self._of_kind: dict[str, _Interval] = {}
        self._of_host: OrderedDict[tuple[str, str], _Interval] = OrderedDict()

    def say(self, level: int, address: str, message: str, *arguments: object, error: bool = False) -> None:
        """Logs a line, as `Logger.log` does, that the peer at `address` has caused.

        `error` adds the traceback of the exception that is being handled.
        """
        self.tell_left_out()
        if not self._logger.isEnabledFor(level):
            return
        text = message % tuple(_shown(argument) for argument in arguments)
        with self._lock:
            left_out = self._admit(address, message, _Line(level, text))
        if left_out is not None:
            self._logger.log(level, "%s%s", text, _and_more(left_out), exc_info=error)

    def tell_left_out(self, at_once: bool = False) -> None:
        """Logs how many lines were left out, of kinds that were quiet for an interval, or `at_once` of all kinds."""
        with self._lock:
            due = list(self._take_left_out(at_once))
        for line, count in due:
            self._logger.log(line.level, "%s%s", line.text, _and_more(count - 1))

    def _take_left_out(self, at_once: bool) -> Iterator[tuple[_Line, int]]:
        over = self._clock() - INTERVAL
        for interval in self._of_kind.values():
            if interval.last_left_out is not None and interval.left_out and (at_once or interval.begin <= over):
                yield interval.last_left_out, interval.left_out
                interval.left_out = 0

    def _admit(self, address: str, kind: str, line: _Line) -> int | None:
        """How many lines like this one were left out before it. None if it is to be left out, too."""
        now = self._clock()
        of_all = self._of_kind.setdefault(kind, _Interval(now))
        if now - of_all.begin >= INTERVAL:
            of_all.begin, of_all.lines = now, 0

        key = (network_of(address), kind)
        of_host = self._of_host.get(key)
        if of_host is None or now - of_host.begin >= INTERVAL:
            of_host = self._of_host[key] = _Interval(now)
            self._of_host.move_to_end(key)
            if len(self._of_host) > _REMEMBERED:
                self._of_host.popitem(last=False)

        if of_host.lines >= LINES_OF_A_HOST or of_all.lines >= LINES_OF_ALL:
            of_all.left_out += 1
            of_all.last_left_out = line
            return None

        of_host.lines += 1
        of_all.lines += 1
        left_out, of_all.left_out = of_all.left_out, 0
        return left_out


def _shown(argument: object) -> object:
    return argument if isinstance(argument, int | float) else one_line(str(argument), WORDS)


def _and_more(count: int) -> str:
    return f" (... and {count} more like it)" if count > 0 else ""
