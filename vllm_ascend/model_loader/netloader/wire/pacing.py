"""Serving weights stays out of the way of inference, by a limit on bytes per second and by more processors.

Threads that serve do not get a lower priority. After each system call they need Python's interpreter lock for a moment,
and in CPython whoever gives the lock away waits until the thread that asked for it has run. With a low priority, that
thread would run only when everybody else leaves it a processor, and inference would stand still until then.
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
"""Bytes."""
_SMALLEST_PIECE: Final = 4096
"""Bytes."""
_CREDIT_SECONDS: Final = 0.05
"""How much unused time may be made up for, since sleeping always takes somewhat longer than asked."""


class Pacer:
    """Keeps all who share it below `rate` bytes per second together; None means no limit. Thread-safe.

    Each of them reserves the time that its bytes take on a line of that rate, and waits until that time begins.
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
        """How many bytes to send at a time, so that the flow is even; None where there is no limit."""
        rate = self.rate
        return None if rate is None else min(_LARGEST_PIECE, max(rate // _PIECES_PER_SECOND, _SMALLEST_PIECE))

    def wait_for(self, nbytes: int, given_up: threading.Event | None = None) -> None:
        """Returns when `nbytes` may be sent, or once `given_up` is set."""
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
    """Lets this thread run on every processor that the parent process may use.

    vLLM binds the threads of a worker to the processors that compute, and threads that are made later inherit that.
    """
    with contextlib.suppress(OSError):  # a sandbox may forbid it, and then the thread stays where it is
        os.sched_setaffinity(0, os.sched_getaffinity(0) | os.sched_getaffinity(os.getppid()))
