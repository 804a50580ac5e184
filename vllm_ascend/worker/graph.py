"""torch-npu's graph, made fit for a process that goes on after a capture has failed.

A capture begins with telling the allocators to serve it from its pool. Where the device then refuses to capture,
torch-npu leaves it at that, and where the end fails, the pool counts a graph that does not exist. Both are undone here,
as far as Python reaches: the allocator of pinned memory cannot be told. It will ask the graph whether it is the one
that captures, so the graph has to stay; and the same pool cannot be used again (`begin_again_with_fewer` takes a new
one).
"""

from __future__ import annotations

import torch_npu

_failed: list[NPUGraph] = []


class NPUGraph(torch_npu.npu.NPUGraph):
    def capture_begin(self, pool: tuple[int, int], capture_error_mode: str = "global") -> None:
        """Raises RuntimeError where the device refuses; nothing is captured then."""
        try:
            super().capture_begin(pool, capture_error_mode)
        except RuntimeError:
            _failed.append(self)
            torch_npu._C._npu_endAllocateToPool(torch_npu.npu.current_device(), pool)
            torch_npu._C._npu_releasePool(torch_npu.npu.current_device(), pool)
            raise
        self._captures_into = pool

    def capture_end(self) -> None:
        """Raises RuntimeError where something that cannot be captured has been tried since the begin."""
        try:
            super().capture_end()
        except RuntimeError:
            torch_npu._C._npu_releasePool(torch_npu.npu.current_device(), self._captures_into)
            raise
