"""How long each phase of a fetch takes, where several sessions are under way at once: the furthest one counts."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Hashable, Iterator, MutableMapping
from typing import Final

ORDER: Final = ("connect", "join", "allocate", "transfer", "verify")
"""The phases of a session, in their order."""


class Stages:
    """Adds to `seconds` (by phase) what passes while any session is in one. Thread-safe."""

    def __init__(self, seconds: MutableMapping[str, float], clock: Callable[[], float] = time.perf_counter) -> None:
        self._seconds = seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._phases: dict[Hashable, list[str]] = {}
        self._since = clock()

    @contextlib.contextmanager
    def __call__(self, session: Hashable, phase: str) -> Iterator[None]:
        """A scope within which `session` is in `phase`, unless an inner scope of the same session says otherwise."""
        with self._lock:
            self._account()
            self._seconds.setdefault(phase, 0.0)
            self._phases.setdefault(session, []).append(phase)
        try:
            yield
        finally:
            with self._lock:
                self._account()
                phases = self._phases[session]
                phases.pop()
                if not phases:
                    del self._phases[session]

    def _account(self) -> None:
        now = self._clock()
        if self._phases:
            furthest = max((phases[-1] for phases in self._phases.values()), key=ORDER.index)
            self._seconds[furthest] += now - self._since
        self._since = now
