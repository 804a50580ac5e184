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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from vllm_ascend.model_loader.netloader.client.intake import Intake
from vllm_ascend.model_loader.netloader.client.options import FetchOptions
from vllm_ascend.model_loader.netloader.client.search.order import Candidate
from vllm_ascend.model_loader.netloader.client.session.connections import Connections
from vllm_ascend.model_loader.netloader.client.session.following import Following
from vllm_ascend.model_loader.netloader.client.stages import Stages
from vllm_ascend.model_loader.netloader.client.swarm.peering import DEGREE
from vllm_ascend.model_loader.netloader.client.swarm.pool import Share
from vllm_ascend.model_loader.netloader.client.verification import (
    Evidence,
    not_ended,
    obtain,
    require_promised,
    verify,
)
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import PeerError, ProtocolError, SourceFailed, SourceRefused
from vllm_ascend.model_loader.netloader.transport.base import (
    CopyingTransport,
    MappingTransport,
    Reception,
    Transport,
)
from vllm_ascend.model_loader.netloader.transport.chunks.delivery import Delivery
from vllm_ascend.model_loader.netloader.transport.rate import LeastRate
from vllm_ascend.model_loader.netloader.weights.manifest import Manifest
from vllm_ascend.model_loader.netloader.weights.memory import Memory
from vllm_ascend.model_loader.netloader.wire.channel import Deadline
from vllm_ascend.model_loader.netloader.wire.messages import (
    STRANGER_REPLY_LIMIT,
    Accept,
    AttributeValue,
    Confirm,
    Done,
    Join,
    Message,
    News,
    Refuse,
    Wait,
)
from vllm_ascend.model_loader.netloader.wire.refusal import refused

LEAST_DIGEST_RATE: Final = 100 << 20
"""Bytes per second that a source digests at the very least, in the little time that inference leaves it.

A replica has made its digests before it was named, so it gets no such time.
"""


