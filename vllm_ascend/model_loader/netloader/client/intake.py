"""What a client has taken in so far: the memory that it fills, which chunks of it have passed, and by which digests.

It belongs to a fetch and not to a session, so what one source has brought counts with the next, and several sources can
bring chunks at once. All of them must have the same contents, which is to say one root digest. What the first source
has told (its *evidence*) holds for the others as long as any of them delivers.

What has passed can be served to others at once (`Relay`), from the moment when the evidence is known.
"""

from __future__ import annotations

import functools
import random
import threading
import weakref
from collections.abc import Callable
from typing import Self

from vllm_ascend.model_loader.netloader.client.neighbours import Neighbours
from vllm_ascend.model_loader.netloader.client.options import FetchOptions, Filling, Relay
from vllm_ascend.model_loader.netloader.client.swarm.pool import Pool, Share
from vllm_ascend.model_loader.netloader.client.verification import Evidence
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import OtherContents, SourceFailed
from vllm_ascend.model_loader.netloader.transport.chunks.arrival import Progress
from vllm_ascend.model_loader.netloader.transport.chunks.delivery import Delivery
from vllm_ascend.model_loader.netloader.transport.chunks.inventory import Inventory
from vllm_ascend.model_loader.netloader.transport.chunks.requests import InOrder
from vllm_ascend.model_loader.netloader.transport.rate import LeastRate
from vllm_ascend.model_loader.netloader.weights.memory import Memory

_OTHER_CONTENTS = "the weights that it had were replaced by others"


class _OrderOfTheManifest(random.Random):
    """Chance that leaves things in their order, for a client that has nobody to complement."""

    def shuffle(self, x: object) -> None:
        return


