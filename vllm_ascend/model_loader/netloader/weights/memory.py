"""Where the weights of a rank lie, as transports, deliveries and digests see it.

The manifest's address space is one block of host memory (`arena`), or it is spread over the parameters themselves on an
accelerator (`model.live`). Bytes go in and out by chunks, as host bytes; what else memory on an accelerator can do is
in `model.device_memory`. Whatever arrives lands first, and settles where it belongs only when it is known to be what was
served; an arena, which nobody computes with before it is complete, is its own landing place.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol


class Readable(Protocol):
    """Bytes that are read by slices, as those of a memoryview; a slice may be a copy."""

    @property
    def nbytes(self) -> int: ...

    def __getitem__(self, part: slice, /) -> memoryview: ...


class Landing(ABC):
    """Where one chunk arrives. For one thread."""

    @property
    @abstractmethod
    def host(self) -> memoryview:
        """All bytes of the chunk, to be filled from a socket."""

    @abstractmethod
    def arrived(self, begin: int, end: int) -> memoryview:
        """Bytes [begin, end) of the chunk, which have come."""

    @abstractmethod
    def settle(self) -> None:
        """Puts the whole chunk where it belongs."""


class Memory(ABC):
    """`nbytes` of a rank's weights. Whoever made it closes it, unless a store has taken it over."""

    nbytes: int

    @property
    @abstractmethod
    def servable(self) -> bool:
        """Whether the bytes are complete and stay as they are, so that others may have them."""

    @property
    def descriptor(self) -> int | None:
        """A file that holds the bytes, for peers on this host and for the kernel to send from; None without one."""
        return None

    @abstractmethod
    def landing(self, offset: int, length: int) -> Landing:
        """For the next chunk to fill."""

    @abstractmethod
    def contents(self) -> Readable:
        """What lies there now."""

    @abstractmethod
    def reader(self) -> Readable:
        """What is served. Only for memory that is servable."""

    @abstractmethod
    def seal(self) -> None:
        """Ends the filling: what is there now is served. Raises OSError where that cannot be had."""

    def free_with_tensors(self) -> None:
        """For memory that will not be served: from now on only the model's tensors keep it."""
        return

    @abstractmethod
    def close(self) -> None:
        """Gives up what is held beside the model's tensors. Idempotent."""

    def discard(self) -> None:
        """Gives it up with all that has arrived, which nobody uses: its pages are free at once. Idempotent."""
        self.close()
