"""Fetching the weights of one rank from whichever source delivers them.

Nothing is bound to a model here: `Client.fetch` returns memory that holds all bytes, confirmed by the last source, or
raises an error with every reason.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vllm_ascend.model_loader.netloader.client.fetched import Fetched
from vllm_ascend.model_loader.netloader.client.intake import Intake
from vllm_ascend.model_loader.netloader.client.neighbours import Neighbours
from vllm_ascend.model_loader.netloader.client.options import FetchOptions
from vllm_ascend.model_loader.netloader.client.search.search import Search
from vllm_ascend.model_loader.netloader.client.stages import Stages
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.report import Attempt, Phases
from vllm_ascend.model_loader.netloader.transport.base import Transport


@dataclass
class Client:
    """Fetches the weights that `options` ask for, by any of `transports`, the best first.

    `phases` (seconds by phase), `attempts` that failed, and two counts of bytes by source fill while it fetches, so
    that they can be read after a failure, too: `received` over the network, and `shared`, which are pages of the source
    itself, or were copied from these when it was gone. `sleep` waits for so many seconds between two rounds.
    """

    options: FetchOptions
    transports: Sequence[Transport]
    phases: Phases = field(default_factory=Phases)
    attempts: list[Attempt] = field(default_factory=list)
    received: Counter[str] = field(default_factory=Counter)
    shared: Counter[str] = field(default_factory=Counter)
    sleep: Callable[[float], None] = time.sleep

    def fetch(self, sources: Sequence[Endpoint]) -> Fetched:
        """The weights from the first of `sources`, or of those that they name, that delivers; blocks until then.

        The caller closes the memory. Raises SourcesExhausted with every attempt's reason, or UnsupportedModel or NoRoom
        where there is no memory for the weights.
        """
        with Intake(self.options, self._neighbours()) as intake:
            search = Search(
                self.options,
                sources,
                self.transports,
                intake=intake,
                stages=Stages(self.phases.seconds),
                attempts=self.attempts,
                received=self.received,
                shared=self.shared,
                sleep=self.sleep,
            )
            fetched = search.run()
            intake.release(fetched.memory)
        return fetched

    def _neighbours(self) -> Neighbours | None:
        """Those whose pages this process may map. None where it can map nothing, or nothing is verified."""
        options = self.options
        if not options.verify or all(transport.traits.copies for transport in self.transports):
            return None
        return Neighbours(options.request, options.access, may_claim=options.relay is not None)