class Intake:
    """The memory, the chunks and the progress of one fetch. Thread-safe.

    Use it with `with`: at the end the memory is discarded, unless it was released to somebody.
    """

    def __init__(self, options: FetchOptions, neighbours: Neighbours | None = None) -> None:
        """`neighbours` are those who want the same weights on this host, None where nobody's pages can be mapped."""
        self.progress = Progress(options.progress)
        self.inventory = Inventory(options.request.manifest.nbytes)
        for number, digest in options.found.items():
            self.inventory.add(self.inventory.chunks[number], digest)
        self.port = 0
        """The port at which others get what has passed; 0 for nobody."""
        self.on_joined: Callable[[Endpoint], object] = lambda _: None
        """Is called with the address of each client that takes what is relayed, and relays it in turn."""
        self._options = options
        self._neighbours = neighbours
        self._looking = threading.Lock()
        """Is held while neighbours are looked for, which may take a while. Outer to all others."""
        self._setup = threading.Lock()
        """Is held while the memory or the evidence may become another. Outer to that of the pool."""
        self._memory: Memory | None = None
        self._pool: Pool | None = None
        self._fingerprint = ""
        self._is_settled = False
        self._relay = options.relay

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._setup:
            if self._memory is not None:
                self._end_relay("it could not load these weights")
                self._memory.discard()
                self._memory = None
            if self._neighbours is not None:
                self._neighbours.give_up_claim()

    @property
    def nbytes_held(self) -> int:
        """The size of the chunks that have passed, in bytes."""
        return self.inventory.nbytes_held

    @property
    def is_complete(self) -> bool:
        """Whether all chunks have passed, by digests that a source has told."""
        pool = self._pool
        return pool is not None and pool.is_complete

    @property
    def evidence(self) -> Evidence | None:
        """What the chunks are verified by, None before that is known."""
        pool = self._pool
        return None if pool is None else pool.evidence

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the contents that `evidence` describes."""
        return self._fingerprint

    @property
    def is_begun(self) -> bool:
        """Whether anything is being brought, or has come."""
        return self._memory is not None

    @property
    def memory(self) -> Memory:
        """The memory that is filled. Only once there is a delivery."""
        assert self._memory is not None, "there is no memory yet"
        return self._memory

    @property
    def sessions(self) -> int:
        """How many sessions bring chunks now that are verified."""
        pool = self._pool
        return 0 if pool is None else pool.sessions

    @property
    def passed_at(self) -> float:
        """When the latest chunk passed, or the evidence became known, by the monotonic clock; 0 before."""
        pool = self._pool
        return 0.0 if pool is None else pool.passed_at

    def holder_nearby(self, root: str) -> Endpoint | None:
        """Where another process of this host has the contents with the root digest `root`, or brings them for all.

        None where there is nobody to wait for, so that this process has to bring them, or does already.
        """
        if self._neighbours is None:
            return None
        with self._looking:
            return None if self.is_begun else self._neighbours.holder(root)

    def found_nearby(self, root: str) -> Endpoint | None:
        """As `holder_nearby`, for a process that cannot bring the weights now."""
        if self._neighbours is None:
            return None
        with self._looking:
            return None if self.is_begun else self._neighbours.find(root)

    def leave_nearby(self, holder: Endpoint) -> None:
        """Waits for the process at `holder` no more, because it did not deliver."""
        if self._neighbours is not None:
            self._neighbours.leave(holder)

    def adopt(self, memory: Memory, evidence: Evidence, fingerprint: str) -> None:
        """Takes in the pages of another process, which have been verified by `evidence`, as all that is to come.

        Raises SourceFailed, and leaves `memory` to the caller, where others bring something by now.
        """
        with self._setup:
            self._require_unsettled()
            if self._memory is not None:
                raise SourceFailed("what it shares comes from elsewhere already")
            for chunk in self.inventory.chunks:
                self.inventory.add(chunk, evidence.digests[chunk.number])
            self.progress.set(self.inventory.nbytes_held)
            self._memory, self._fingerprint = memory, fingerprint
            self._pool = Pool(self.inventory, evidence, _OrderOfTheManifest())

    def make_memory(self) -> None:
        """Makes the memory, unless it is there. Raises UnsupportedModel, NoRoom or OSError where there is none."""
        with self._setup:
            if self._memory is None:
                self._memory = self._options.allocate(self._options.request.manifest)

    def share(self, evidence: Evidence, fingerprint: str, *, has_all: bool) -> Share:
        """What a session has to bring, whose source has all chunks or none yet. A delivery takes it over.

        Call it after `make_memory`. Raises OtherContents where other sources deliver other contents.
        """
        with self._setup:
            self._require_unsettled()
            pool = self._pool
            if pool is None or pool.evidence.root != evidence.root:
                pool = self._agree(evidence, fingerprint)
            return pool.join(has_all=has_all)

    def alone(self) -> InOrder:
        """All chunks, for a session that has to bring them without being verified."""
        with self._setup:
            self._require_unsettled()
            self._end_relay(_OTHER_CONTENTS)
            self._pool = None
            requests = InOrder(self.inventory, None)
            self.progress.set(self.inventory.nbytes_held)
            return requests

    def delivery(
        self, requests: Share | InOrder, evidence: Evidence | None, source: str, least_rate: LeastRate
    ) -> Delivery:
        """The delivery of what `requests` hands out, which the caller closes; `source` is named in messages."""
        return Delivery(
            self.memory,
            requests,
            None if evidence is None else evidence.digests,
            progress=self.progress,
            source=source,
            least_rate=least_rate,
        )

    def settle(self, evidence: Evidence | None) -> None:
        """Notes that all chunks are there by `evidence`, and confirmed: nobody brings any more from now on.

        Raises SourceFailed where they were replaced by others meanwhile, or are being replaced.
        """
        with self._setup:
            ours = self.evidence
            is_ours = evidence is None or (ours is not None and ours.root == evidence.root)
            if not is_ours or not self.inventory.is_complete:
                raise SourceFailed("what it has confirmed was replaced by what another source holds")
            self._is_settled = True

    def _require_unsettled(self) -> None:
        if self._is_settled:
            raise SourceFailed("another source has confirmed all weights already")

    def holds(self, memory: Memory) -> bool:
        """Whether `memory` is the one that is filled."""
        return memory is self._memory

    def release(self, memory: Memory) -> None:
        """Leaves `memory`, the one that was fetched, to the caller. What was filled is discarded if it is another."""
        with self._setup:
            if memory is self._memory:
                self._memory = None

    def _agree(self, evidence: Evidence, fingerprint: str) -> Pool:
        """Makes `evidence` what counts from now on. Chunks that have passed by other digests are dropped."""
        if self._pool is not None and self._pool.sessions:
            raise OtherContents(
                f"it holds other contents than those that are being loaded: its root digest is "
                f"{evidence.root[:16]}..., expected {self._pool.evidence.root[:16]}..."
            )
        self._end_relay(_OTHER_CONTENTS)
        if self.memory.servable:  # these are the pages of another process, which cannot be filled
            self.memory.close()
            self._memory = self._options.allocate(self._options.request.manifest)
            self.inventory.missing(None)
        self.inventory.missing(evidence.digests)
        self.progress.set(self.inventory.nbytes_held)

        # Whoever relays must not ask in the order in which everybody else does.
        chance = random.Random() if self._relay is not None else _OrderOfTheManifest()
        self._fingerprint = fingerprint
        self._pool = pool = Pool(self.inventory, evidence, chance)
        if self._relay is not None:
            self._begin_relay(self._relay, pool)
        return pool

    def _begin_relay(self, relay: Relay, pool: Pool) -> None:
        evidence = pool.evidence
        claim = None if self._neighbours is None else self._neighbours.take_claim(evidence.root)
        filling = Filling(
            self.memory,
            pool.passed,
            evidence.digests,
            evidence.attributes,
            self._fingerprint,
            joined=functools.partial(_tell, weakref.ref(self)),
            claim=claim,
        )
        self.port = relay.begin(filling)
        if claim is not None and not self.port:
            claim.close()

    def _end_relay(self, reason: str) -> None:
        if self._relay is not None and self.port:
            self._relay.end(reason)
            self.port = 0


def _tell(intake: weakref.ref[Intake], endpoint: Endpoint) -> None:
    """Tells whoever fetches, if the fetch is not over: what it has taken in may be served for much longer."""
    if (fetching := intake()) is not None:
        fetching.on_joined(endpoint)
