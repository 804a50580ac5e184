"""The client's side of one session: from Join to Confirm with one source, by one transport.

`ask` joins and says whether it is this client's turn. If it is not, the session keeps its place in the source's queue
for as long as its connection is open, and `await_turn` returns, in whatever thread, when the turn has come. `take` then
brings the weights. Another thread may break a session off at any time; chunks that have passed by then are kept.

Where the transport copies, the session opens a `Delivery` of the missing chunks, and each is verified as it arrives.
Where it maps, the pages are the source's own: they are taken as they are from a source that is trusted, and read and
verified when they come from a replica, which is trusted with nothing but time.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from vllm_ascend.model_loader.netloader.client.connections import Connections
from vllm_ascend.model_loader.netloader.client.intake import Intake
from vllm_ascend.model_loader.netloader.client.options import FetchOptions
from vllm_ascend.model_loader.netloader.client.order import Candidate
from vllm_ascend.model_loader.netloader.client.verification import (
    Evidence,
    not_ended,
    obtain,
    require_promised,
    verify,
)
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import PeerError, ProtocolError
from vllm_ascend.model_loader.netloader.report import Phases
from vllm_ascend.model_loader.netloader.transport.base import (
    CopyingTransport,
    MappingTransport,
    Reception,
    Transport,
)
from vllm_ascend.model_loader.netloader.transport.delivery import Delivery
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

    `address` is where `source` was reached: its name may stand for several. `fingerprint` is that of the checkpoint
    that the weights are known by, empty where there is none. `evidence` is what every byte was verified by, None where
    nothing was verified.
    """

    memory: Memory
    source: Endpoint
    address: Endpoint
    transport: str
    session: bytes
    attributes: Mapping[str, AttributeValue] = field(default_factory=dict)
    fingerprint: str = ""
    evidence: Evidence | None = None


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
        phases: Phases,
    ) -> None:
        """`transports` are offered in this order; `intake` takes in what they bring.

        `may_leave` says whether there is another way to the weights, so that a source that is too slow can be left.
        """
        self.candidate = candidate
        self.transport: Transport | None = None
        """The transport that the source has chosen, None before it has."""
        self.broken_off = False
        self._options = options
        self._transports = tuple(transports)
        self._intake = intake
        self._may_leave = may_leave
        self._phases = phases
        self._connections = Connections(candidate.endpoint, options.access, options.timeouts.connect)
        self._accept: Accept | None = None
        self._delivery: Delivery | None = None
        self._begun = time.perf_counter()

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
    def received(self) -> int:
        """Bytes that came over the network, those of damaged chunks included."""
        return self._delivery.received if self._delivery is not None else 0

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
        with self._phases("connect"):
            control = self._connections.open()

        with self._phases("join"), self._connections.failures_translated():
            if self.candidate.is_replica:
                control.limit_frames(STRANGER_REPLY_LIMIT)
            request = self._options.request
            offers = tuple(transport.offer() for transport in self._transports)
            join = Join(request.identity, request.coordinates, request.manifest.digest, offers)
            control.send(join, self._options.timeouts.connect)
            return self._next_answer()

    def await_turn(self, told: Callable[[Wait], None]) -> None:
        """Returns when the turn has come; `told` hears what the source says until then. Raises as `ask`."""
        with self._connections.failures_translated():
            while (wait := self._next_answer()) is not None:
                told(wait)

    def take(self) -> Fetched:
        """Brings the weights, once it is this client's turn. Raises SourceError or TransportError."""
        accept = self._accepted()
        with self._connections.failures_translated():
            match self.transport:
                case CopyingTransport() as transport:
                    memory, evidence = self._copy(transport)
                case MappingTransport() as transport:
                    memory, evidence = self._map(transport)
                case _:
                    raise AssertionError("a transport either copies or maps")

        contents = self.candidate.contents
        return Fetched(
            memory=memory,
            source=self.candidate.endpoint,
            address=self.address,
            transport=accept.transport,
            session=accept.session,
            attributes=accept.attributes,
            fingerprint=accept.fingerprint if contents is None else contents.fingerprint,
            evidence=evidence,
        )

    def break_off(self) -> None:
        """Ends the session from another thread, which must call `shut_down` next; does not block."""
        self.broken_off = True
        if self._delivery is not None:
            self._delivery.break_off()

    def shut_down(self, patience: float = 0.0) -> None:
        """Ends whatever the session still waits for. Chunks that arrive within `patience` seconds are taken in.

        From another thread than the session's own.
        """
        if self._delivery is None or not self._delivery.over.wait(patience):
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

    def _copy(self, transport: CopyingTransport) -> tuple[Memory, Evidence | None]:
        """Fills the client's own memory. Where that fails, what has passed stays there for the next source."""
        evidence: Evidence | None = None
        if self._options.verify or self.candidate.is_replica:
            with self._phases("join"):
                evidence = self._obtain_evidence()

        with self._phases("transfer"), contextlib.closing(self._open_delivery(evidence)) as delivery:
            transport.receive(self._reception(), delivery)
        self._intake.require_complete()

        with self._phases("verify"):
            self._confirm(evidence)
        return delivery.memory, evidence

    def _map(self, transport: MappingTransport) -> tuple[Memory, Evidence | None]:
        """Adopts the source's own pages, which no other source can fill: where that fails, they are given up."""
        with self._phases("transfer"):
            memory = transport.adopt(self._reception())

        evidence: Evidence | None = None
        with self._phases("verify"), _closed_on_failure(memory):
            self._intake.progress.set(memory.nbytes)
            if self.candidate.is_replica:
                evidence = self._obtain_evidence()
                verify(memory, self._intake.chunks, evidence)
            self._confirm(evidence)
        return memory, evidence

    def _reception(self) -> Reception:
        accept = self._accepted()
        return Reception(
            parameters=accept.parameters,
            nbytes=self._options.request.manifest.nbytes,
            session=accept.session,
            control=self._connections.control,
            connect=self._connections.connect,
            timeouts=self._options.timeouts,
        )

    def _open_delivery(self, evidence: Evidence | None) -> Delivery:
        least = LeastRate(self._options.min_bandwidth, self._options.timeouts.stall, self._may_leave)
        digests = None if evidence is None else evidence.digests
        # Whoever breaks the session off sets the flag first, so one of both sees what the other has done.
        self._delivery = self._intake.delivery(digests, str(self.candidate.endpoint), least)
        if self.broken_off:
            self._delivery.break_off()
        return self._delivery

    def _obtain_evidence(self) -> Evidence:
        manifest, timeouts = self._options.request.manifest, self._options.timeouts
        making = 0.0 if self.candidate.is_replica else manifest.nbytes / LEAST_DIGEST_RATE
        evidence = obtain(
            self._connections.control,
            self._accepted(),
            manifest,
            count=len(self._intake.chunks),
            send_timeout=timeouts.connect,
            deadline=Deadline(timeouts.stall + making),
        )
        require_promised(evidence, self.candidate)
        return evidence

    def _confirm(self, evidence: Evidence | None) -> None:
        """Ends the session. Raises PeerError where the source's weights have changed since it accepted."""
        accept, control, timeouts = self._accepted(), self._connections.control, self._options.timeouts
        control.send(Done(), timeouts.connect)
        confirm = not_ended(control.receive(Deadline(timeouts.stall)))
        assert isinstance(confirm, Confirm)
        if confirm.generation != accept.generation:
            raise PeerError(
                f"its weights changed during the transfer (generation {accept.generation} -> {confirm.generation})"
            )
        if evidence is not None and evidence.digests and confirm.root != evidence.root:
            raise ProtocolError("the root digest that it confirms is not the one of its chunks")


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
