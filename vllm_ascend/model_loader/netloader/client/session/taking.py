"""What a session takes from its source, once it is this client's turn: the parts that all transports have in common.

`copying` and `mapping` are the two ways to take something. Another thread may break either off at any time; chunks that
have passed by then are kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from vllm_ascend.model_loader.netloader.client.candidates import Candidate
from vllm_ascend.model_loader.netloader.client.fetched import Fetched
from vllm_ascend.model_loader.netloader.client.intake import Intake
from vllm_ascend.model_loader.netloader.client.options import FetchOptions
from vllm_ascend.model_loader.netloader.client.session.connections import Connections
from vllm_ascend.model_loader.netloader.client.session.following import Following, Listener
from vllm_ascend.model_loader.netloader.client.session.joining import Joining
from vllm_ascend.model_loader.netloader.client.swarm.pool import Share
from vllm_ascend.model_loader.netloader.client.verification import Evidence, evidence_of
from vllm_ascend.model_loader.netloader.transport.base import Reception
from vllm_ascend.model_loader.netloader.transport.chunks.delivery import Delivery
from vllm_ascend.model_loader.netloader.transport.chunks.requests import InOrder
from vllm_ascend.model_loader.netloader.transport.rate import LeastRate
from vllm_ascend.model_loader.netloader.weights.memory import Memory
from vllm_ascend.model_loader.netloader.wire.messages import Accept


class Taking:
    """What one session has of the weights of `candidate`, and what it knows of them.

    The session's own thread takes; `broken_off`, `break_off` and what is counted are for any thread.
    """

    def __init__(
        self,
        options: FetchOptions,
        candidate: Candidate,
        *,
        connections: Connections,
        joining: Joining,
        intake: Intake,
        stage: Callable[[str], AbstractContextManager[None]],
        may_leave: Callable[[], bool],
        named: Callable[[Sequence[str]], object],
    ) -> None:
        """`intake` takes in what comes, `stage` is the scope of a phase, and `named` hears whom the source names."""
        self.options = options
        self.candidate = candidate
        self.connections = connections
        self.joining = joining
        self.intake = intake
        self.stage = stage
        self.broken_off = False
        self.evidence: Evidence | None = None
        """What the source has shown of its contents, None as long as it has not."""
        self.holder_nearby: Candidate | None = None
        """Another process of this host that has the same or brings it, if the session was left for that."""
        self.delivery: Delivery | None = None
        self.shared = 0
        """Bytes of the source's own pages that were taken over."""
        self._following: Following | None = None
        self._has_said_so = False
        self._may_leave = may_leave
        self._named = named
        self._useful_at = time.monotonic()

    @property
    def accept(self) -> Accept:
        """What the client gets."""
        return self.joining.accept

    @property
    def has_said_so(self) -> bool:
        """Whether the source has said in News that it is sure of all chunks."""
        following = self._following
        return self._has_said_so or (following is not None and following.has_said_so)

    @property
    def useful_at(self) -> float:
        """When the source last had anything that is missing here, by the monotonic clock: now, if it has."""
        requests = self.delivery.requests if self.delivery is not None else None
        if not isinstance(requests, Share) or requests.is_useful:
            self._useful_at = time.monotonic()
        return self._useful_at

    def break_off(self) -> None:
        """Asks for nothing else. What is on its way may still arrive. Does not block."""
        self.broken_off = True
        if self.delivery is not None:
            self.delivery.break_off()

    def close(self) -> None:
        """Lets go of whoever refers to this object, which has the memory. Idempotent."""
        self._has_said_so = self.has_said_so
        self._following = None
        self._named = lambda _: None

    def obtain_evidence(self) -> Evidence:
        """What the source's chunks are verified by. Raises SourceRefused or PeerError."""
        control, timeouts, manifest = self.connections.control, self.options.timeouts, self.options.request.manifest
        self.evidence = evidence_of(
            self.candidate,
            control,
            self.accept,
            manifest,
            timeouts,
            known=self.intake.evidence,
            wanted_root=self.options.root,
        )
        return self.evidence

    def deliver(self, requests: Share | InOrder, evidence: Evidence | None) -> Delivery:
        """The delivery of what `requests` hands out, which the caller closes."""
        least = LeastRate(self.options.min_bandwidth, self.options.timeouts.stall, self._may_leave)
        # Whoever breaks the session off sets the flag first, so one of both sees what the other has done.
        self.delivery = self.intake.delivery(requests, evidence, str(self.candidate.endpoint), least)
        if self.broken_off:
            self.delivery.break_off()
        return self.delivery

    def following(self, listener: Listener | None) -> Following:
        """The rest of the conversation. `listener` hears which chunks the source has; None where nobody follows."""
        self._following = Following(
            self.connections.control,
            self.options.timeouts,
            listener=listener,
            chunks=len(self.intake.inventory.chunks),
            has_all=not self.accept.filling,
            port=self.intake.port,
            named=self._named,
            received=lambda: self.delivery.received if self.delivery is not None else 0,
        )
        return self._following

    def reception(self, following: Following) -> Reception:
        """What the transport knows of the session."""
        accept = self.accept
        return Reception(
            parameters=accept.parameters,
            nbytes=self.options.request.manifest.nbytes,
            session=accept.session,
            control=self.connections.control,
            connect=self.connections.connect,
            timeouts=self.options.timeouts,
            attend=following.attend,
            follow=following.follow,
            # Beside others, one connection is enough, and each needs a bucket and a thread.
            connections=1 if self.candidate.is_replica or accept.filling or self.intake.sessions > 1 else None,
        )

    def fetched(self, memory: Memory, evidence: Evidence | None) -> Fetched:
        """The weights that lie in `memory`, as those of this source."""
        accept = self.accept
        return Fetched(
            memory=memory,
            source=self.candidate.endpoint,
            address=self.connections.address,
            transport=accept.transport,
            session=accept.session,
            attributes=accept.attributes if evidence is None else evidence.attributes,
            fingerprint=self.joining.fingerprint,
            evidence=evidence,
            port=self.intake.port,
        )
