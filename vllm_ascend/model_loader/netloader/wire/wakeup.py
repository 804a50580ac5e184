"""An event for which a thread waits together with a socket: some other thread has something for it."""

from __future__ import annotations

import contextlib
import os
import select
import threading


class Wakeup:
    """Is set by any thread and cleared by the one that waits. Whoever made it closes it."""

    def __init__(self) -> None:
        """Raises OSError if this process has no descriptor left."""
        self._descriptor = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._lock = threading.Lock()
        self._is_open = True

    def set(self) -> None:
        """Wakes the thread that waits, now or when it waits next. Does nothing after `close`."""
        with self._lock:
            if self._is_open:
                os.eventfd_write(self._descriptor, 1)

    def wait(self) -> None:
        """Returns when it is set."""
        poller = select.poll()
        poller.register(self._descriptor, select.POLLIN)
        poller.poll()

    def clear(self) -> None:
        """Takes back all that was set so far."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._descriptor)

    def fileno(self) -> int:
        """The descriptor that can be read from while it is set."""
        return self._descriptor

    def close(self) -> None:
        """Gives up the descriptor. Idempotent."""
        with self._lock:
            if self._is_open:
                self._is_open = False
                os.close(self._descriptor)
