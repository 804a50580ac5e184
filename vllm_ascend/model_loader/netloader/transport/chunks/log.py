"""Chunks in the order in which something happened to them: they passed, or were sent.

One thread adds, and others read on from where they were last. Nothing is ever taken back, so the log of what has passed
can be shown to clients while it grows.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

Listener = Callable[[], None]
"""Is called when there is something new, under a lock of the log: it may neither block nor use the log."""

_NOTHING: Final = ()


class ChunkLog:
    """Each of `count` chunks at most once, in the order in which they were added. Thread-safe."""

    def __init__(self, count: int) -> None:
        self._numbers: list[int] = []
        self._has = bytearray(count)
        self._is_closed = False
        self._lock = threading.Lock()
        self._listeners: set[Listener] = set()

    def __len__(self) -> int:
        return len(self._numbers)

    def __contains__(self, number: object) -> bool:
        return isinstance(number, int) and 0 <= number < len(self._has) and bool(self._has[number])

    @property
    def is_closed(self) -> bool:
        """Whether nothing is to be added any more, and what was added counts for good."""
        return self._is_closed

    def add(self, number: int) -> None:
        """Adds a chunk, unless it is there."""
        with self._lock:
            if self._has[number]:
                return
            self._has[number] = 1
            self._numbers.append(number)
            self._tell()

    def close(self) -> None:
        """Notes that nothing more will come. Idempotent."""
        with self._lock:
            self._is_closed = True
            self._tell()

    def since(self, position: int, limit: int) -> tuple[int, ...]:
        """Up to `limit` chunks from the one at `position` on, in their order."""
        return tuple(self._numbers[position : position + limit]) if position < len(self._numbers) else _NOTHING

    def listen(self, listener: Listener) -> None:
        """Calls `listener` whenever there is something new, until `forget`."""
        with self._lock:
            self._listeners.add(listener)

    def forget(self, listener: Listener) -> None:
        """Does not call `listener` any more. Idempotent."""
        with self._lock:
            self._listeners.discard(listener)

    def _tell(self) -> None:
        for listener in self._listeners:
            listener()
