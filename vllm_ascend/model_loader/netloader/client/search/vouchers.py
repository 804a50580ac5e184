"""Which contents the sources that are trusted have, by their own word. A replica's word counts for nothing."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Final

from vllm_ascend.model_loader.netloader.endpoint import Endpoint

FRESH_SECONDS: Final = 2.0
"""For how long the word of a source about its contents holds, which repeats it every second to those who wait."""


class Vouchers:
    """The root digests that trusted sources with complete weights have told. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._roots: dict[Endpoint, tuple[str, float]] = {}
        """The latest word of each, and when it was said to those who wait."""

    def holds(self, source: Endpoint, root: str) -> None:
        """Notes that `source` has contents with the root digest `root`, or had them a while ago."""
        with self._lock:
            self._roots[source] = root, -math.inf

    def holds_now(self, source: Endpoint, root: str) -> None:
        """Notes that `source` has just said that it has contents with the root digest `root`."""
        with self._lock:
            self._roots[source] = root, self._clock()

    def denies(self, source: Endpoint) -> None:
        """Notes that `source` may have other contents by now, or none."""
        with self._lock:
            self._roots.pop(source, None)

    def agree_on(self, root: str) -> bool:
        """Whether any of them had contents with the root digest `root` and has not denied it since, and none has
        others.
        """
        with self._lock:
            return {each for each, _ in self._roots.values()} == {root}

    def know_now(self, root: str) -> bool:
        """Whether any of them has said just now that it has contents with the root digest `root`."""
        with self._lock:
            fresh = self._clock() - FRESH_SECONDS
            return any(each == root and at > fresh for each, at in self._roots.values())
