"""Chunks on their way in: how many bytes have come, and whether a chunk is the one of its digest."""

from __future__ import annotations

import threading
from collections.abc import Callable

from vllm_ascend.model_loader.netloader.transport import digests
from vllm_ascend.model_loader.netloader.transport.chunks.inventory import Chunk
from vllm_ascend.model_loader.netloader.weights.memory import Landing


class Progress:
    """How many bytes of the weights a client has, told to a progress bar as differences.

    The figure falls where bytes turn out to be damaged or to be other ones than the next source holds. Thread-safe.
    """

    def __init__(self, show: Callable[[int], None]) -> None:
        """`show` is called with each difference, by one thread at a time."""
        self._show = show
        self._nbytes = 0
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        """Notes that `nbytes` more bytes have come, or fewer where it is negative."""
        with self._lock:
            self._nbytes += nbytes
            self._show(nbytes)

    def set(self, nbytes: int) -> None:
        """Notes that the client has `nbytes` bytes in all."""
        with self._lock:
            difference, self._nbytes = nbytes - self._nbytes, nbytes
            self._show(difference)


class Arrival:
    """One chunk on its way in, digested as its bytes land. For one thread."""

    def __init__(self, chunk: Chunk, landing: Landing, expected: bytes | None, advanced: Callable[[int], None]) -> None:
        """`expected` is the digest of the chunk, or None where it is not verified; `advanced` hears of its bytes."""
        self.chunk = chunk
        self.landing = landing
        self.expected = expected
        self.nbytes = 0
        """How many bytes of the chunk have landed."""
        self._advanced = advanced
        self._digest = digests.start() if expected is not None else None
        self._digested = 0

    def advance(self, nbytes: int) -> None:
        """Notes that the next `nbytes` bytes of the chunk have landed. Raises SourceTooSlow where its source is."""
        self.nbytes += nbytes
        self._advanced(nbytes)
        if self.nbytes - self._digested >= digests.PIECE_BYTES:
            self._catch_up()

    def passes(self) -> bool:
        """Whether all bytes of the chunk are there and have the digest that is expected."""
        self._catch_up()
        if self.nbytes != self.chunk.length:
            return False
        return self._digest is None or self._digest.digest() == self.expected

    def _catch_up(self) -> None:
        """Digests what has landed since the last time, while the processor's cache still has it."""
        if self._digest is not None and self.nbytes > self._digested:
            self._digest.update(self.landing.arrived(self._digested, self.nbytes))
        self._digested = self.nbytes
