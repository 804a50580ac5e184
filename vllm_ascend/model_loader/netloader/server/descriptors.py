"""The descriptors of this process: how many there may be, and how many of them peers may take.

A process that has none left cannot open a file or accept a request: that is the end of the engine, not only of serving
weights. So all connections of peers, and what their sessions open besides, come out of one share of the limit.
"""

from __future__ import annotations

import logging
import resource
import threading
from typing import Final

logger = logging.getLogger(__name__)

SHARE: Final = 2
"""Peers may take one in so many of the descriptors that the process may have."""
_MOST: Final = 65_535
"""To which the limit is raised, where the system allows that many: as vLLM's own server does."""
_RESERVED_SHARE: Final = 8
_MOST_RESERVED: Final = 64
"""Of the highest numbers, an eighth and at most so many are left to the engine, whoever has taken the others."""


def raise_limit() -> None:
    """Lets this process have as many descriptors as the system allows it, within reason."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST if hard == resource.RLIM_INFINITY else min(hard, _MOST)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError) as error:
        logger.debug("the limit of open files stays at %d: %s", soft, error)
        return
    logger.info("raised the limit of open files of this process (RLIMIT_NOFILE) from %d to %d", soft, wanted)


def _limit() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST if soft == resource.RLIM_INFINITY else min(soft, _MOST)


class Descriptors:
    """Those of the peers of this process. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.taken = 0

    @property
    def limit(self) -> int:
        """Read anew each time, since others may set it."""
        return _limit() // SHARE

    def take(self, count: int) -> bool:
        """Whether there are `count` left; then they are taken until `give`."""
        with self._lock:
            if self.taken + count > self.limit:
                return False
            self.taken += count
            return True

    def give(self, count: int) -> None:
        with self._lock:
            self.taken -= count


def is_among_the_last(descriptor: int) -> bool:
    """Whether `descriptor` is one of those that are left to the engine: the system hands out the lowest free number."""
    limit = _limit()
    return descriptor >= limit - min(limit // _RESERVED_SHARE, _MOST_RESERVED)


of_peers: Final = Descriptors()
"""One for all listeners of the process."""
