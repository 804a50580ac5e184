"""How fast bytes go: what a server decides by whether a client is slow, and a client whether to leave a source."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Final

from vllm_ascend.model_loader.netloader.errors import SourceTooSlow

RATE_SECONDS: Final = 5.0


class Rate:
    """How fast bytes go. Threads may lose an update to one another: nothing is decided by a single one."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._created = self._begin = self._last = clock()
        self._bytes = self._total = 0
        self._before = math.inf

    def note(self, nbytes: int) -> None:
        self._last = now = self._clock()
        self._bytes += nbytes
        self._total += nbytes
        if now - self._begin >= RATE_SECONDS:
            self._before = self._bytes / (now - self._begin)
            self._begin, self._bytes = now, 0

    def idle_seconds(self) -> float:
        return self._clock() - self._last

    def lately(self) -> float:
        """Bytes per second over the last RATE_SECONDS or more; infinite before that."""
        if self.idle_seconds() >= RATE_SECONDS:  # what filled the buffers at once before does not count
            return 0.0
        elapsed = self._clock() - self._begin
        return self._before if elapsed < RATE_SECONDS else self._bytes / elapsed

    def overall(self) -> float:
        """Bytes per second since the beginning."""
        return self._total / max(self._clock() - self._created, 1e-3)


class LeastRate:
    """Gives up a source by SourceTooSlow when less than `rate` bytes per second have come over `window` seconds.

    It is given up only while `applies` says so.
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

    def note(self, nbytes: int) -> None:
        """Notes that so many bytes have come. Raises SourceTooSlow. For one thread at a time."""
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