@dataclass(frozen=True)
class Fetched:
    """The weights and where they came from. The caller closes `memory`.

    `source` is the one that has confirmed them, or brought most where nobody is left to confirm them. `address` is
    where it was reached: its name may stand for several. `fingerprint` is that of the checkpoint that the weights are
    known by, empty where there is none. `evidence` is what every byte was verified by, None where nothing was verified.
    `port` is where what had come was served to others meanwhile, as `source` has been told; 0 where that was not done.
    """

    memory: Memory
    source: Endpoint
    address: Endpoint
    transport: str
    session: bytes
    attributes: Mapping[str, AttributeValue] = field(default_factory=dict)
    fingerprint: str = ""
    evidence: Evidence | None = None
    port: int = 0


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
        self.transport: Transport | None = None
        """The transport that the source has chosen, None before it has."""
        self.broken_off = False
        self._has_denied = False
        self._options = options
        self._transports = tuple(transports)
        self._intake = intake
        self._may_leave = may_leave
        self._stages = stages
        self._named = named
        self._connections = Connections(candidate.endpoint, options.access, options.timeouts.connect)
        self._accept: Accept | None = None
        self._delivery: Delivery | None = None
        self._begun = time.perf_counter()
        self._useful_at = time.monotonic()

    @property
    def address(self) -> Endpoint:
        """Where the source was reached, or is to be reached."""
        return self._connections.address

    @property
    def age(self) -> float:
        """Seconds since the session was made."""
        return time.perf_counter() - self._begun

    @property
    def accepted(self) -> bool:
        """Whether the source lets this client take the weights."""
        return self._accept is not None

    @property
    def has_denied(self) -> bool:
        """Whether the source has said that it does not have the contents that are being loaded, or not any more."""
        return self._has_denied or self._connections.was_denied

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
        return self._accept is not None and self._accept.filling

    @property
    def untried_transports(self) -> tuple[str, ...]:
        """The names of the transports that were offered beside the chosen one; none where the source chose none."""
        if self.transport is None:
            return ()
        return tuple(each.name for each in self._transports if each is not self.transport)

    def ask(self) -> Wait | None:
        """Joins. Returns None where it is this client's turn, else what the source says to those who have to wait.

        Raises SourceUnreachable, SourceRefused, SourceFailed or TransportError.
        """
        with self._stages(self, "connect"):
            control = self._connections.open()

        with self._stages(self, "join"), self._connections.failures_translated():
            if self.candidate.is_replica:
                control.limit_frames(STRANGER_REPLY_LIMIT)
            request = self._options.request
            offers = tuple(transport.offer() for transport in self._transports)
            join = Join(request.identity, request.coordinates, request.manifest.digest, offers)
            control.send(join, self._options.timeouts.connect)
            return self._next_answer()

    def await_turn(self, told: Callable[[Wait], None]) -> None:
        """Returns when the turn has come; `told` hears what the source says until then. Raises as `ask`."""
        with self._stages(self, "join"), self._connections.failures_translated():
            while (wait := self._next_answer()) is not None:
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
        accept = self._accepted()
        return Fetched(
            memory=memory,
            source=self.candidate.endpoint,
            address=self.address,
            transport=accept.transport,
            session=accept.session,
            attributes=accept.attributes if evidence is None else evidence.attributes,
            fingerprint=self._fingerprint,
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
        self._connections.close()

    def _next_answer(self) -> Wait | None:
        """What the source says to those who have to wait; None where it has accepted, which is noted."""
        timeouts = self._options.timeouts
        # A replica has to answer at once: it has nothing to do for a client before that.
        seconds = timeouts.connect if self.candidate.is_replica else max(timeouts.connect, timeouts.stall)
        answer = self._connections.control.receive(Deadline(seconds))
        if isinstance(answer, Wait):
            return answer

        accept = _granted(answer, self._options.request.manifest)
        self.transport = next((each for each in self._transports if each.name == accept.transport), None)
        if self.transport is None:
            raise ProtocolError(f"the source chose the transport {accept.transport!r}, which was not offered")
        ours = self._options.request.identity.fingerprint
        if ours and accept.fingerprint not in ("", ours):
            raise ProtocolError(f"it accepted, but serves a checkpoint with the fingerprint {accept.fingerprint}")
        self._options.check_attributes(accept.attributes)

        self._accept = accept
        return None

    def _accepted(self) -> Accept:
        assert self._accept is not None, "it is not this client's turn"
        return self._accept

    @property
    def _fingerprint(self) -> str:
        """The fingerprint of the contents: for a replica the one that was promised."""
        contents = self.candidate.contents
        return self._accepted().fingerprint if contents is None else contents.fingerprint

    def _copy(self, transport: CopyingTransport) -> Fetched | None:
        """Fills the client's own memory. Where that fails, what has passed stays there for other sources."""
        accept = self._accepted()
        evidence: Evidence | None = None
        if self._options.verify or self.candidate.is_replica:
            with self._stages(self, "join"):
                evidence = self._obtain_evidence()
        elif accept.filling:
            raise SourceRefused('it still loads these weights itself, and VERIFY is "off" here')
        with self._stages(self, "allocate"):
            self._intake.make_memory()

        with contextlib.closing(self._open_delivery(evidence)) as delivery:
            following = self._following(delivery)
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
                self._confirm(evidence, following)
                self._intake.settle(evidence)
        return self.fetched(delivery.memory, evidence)

    def _map(self, transport: MappingTransport) -> Fetched:
        """Adopts the source's own pages, which no other source can fill: where that fails, they are given up."""
        with self._stages(self, "transfer"):
            memory = transport.adopt(self._reception(self._following(None)))

        evidence: Evidence | None = None
        with self._stages(self, "verify"), _closed_on_failure(memory):
            self._intake.progress.set(memory.nbytes)
            if self.candidate.is_replica:
                evidence = self._obtain_evidence()
                verify(memory, self._intake.inventory.chunks, evidence)
            self._confirm(evidence, self._following(None))
        return self.fetched(memory, evidence)

    def _following(self, delivery: Delivery | None) -> Following:
        requests = delivery.requests if delivery is not None else None
        return Following(
            self._connections.control,
            self._options.timeouts,
            share=requests if isinstance(requests, Share) else None,
            chunks=len(self._intake.inventory.chunks),
            has_all=not self._accepted().filling,
            port=self._intake.port,
            named=lambda endpoints: self._named(self, endpoints),
            received=lambda: self.received,
        )

    def _reception(self, following: Following) -> Reception:
        accept = self._accepted()
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
        requests = self._intake.alone() if evidence is None else self._share(evidence)
        # Whoever breaks the session off sets the flag first, so one of both sees what the other has done.
        self._delivery = self._intake.delivery(requests, evidence, str(self.candidate.endpoint), least)
        if self.broken_off:
            self._delivery.break_off()
        return self._delivery

    def _share(self, evidence: Evidence) -> Share:
        try:
            return self._intake.share(evidence, self._fingerprint, has_all=not self._accepted().filling)
        except SourceFailed:
            self._has_denied = True
            raise

    def _obtain_evidence(self) -> Evidence:
        """What the source's chunks are verified by. It is told once, and holds for all that have the same root."""
        accept, known = self._accepted(), self._intake.evidence
        if known is not None and accept.root == known.root and self._promises(known.root):
            return known

        manifest, timeouts = self._options.request.manifest, self._options.timeouts
        making = 0.0 if self.candidate.is_replica else manifest.nbytes / LEAST_DIGEST_RATE
        evidence = obtain(
            self._connections.control,
            accept,
            manifest,
            count=len(self._intake.inventory.chunks),
            send_timeout=timeouts.connect,
            deadline=Deadline(timeouts.stall + making),
        )
        require_promised(evidence, self.candidate)
        return evidence

    def _promises(self, root: str) -> bool:
        contents = self.candidate.contents
        return contents is None or contents.root == root

    def _confirm(self, evidence: Evidence | None, following: Following) -> None:
        """Ends the session. Raises PeerError where the source's weights have changed since it accepted."""
        accept, control, timeouts = self._accepted(), self._connections.control, self._options.timeouts
        control.send(Done(), timeouts.connect)
        deadline = Deadline(timeouts.stall)
        while isinstance(answer := not_ended(control.receive(deadline)), News):
            following.take(answer)

        assert isinstance(answer, Confirm)
        if answer.generation != accept.generation:
            self._has_denied = True
            raise PeerError(
                f"its weights changed during the transfer (generation {accept.generation} -> {answer.generation})"
            )
        if evidence is not None and evidence.digests and answer.root != evidence.root:
            self._has_denied = True
            raise ProtocolError("the root digest that it confirms is not the one of its chunks")
        if answer.filling:
            raise PeerError("it still loads these weights itself, and can confirm nothing")


@contextlib.contextmanager
def _closed_on_failure(memory: Memory) -> Iterator[None]:
    try:
        yield
    except BaseException:
        memory.close()
        raise


def _granted(answer: Message, wanted: Manifest) -> Accept:
    """`answer`, unless it is a refusal. Raises SourceRefused, naming the fields or tensors that differ."""
    if isinstance(answer, Refuse):
        raise refused(answer, wanted)
    assert isinstance(answer, Accept)
    return answer
