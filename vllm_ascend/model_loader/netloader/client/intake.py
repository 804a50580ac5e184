"""What a client has taken in so far: the memory that it fills, and which chunks of it have arrived and passed.

It belongs to a fetch and not to a session, so what one source has brought counts with the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from vllm_ascend.model_loader.netloader.client.options import FetchOptions
from vllm_ascend.model_loader.netloader.report import Phases
from vllm_ascend.model_loader.netloader.transport.delivery import Chunk, Delivery, Inventory, Progress
from vllm_ascend.model_loader.netloader.transport.rate import LeastRate
from vllm_ascend.model_loader.netloader.weights.memory import Memory


class Intake:
    """The memory, the inventory and the progress of one fetch.

    Use it with `with`: at the end the memory is discarded, unless it was released to somebody.
    """

    def __init__(self, options: FetchOptions, phases: Phases) -> None:
        self.progress = Progress(options.progress)
        self._options = options
        self._phases = phases
        self._inventory = Inventory(options.request.manifest.nbytes)
        self._memory: Memory | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._memory is not None:
            self._memory.discard()
            self._memory = None

    @property
    def chunks(self) -> Sequence[Chunk]:
        """All chunks of the weights, in order."""
        return self._inventory.chunks

    @property
    def nbytes_held(self) -> int:
        """The size of the chunks that have passed, in bytes."""
        return self._inventory.nbytes_held

    def delivery(self, digests: Sequence[bytes] | None, source: str, least_rate: LeastRate) -> Delivery:
        """Opens the delivery of all chunks that are missing, which the caller closes.

        `digests` are those that the source has told, by chunk, or None where nothing is verified; `source` is named in
        messages. The memory is made for the first delivery. Raises UnsupportedModel, NoRoom or OSError where there is
        none.
        """
        if self._memory is None:
            with self._phases("allocate"):
                self._memory = self._options.allocate(self._options.request.manifest)
        return Delivery(
            self._memory, self._inventory, digests, progress=self.progress, source=source, least_rate=least_rate
        )

    def require_complete(self) -> None:
        """Raises PeerError where a delivery came to its end and chunks are missing."""
        self._inventory.require_complete()

    def release(self, memory: Memory) -> None:
        """Leaves `memory`, the one that was fetched, to the caller. What was filled is discarded if it is another."""
        if memory is self._memory:
            self._memory = None
