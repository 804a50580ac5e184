"""The file descriptors of this process: how many there may be, and how many of them peers may take.

A process that has none left can neither open a file nor accept a request, which is the end of the engine and not only
of serving weights. So all connections of peers, and all that their sessions open besides, come out of one share of the
limit.
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
"""The limit is raised to this, if the system allows that many, as vLLM's own server does."""
_RESERVED_SHARE: Final = 8
_MOST_RESERVED: Final = 64
"""One in _RESERVED_SHARE of the descriptors, those with the highest numbers, but no more than so many, are left to the
engine, whoever has taken the others."""


def raise_limit() -> None:
    """Lets this process have as many descriptors as the system allows, within reason. Failing is no error."""
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


def limit_of_process() -> int:
    """How many descriptors this process may have now, within reason."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST if soft == resource.RLIM_INFINITY else min(soft, _MOST)


class Descriptors:
    """Counts the descriptors that peers of this process have taken. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.taken = 0

    @property
    def limit(self) -> int:
        """How many peers may take; read anew each time, because others may change the limit of the process."""
        return limit_of_process() // SHARE

    def take(self, count: int) -> bool:
        """Takes `count` descriptors until `give`, if so many are left. Whether that was so."""
        with self._lock:
            if self.taken + count > self.limit:
                return False
            self.taken += count
            return True

    def give(self, count: int) -> None:
        """Gives back `count` descriptors that `take` has taken."""
        with self._lock:
            self.taken -= count


def is_among_the_last(descriptor: int) -> bool:
    """Whether `descriptor` is one of those that are left to the engine.

    The system always hands out the lowest free number, so a high one means that few are left.
    """
    limit = limit_of_process()
    return descriptor >= limit - min(limit // _RESERVED_SHARE, _MOST_RESERVED)


of_peers: Final = Descriptors()
"""One for all listeners of the process."""
