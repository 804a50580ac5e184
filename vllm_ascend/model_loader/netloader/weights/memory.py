"""The memory that holds the weights of a rank, as transports, deliveries and digests see it.

The address space of the manifest is one block of host memory (`arena`), or on an accelerator it is spread over the
parameters themselves (`model.live`). Bytes go in and out by chunks, as host bytes. What memory on an accelerator can do
beyond that is in `model.device_memory`.

Whatever arrives lands first, and settles where it belongs only when it is known to be what was served. Nobody computes
with an arena before it is complete, so there a chunk lands in its own place.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol


class Readable(Protocol):
    """Bytes that are read by slices like those of a memoryview. A slice may be a copy."""

    @property
    def nbytes(self) -> int:
        """The number of all bytes."""

    def __getitem__(self, part: slice, /) -> memoryview:
        """The bytes of `part`, which has no step."""


class Landing(ABC):
    """The place where one chunk arrives. One thread uses it."""

    @property
    @abstractmethod
    def host(self) -> memoryview:
        """Room for all bytes of the chunk, to be filled from a socket."""

    @abstractmethod
    def arrived(self, begin: int, end: int) -> memoryview:
        """Bytes [begin, end) of the chunk, for the digest. They must have arrived."""

    @abstractmethod
    def settle(self) -> None:
        """Puts the whole chunk where it belongs, once it has been verified."""


class Memory(ABC):
    """The weights of a rank, in whatever memory. Whoever made it closes it, unless a store has taken it over."""

    nbytes: int
    """The size of the manifest's address space."""

    @property
    @abstractmethod
    def servable(self) -> bool:
        """Whether the bytes are complete and will not change, so that others may have them."""

    @property
    def descriptor(self) -> int | None:
        """The descriptor of a file that holds the bytes, None if there is none.

        Peers on this host map the file, and the kernel sends from it.
        """
        return None

    @abstractmethod
    def landing(self, offset: int, length: int, *, apart: bool = False) -> Landing:
        """Where the chunk of `length` bytes at `offset` is to arrive.

        With `apart` it comes into its own place only when it settles, because another one of the same chunk may be
        arriving.
        """

    @abstractmethod
    def contents(self) -> Readable:
        """The bytes that lie there now, while the memory is being filled."""

    @abstractmethod
    def reader(self) -> Readable:
        """The bytes that are served. The memory must be servable."""

    def is_as_loaded(self) -> bool:
        """Whether the bytes that are served are still those that were loaded. It may read them all.

        They always are, unless the memory is one that others can write to.
        """
        return True

    @abstractmethod
    def seal(self) -> None:
        """Ends the filling: from now on the memory is servable. Raises OSError if the system does not allow it."""

    def free_with_tensors(self) -> None:
        """Lets the memory of a tensor be freed with the tensor, because it will not be served."""
        return

    @abstractmethod
    def close(self) -> None:
        """Gives up everything that is held beside the model's tensors, which stay valid. Idempotent."""

    def discard(self) -> None:
        """Gives up the memory with all that has arrived in it, and frees its pages at once. Idempotent.

        Nobody may use tensors over it any more.
        """
        self.close()
