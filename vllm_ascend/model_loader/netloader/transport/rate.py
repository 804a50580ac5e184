"""How fast bytes go.

By its `Rate` a server decides whether a client is so slow that others come first; by a `LeastRate` a client decides
whether to leave a source.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Final

from vllm_ascend.model_loader.netloader.errors import SourceTooSlow

RATE_SECONDS: Final = 5.0
"""Seconds over which a server measures how fast a client has been lately."""


class Rate:
    """How fast one client takes bytes.

    It is not locked, so threads may lose an update to one another; no decision depends on a single update.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._created = self._begin = self._last = clock()
        self._bytes = self._total = 0
        self._before = math.inf

    def note(self, nbytes: int) -> None:
        """Notes that `nbytes` bytes have just gone."""
        self._last = now = self._clock()
        self._bytes += nbytes
        self._total += nbytes
        if now - self._begin >= RATE_SECONDS:
            self._before = self._bytes / (now - self._begin)
            self._begin, self._bytes = now, 0

    def idle_seconds(self) -> float:
        """Seconds since bytes last went, or since the beginning."""
        return self._clock() - self._last

    def lately(self) -> float:
        """Bytes per second over the last RATE_SECONDS or a little longer; infinite until so much time has passed."""
        # What filled the buffers at once before a client fell silent says nothing about the client.
        if self.idle_seconds() >= RATE_SECONDS:
            return 0.0
        elapsed = self._clock() - self._begin
        return self._before if elapsed < RATE_SECONDS else self._bytes / elapsed

    def overall(self) -> float:
        """Bytes per second on average since the beginning."""
        return self._total / max(self._clock() - self._created, 1e-3)


class LeastRate:
    """The rate below which a client leaves a source: `rate` bytes per second, measured over `window` seconds.

    `applies` says whether a source that is too slow is to be left; it is asked whenever one is.
    """

    def __init__(
        self,
        rate: float,
        window: float,
        applies: Callable[[], bool] = lambda: True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rate = rate
        self._window = window
        self._applies = applies
        self._clock = clock
        self._begin = clock()
        self._bytes = 0

    def begin(self) -> None:
        """Begins a window, because until now nothing was to come."""
        self._begin, self._bytes = self._clock(), 0

    def note(self, nbytes: int) -> None:
        """Notes that `nbytes` bytes have come. Raises SourceTooSlow at the end of a window in which too few came.

        For one thread at a time.
        """
        self._bytes += nbytes
        elapsed = self._clock() - self._begin
        if elapsed < self._window:
            return
        if self._bytes < self._rate * elapsed and self._applies():
            raise SourceTooSlow(
                f"it sent {self._bytes} bytes in {elapsed:.0f} s: less than MIN_BANDWIDTH, {self._rate:g} bytes per "
                "second, while there is another way to the weights"
            )
        self._begin, self._bytes = self._clock(), 0
