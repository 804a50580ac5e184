"""The arena of another process that still fills it: pages to read from, and to map once they are sealed.

What the other process has not sealed it may still change, so nothing that is read counts before it is verified. Nobody
else can.
"""

from __future__ import annotations

import errno
import os
from typing import Final

from vllm_ascend.model_loader.netloader.weights.arena import Arena, require_size

_STEP: Final = 1 << 20
"""Bytes of one read, which stay in the processor's cache until they are digested."""


class UnsealedArena:
    """An arena of `nbytes` in another process. Whoever has it closes it, also after `adopt`."""

    def __init__(self, descriptor: int, nbytes: int) -> None:
        """Takes over `descriptor`, also if it fails. Raises TransportError if the arena has another size."""
        self.nbytes = nbytes
        self._descriptor = descriptor
        try:
            require_size(descriptor, nbytes)
        except BaseException:
            self.close()
            raise

    def adopt(self) -> Arena:
        """Maps the arena. Raises TransportError if it is not sealed, or cannot be mapped by this process."""
        return Arena.adopt(os.dup(self._descriptor), self.nbytes)

    def read(self, offset: int, into: memoryview) -> int:
        """Copies some of the bytes from `offset` on to the beginning of `into`, and returns how many. Raises OSError.

        They may change at any moment.
        """
        count = os.preadv(self._descriptor, [into[:_STEP]], offset)
        if not count:
            raise OSError(errno.ENODATA, "the shared memory of the source ends before its weights do")
        return count

    def close(self) -> None:
        """Gives up the descriptor. Idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
