"""Serving weights stays out of the way of serving requests: a limit on bytes per second, and other processors.

Threads that serve do not get a lower priority. They need Python's interpreter lock for a moment after each system call,
and CPython makes whoever holds it wait until the thread that asked has run: with a low priority that is when the
processor is free of everybody else, and until then inference would stand still.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from typing import Final

_PIECES_PER_SECOND: Final = 20
_LARGEST_PIECE: Final = 1 << 20
_CREDIT_SECONDS: Final = 0.05


class Pacer:
    """Keeps all who share it below `rate` bytes per second together; None is no limit. Thread-safe.

    Each reserves the time that its bytes take on a line of that rate, and waits until that time begins. A little time
    that was not used may be made up for, since sleeping always takes somewhat longer than asked.
    """

    def __init__(
        self,
        rate: int | None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.rate = rate
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        self._free_from = clock()

    @property
    def piece(self) -> int | None:
        """Bytes to send at a time so that the flow is even; None without a limit."""
        rate = self.rate
        return None if rate is None else min(_LARGEST_PIECE, max(rate // _PIECES_PER_SECOND, 4096))

    def wait_for(self, nbytes: int, given_up: threading.Event | None = None) -> None:
        """Returns when `nbytes` may be sent, or nobody wants to send them any more."""
        rate = self.rate  # which another thread may change
        if rate is None:
            return
        with self._lock:
            now = self._clock()
            begin = max(self._free_from, now - _CREDIT_SECONDS)
            self._free_from = begin + nbytes / rate
        if begin > now:
            pause = self._sleep if given_up is None else given_up.wait
            pause(begin - now)


def give_way() -> None:
    """Lets this thread run beside the processors that compute, too.

    vLLM binds the threads of a worker to the processors that compute, and threads made later inherit that. Those that
    serve may run on all that the parent process may use, too.
    """
    with contextlib.suppress(OSError):  # a sandbox may forbid it; then it stays where it is
        os.sched_setaffinity(0, os.sched_getaffinity(0) | os.sched_getaffinity(os.getppid()))
