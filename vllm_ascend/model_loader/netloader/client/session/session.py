"""The client's side of one session: from Join to Confirm with one source, by one transport.

`ask` joins and says whether it is this client's turn. If it is not, the session keeps its place in the source's queue
for as long as its connection is open, and `await_turn` returns when the turn has come. `take` then brings what the
source can bring of the weights, beside other sessions that do the same. Another thread may break a session off at any
time; chunks that have passed by then are kept.

Where the transport copies, the session opens a `Delivery` of the missing chunks, and each is verified as it arrives.
Where it maps, the pages are the source's own: they are taken as they are from a source that is trusted, and read and
verified when they come from a replica, which is trusted with nothing but time.

Once all chunks have passed, whoever brought them, a source that is trusted confirms that it still has the same.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

from vllm_ascend.model_loader.netloader.client.candidates import Candidate
from vllm_ascend.model_loader.netloader.client.fetched import Fetched
from vllm_ascend.model_loader.netloader.client.intake import Intake
from vllm_ascend.model_loader.netloader.client.options import FetchOptions
from vllm_ascend.model_loader.netloader.client.session.connections import Connections
from vllm_ascend.model_loader.netloader.client.session.following import Following
from vllm_ascend.model_loader.netloader.client.session.joining import Joining
from vllm_ascend.model_loader.netloader.client.stages import Stages
from vllm_ascend.model_loader.netloader.client.swarm.peering import DEGREE
from vllm_ascend.model_loader.netloader.client.swarm.pool import Share
from vllm_ascend.model_loader.netloader.client.verification import Evidence, evidence_of, verify
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import SourceFailed, SourceRefused
from vllm_ascend.model_loader.netloader.transport.base import (
    CopyingTransport,
    MappingTransport,
    Reception,
    Transport,
)
from vllm_ascend.model_loader.netloader.transport.chunks.delivery import Delivery
from vllm_ascend.model_loader.netloader.transport.chunks.requests import InOrder
from vllm_ascend.model_loader.netloader.transport.rate import LeastRate
from vllm_ascend.model_loader.netloader.weights.memory import Memory
from vllm_ascend.model_loader.netloader.wire.messages import (
    Done,
    Wait,
)


class ClientSession:
    """One conversation with `candidate`. Whoever made it closes it."""

    def __init__(
        self,
        options: FetchOptions,
        candidate: Candidate,
        *,
        transports: Sequence[Transport],
        intake: Intake,
        may_leave: Callable[[], bool],
        stages: Stages,
        named: Callable[[ClientSession, Sequence[str]], object] = lambda _, __: None,
    ) -> None:
        """`transports` are offered in this order; `intake` takes in what they bring.

        `may_leave` says whether there is another way to the weights, so that a source that is too slow can be left.
        `named` hears, with this session, of endpoints that hold or load the same weights, as the source names them.
        """
        self.candidate = candidate
        self.broken_off = False
        self.evidence: Evidence | None = None
        """What the source has shown of its contents, None as long as it has not."""
        self._options = options
        self._intake = intake
        self._may_leave = may_leave
        self._stages = stages
        self._named = named
        self._connections = Connections(candidate.endpoint, options.access, options.timeouts.connect)
        self._joining = Joining(options, candidate, transports)
        self._delivery: Delivery | None = None
        self._follows: Following | None = None
        self._has_said_so = False
        self._begun = time.perf_counter()
        self._useful_at = time.monotonic()

    @property
    def address(self) -> Endpoint:
        """Where the source was reached, or is to be reached."""
        return self._connections.address

    @property
    def transport(self) -> Transport | None:
        """The transport that the source has chosen, None before it has."""
        return self._joining.transport

    @property
    def age(self) -> float:
        """Seconds since the session was made."""
        return time.perf_counter() - self._begun

    @property
    def accepted(self) -> bool:
        """Whether the source lets this client take the weights."""
        return self._joining.is_accepted

    @property
    def has_denied(self) -> bool:
        """Whether the source has said that it does not have the contents that are being loaded, or not any more."""
        return self._connections.was_denied

    @property
    def received(self) -> int:
        """Bytes that came over the network, those of damaged chunks included."""
        return self._delivery.received if self._delivery is not None else 0

    @property
    def brought(self) -> int:
        """Bytes of chunks that this session has brought and nobody else before."""
        return self._delivery.brought if self._delivery is not None else 0

    @property
    def owing_seconds(self) -> float:
        """For how many seconds the source has owed something that nobody else could do meanwhile.

        That is the time for which it has owed chunks. Before it could owe any, its age counts in part, because as many
        replicas are asked at once.
        """
        return self._delivery.owing_seconds if self._delivery is not None else self.age / DEGREE

    @property
    def useful_at(self) -> float:
        """When the source last had anything that is missing here, by the monotonic clock: now, if it has."""
        requests = self._delivery.requests if self._delivery is not None else None
        if not isinstance(requests, Share) or requests.is_useful:
            self._useful_at = time.monotonic()
        return self._useful_at

    @property
    def fills(self) -> bool:
        """Whether the source has said that it still loads the weights itself."""
        return self.accepted and self._joining.accept.filling

    @property
    def vouches(self) -> bool:
        """Whether the source has told the root digest of `evidence`, or has said that it is sure of what it has.

        Digests alone say nothing: it may still find that they are not those of what it has loaded.
        """
        if self.evidence is None or self.fills:
            return False
        following = self._follows
        is_sure = self._has_said_so or (following is not None and following.has_said_so)
        return is_sure or self._joining.accept.root == self.evidence.root

    @property
    def untried_transports(self) -> tuple[str, ...]:
        """The names of the transports that were offered beside the chosen one; none where the source chose none."""
        return self._joining.untried

    def ask(self) -> Wait | None:
        """Joins. Returns None where it is this client's turn, else what the source says to those who have to wait.

        Raises SourceUnreachable, SourceRefused, SourceFailed or TransportError.
        """
        with self._stages(self, "connect"):
            control = self._connections.open()

        with self._stages(self, "join"), self._connections.failures_translated():
            self._joining.ask(control)
            return self._joining.hear(control)

    def await_turn(self, told: Callable[[Wait], None]) -> None:
        """Returns when the turn has come; `told` hears what the source says until then. Raises as `ask`."""
        with self._stages(self, "join"), self._connections.failures_translated():
            while (wait := self._joining.hear(self._connections.control)) is not None:
                told(wait)

    def take(self) -> Fetched | None:
        """Brings what the source can bring, once it is this client's turn.

        Returns all weights once the source has confirmed them; None where all chunks are here, and the source is not
        the one to confirm them. Raises SourceError or TransportError.
        """
        with self._connections.failures_translated():
            match self.transport:
                case CopyingTransport() as transport:
                    return self._copy(transport)
                case MappingTransport() as transport:
                    return self._map(transport)
                case _:
                    raise AssertionError("a transport either copies or maps")

    def fetched(self, memory: Memory, evidence: Evidence | None) -> Fetched:
        """The weights that lie in `memory`, as those of this source."""
        accept = self._joining.accept
        return Fetched(
            memory=memory,
            source=self.candidate.endpoint,
            address=self.address,
            transport=accept.transport,
            session=accept.session,
            attributes=accept.attributes if evidence is None else evidence.attributes,
            fingerprint=self._joining.fingerprint,
            evidence=evidence,
            port=self._intake.port,
        )

    def break_off(self) -> None:
        """Ends the session from another thread: what is on its way may still arrive, and nothing else is asked for.

        Does not block. `shut_down` ends the session at once.
        """
        self.broken_off = True
        if self._delivery is not None:
            self._delivery.break_off()

    def shut_down(self) -> None:
        """Ends whatever the session still waits for. From another thread than the session's own."""
        self._connections.shut_down()

    def close(self) -> None:
        """Gives up the turn, or the place in the queue. Idempotent."""
        following, self._follows = self._follows, None  # it refers to this session, which has the memory
        self._has_said_so = self._has_said_so or (following is not None and following.has_said_so)
        self._connections.close()

    def _copy(self, transport: CopyingTransport) -> Fetched | None:
        """Fills the client's own memory. Where that fails, what has passed stays there for other sources."""
        accept = self._joining.accept
        evidence: Evidence | None = None
        if self._options.verify or self.candidate.is_replica:
            with self._stages(self, "join"):
                evidence = self._obtain_evidence()
        elif self._options.root and not accept.root:
            raise SourceRefused('it cannot say which contents it has, and VERIFY is "off" here')
        elif accept.filling:
            raise SourceRefused('it still loads these weights itself, and VERIFY is "off" here')
        with self._stages(self, "allocate"):
            self._intake.make_memory()

        with contextlib.closing(self._open_delivery(evidence)) as delivery:
            following = self._follows = self._following(delivery)
            with self._stages(self, "transfer"):
                transport.receive(self._reception(following), delivery)
            if not delivery.is_complete:
                if self.broken_off:
                    raise SourceFailed("what it has comes from elsewhere")
                self._intake.inventory.require_complete()

            # A replica confirms nothing, because anybody could.
            if self.candidate.is_replica:
                self._connections.control.send(Done(), self._options.timeouts.connect)
                return None

            # The delivery stays open: as long as it is, nobody replaces what is being confirmed.
            with self._stages(self, "verify"):
                if accept.filling:
                    following.await_whole()
                following.confirm(accept, evidence)
                self._intake.settle(evidence)
        return self.fetched(delivery.memory, evidence)

    def _map(self, transport: MappingTransport) -> Fetched:
        """Adopts the source's own pages, which no other source can fill: where that fails, they are given up."""
        with self._stages(self, "transfer"):
            memory = transport.adopt(self._reception(self._following(None)))

        evidence: Evidence | None = None
        with self._stages(self, "verify"), _closed_on_failure(memory):
            self._intake.progress.set(memory.nbytes)
            if self.candidate.is_replica or (self._options.root and not self._joining.accept.root):
                evidence = self._obtain_evidence()
                verify(memory, self._intake.inventory.chunks, evidence)
            self._following(None).confirm(self._joining.accept, evidence)
        return self.fetched(memory, evidence)

    def _following(self, delivery: Delivery | None) -> Following:
        requests = delivery.requests if delivery is not None else None
        return Following(
            self._connections.control,
            self._options.timeouts,
            share=requests if isinstance(requests, Share) else None,
            chunks=len(self._intake.inventory.chunks),
            has_all=not self._joining.accept.filling,
            port=self._intake.port,
            named=lambda endpoints: self._named(self, endpoints),
            received=lambda: self.received,
        )

    def _reception(self, following: Following) -> Reception:
        accept = self._joining.accept
        return Reception(
            parameters=accept.parameters,
            nbytes=self._options.request.manifest.nbytes,
            session=accept.session,
            control=self._connections.control,
            connect=self._connections.connect,
            timeouts=self._options.timeouts,
            attend=following.attend,
            follow=following.follow,
            # Beside others, one connection is enough, and each needs a bucket and a thread.
            connections=1 if self.candidate.is_replica or accept.filling or self._intake.sessions > 1 else None,
        )

    def _open_delivery(self, evidence: Evidence | None) -> Delivery:
        least = LeastRate(self._options.min_bandwidth, self._options.timeouts.stall, self._may_leave)
        if evidence is None:
            requests: InOrder | Share = self._intake.alone()
        else:
            fills = self._joining.accept.filling
            requests = self._intake.share(evidence, self._joining.fingerprint, has_all=not fills)
        # Whoever breaks the session off sets the flag first, so one of both sees what the other has done.
        self._delivery = self._intake.delivery(requests, evidence, str(self.candidate.endpoint), least)
        if self.broken_off:
            self._delivery.break_off()
        return self._delivery

    def _obtain_evidence(self) -> Evidence:
        control, accept, timeouts = self._connections.control, self._joining.accept, self._options.timeouts
        manifest, known = self._options.request.manifest, self._intake.evidence
        self.evidence = evidence_of(
            self.candidate, control, accept, manifest, timeouts, known=known, wanted_root=self._options.root
        )
        return self.evidence


@contextlib.contextmanager
def _closed_on_failure(memory: Memory) -> Iterator[None]:
    try:
        yield
    except BaseException:
        memory.close()
        raise
