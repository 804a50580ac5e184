"""What a process may want of a source: the weights of one rank, what it holds, or that it refers others to this one.

Nothing is bound to the model here: `Client.fetch` returns memory that holds all bytes, confirmed by the last source, or
raises an error with every reason. Only errors of sources and transports move on to the next; everything else is a fault
of this process and propagates.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vllm_ascend.model_loader.netloader.client.options import FetchOptions
from vllm_ascend.model_loader.netloader.client.search import Search
from vllm_ascend.model_loader.netloader.client.session import Fetched
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.report import Attempt, Phases
from vllm_ascend.model_loader.netloader.transport.base import Transport
from vllm_ascend.model_loader.netloader.weights.memory import Memory


@dataclass
class Client:
    """Fetches what `options` ask for.

    `phases` and `attempts` fill as it goes, so that they can be read after a failure too; `received` counts bytes by
    source.
    """

    options: FetchOptions
    transports: Sequence[Transport]
    phases: Phases = field(default_factory=Phases)
    attempts: list[Attempt] = field(default_factory=list)
    received: Counter[str] = field(default_factory=Counter)
    pause: Callable[[float], None] = time.sleep
    _memory: Memory | None = None

    def fetch(self, sources: Sequence[Endpoint]) -> Fetched:
        """Raises SourcesExhausted with every attempt's reason, or UnsupportedModel where there is no memory."""
        kept: Memory | None = None
        try:
            search = Search(
                self.options,
                sources,
                self.transports,
                memory_to_fill=self.memory_to_fill,
                phases=self.phases,
                attempts=self.attempts,
                received=self.received,
                pause=self.pause,
            )
            fetched = search.run()
            kept = fetched.memory
        finally:
            memory, self._memory = self._memory, None
            if memory is not None and memory is not kept:
                memory.discard()
        return fetched

    def memory_to_fill(self) -> Memory:
        """For transports that copy: made once, kept from source to source."""
        if self._memory is None:
            with self.phases("allocate"):
                self._memory = self.options.allocate(self.options.request.manifest)
        return self._memory
