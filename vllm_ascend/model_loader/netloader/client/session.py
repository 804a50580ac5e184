"""The client's side of one session: from Join to Confirm with one source, by one transport.

`ask` joins and says whether it is this client's turn. If not, the connection keeps its place in the queue for as long
as it is open, and `await_turn`, in whatever thread, returns when the turn has come. `take` then brings the weights.
Another thread may `break_off` a session at any time: chunks that have passed by then stay.

A replica, which another source has named, is trusted with nothing but time: what it holds must have the root digest
that the other has told, by whatever transport it comes.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from vllm_ascend.model_loader.netloader.client.options import FetchOptions
from vllm_ascend.model_loader.netloader.client.route import Candidate
from vllm_ascend.model_loader.netloader.client.verification import (
    Evidence,
    not_ended,
    obtain,
    require_promised,
    verify,
)
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import (
    ConnectionLost,
    PeerError,
    ProtocolError,
    SourceError,
    SourceFailed,
    SourceRefused,
    SourceTooSlow,
    TransportError,
    one_line,
)
from vllm_ascend.model_loader.netloader.report import Phases
from vllm_ascend.model_loader.netloader.transport.base import Reception, Transport
from vllm_ascend.model_loader.netloader.transport.delivery import Delivery, Inventory
from vllm_ascend.model_loader.netloader.transport.rate import LeastRate
from vllm_ascend.model_loader.netloader.weights.manifest import Manifest
from vllm_ascend.model_loader.netloader.weights.memory import Memory
from vllm_ascend.model_loader.netloader.wire.channel import Channel, Deadline
from vllm_ascend.model_loader.netloader.wire.greeting import greet
from vllm_ascend.model_loader.netloader.wire.messages import (
    STRANGER_REPLY_LIMIT,
    Accept,
    AttributeValue,
    Confirm,
    Done,
    End,
    Join,
    Leave,
    Message,
    Refuse,
    Wait,
)
from vllm_ascend.model_loader.netloader.wire.refusal import refused

logger = logging.getLogger(__name__)

LEAST_DIGEST_RATE: Final = 100 << 20
"""Bytes per second that a source digests at the very least, with the little time that inference leaves it. Whoever is
named as a replica has made its digests.
"""
_EXPLANATION_SECONDS: Final = 1.0


@dataclass(frozen=True)
class Fetched:
    """The weights and where they came from; the caller closes `memory`.

    `address` is where `source` was reached: its name may stand for several. `fingerprint` is that of the checkpoint
    that the weights are known by, empty if there is none. `evidence` is what every byte was verified by, None where
    nothing was.
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
    """One conversation with `candidate`, over connections to one address. Whoever made it closes it.

    `inventory` says what the memory of `memory_to_fill` holds already, and is added to. `may_be_left` says whether
    there is another way to the weights, so that one that is too slow is left.
    """

    def __init__(
        self,
        options: FetchOptions,
        candidate: Candidate,
        *,
        transports: Sequence[Transport],
        inventory: Inventory,
        memory_to_fill: Callable[[], Memory],
        may_be_left: Callable[[], bool],
        phases: Phases,
    ) -> None:
        self.candidate = candidate
        self.transport: Transport | None = None
        self.delivery: Delivery | None = None
        self.address: Endpoint | None = None
        """Where the source was reached."""
        self.broken_off = False
        self._begun = time.perf_counter()
        self._options = options
        self.transports = transports
        self._inventory = inventory
        self._memory_to_fill = memory_to_fill
        self._may_be_left = may_be_left
        self._phases = phases
        self._lock = threading.Lock()
        self._channels: list[Channel] = []
        self._control: Channel | None = None
        self._accept: Accept | None = None

    @property
    def transport_name(self) -> str | None:
        return self.transport.name if self.transport else None

    @property
    def age(self) -> float:
        """Seconds since it was made."""
        return time.perf_counter() - self._begun

    @property
    def accepted(self) -> bool:
        """Whether the source lets this client take the weights."""
        return self._accept is not None

    @property
    def received(self) -> int:
        """Bytes that came over the network."""
        return self.delivery.received if self.delivery else 0

    def ask(self) -> Wait | None:
        """Joins. What the source says to a client that has to wait, None where the turn has come.

        Raises SourceUnreachable, SourceRefused or SourceFailed.
        """
        with self._phases("connect"):
            self._control = self._connect(self.candidate.endpoint)
        with self._phases("join"), self._failures_translated():
            self.address = self._control.peer
            if self.candidate.is_replica:
                self._control.limit_frames(STRANGER_REPLY_LIMIT)
            request, timeouts = self._options.request, self._options.timeouts
            offers = tuple(transport.offer() for transport in self.transports)
            join = Join(request.identity, request.coordinates, request.manifest.digest, offers)
            self._control.send(join, timeouts.connect)
            return self._next_answer()

    def await_turn(self, told: Callable[[Wait], None]) -> None:
        """Returns when the turn has come; `told` hears what the source says meanwhile. Raises as `ask`."""
        with self._failures_translated():
            while (wait := self._next_answer()) is not None:
                told(wait)

    def _next_answer(self) -> Wait | None:
        """Notes what the source accepts. A source that was named by another has to answer at once."""
        timeouts, control = self._options.timeouts, self._opened()
        seconds = timeouts.connect if self.candidate.is_replica else max(timeouts.connect, timeouts.stall)
        answer = control.receive(Deadline(seconds))
        if isinstance(answer, Wait):
            return answer
        accept = _granted(answer, self._options.request.manifest)
        self.transport = next((each for each in self.transports if each.name == accept.transport), None)
        if self.transport is None:
            raise ProtocolError(f"the source chose the transport {accept.transport!r}, which was not offered")
        ours = self._options.request.identity.fingerprint
        if ours and accept.fingerprint not in ("", ours):
            raise ProtocolError(f"it accepted, but serves a checkpoint with the fingerprint {accept.fingerprint}")
        try:
            self._options.check_attributes(accept.attributes)
        except SourceRefused as refusal:
            self._leave(refusal)
            raise
        self._accept = accept
        return None

    def take(self) -> Fetched:
        """Brings the weights, once the turn has come. Raises SourceError or TransportError."""
        with self._failures_translated():
            accept, control, transport = self._accept, self._opened(), self.transport
            assert accept is not None, "it is not this client's turn"
            assert transport is not None
            evidence: Evidence | None = None
            if transport.traits.copies and (self._options.verify or self.candidate.is_replica):
                with self._phases("join"):
                    evidence = self._evidence(control, accept)
            with self._phases("transfer"):
                memory = self._receive(control, accept, evidence)
            with self._phases("verify"):
                if not transport.traits.copies and self.candidate.is_replica:
                    evidence = self._verify_adopted(control, accept, memory)
                self._confirm(control, accept, memory, evidence)

        contents = self.candidate.contents
        return Fetched(
            memory=memory,
            source=self.candidate.endpoint,
            address=self.address or self.candidate.endpoint,
            transport=accept.transport,
            session=accept.session,
            attributes=accept.attributes,
            fingerprint=accept.fingerprint if contents is None else contents.fingerprint,
            evidence=evidence,
        )

    def break_off(self, patience: float = 0.0) -> None:
        """Ends it from another thread: chunks that arrive within `patience` seconds are still taken in."""
        self.broken_off = True
        delivery = self.delivery
        if delivery is not None and patience:
            delivery.break_off()
            if delivery.over.wait(patience):
                return
        with self._lock:
            for channel in self._channels:
                channel.shut_down()

    def close(self) -> None:
        """Gives up the place in the queue, or the turn. Idempotent."""
        if self._control is not None:
            self._control.close()

    def _evidence(self, control: Channel, accept: Accept) -> Evidence:
        try:
            manifest, timeouts = self._options.request.manifest, self._options.timeouts
            making = 0.0 if self.candidate.is_replica else manifest.nbytes / LEAST_DIGEST_RATE
            evidence = obtain(
                control,
                accept,
                manifest,
                count=len(self._inventory.chunks),
                send_timeout=timeouts.connect,
                deadline=Deadline(timeouts.stall + making),
            )
            require_promised(evidence, self.candidate)
        except SourceRefused as refusal:
            self._leave(refusal)
            raise
        return evidence

    def _receive(self, control: Channel, accept: Accept, evidence: Evidence | None) -> Memory:
        assert self.transport is not None
        reception = Reception(
            parameters=accept.parameters,
            nbytes=self._options.request.manifest.nbytes,
            control=control,
            connect=self._connect_further,
            session=accept.session,
            deliver=lambda: self._deliver(evidence),
            progress=self._progress_at_once,
            timeouts=self._options.timeouts,
        )
        try:
            memory = self.transport.receive(reception)
        except TransportError as error:
            self._leave(error)
            raise
        finally:
            if self.delivery is not None:
                self.delivery.close()
        if self.delivery is not None:
            self._inventory.require_complete()
        return memory

    def _verify_adopted(self, control: Channel, accept: Accept, memory: Memory) -> Evidence:
        """Pages that somebody else has filled are taken as they are from a source that is trusted, and only from it."""
        with closed_on_failure(memory):
            evidence = self._evidence(control, accept)
            verify(memory, self._inventory.chunks, evidence)
        return evidence

    def _deliver(self, evidence: Evidence | None) -> Delivery:
        memory, options = self._memory_to_fill(), self._options
        digests = None if evidence is None else evidence.digests
        may_be_left = (lambda: True) if self.candidate.is_replica else self._may_be_left
        least = LeastRate(options.min_bandwidth, options.timeouts.stall, may_be_left)
        delivery = self.delivery = Delivery(
            memory,
            self._inventory,
            digests,
            progress=options.progress,
            source=str(self.candidate.endpoint),
            least_rate=least,
        )
        if self.broken_off:
            delivery.break_off()
        return delivery

    def _progress_at_once(self, nbytes: int) -> None:
        """For bytes that come without a delivery; some may have come from another source before."""
        self._options.progress(nbytes - self._inventory.shown)
        self._inventory.shown = nbytes

    def _connect(self, endpoint: Endpoint) -> Channel:
        channel = greet(endpoint, self._options.access, self._options.timeouts.connect)
        with self._lock:
            self._channels.append(channel)
            broken_off = self.broken_off
        if broken_off:
            channel.shut_down()
        return channel

    def _connect_further(self) -> Channel:
        """To the address that the control connection has reached: a name may stand for several servers."""
        try:
            return self._connect(self.address or self.candidate.endpoint)
        except SourceError as error:  # it answered a moment ago, so it may do so again
            raise ConnectionLost(f"it takes no data connection: {error}") from error

    def _confirm(self, control: Channel, accept: Accept, memory: Memory, evidence: Evidence | None) -> None:
        timeouts = self._options.timeouts
        # The source's own pages, which no other transport can fill; what a session fills stays for the next.
        with closed_on_failure(memory) if memory.servable else contextlib.nullcontext():
            control.send(Done(), timeouts.connect)
            confirm = not_ended(control.receive(Deadline(timeouts.stall)))
            assert isinstance(confirm, Confirm)
            if confirm.generation != accept.generation:
                raise PeerError(
                    f"its weights changed during the transfer (generation {accept.generation} -> {confirm.generation})"
                )
            if evidence is not None and evidence.digests and confirm.root != evidence.root:
                raise ProtocolError("the root digest that it confirms is not the one of its chunks")

    def _opened(self) -> Channel:
        assert self._control is not None, "the source has not been asked"
        return self._control

    def _leave(self, reason: Exception) -> None:
        control = self._opened()
        if not control.may_send(Leave):
            return
        with contextlib.suppress(PeerError, OSError):  # whether it hears of it or not, the next way is tried
            control.send(Leave(one_line(str(reason))), self._options.timeouts.connect)

    @contextlib.contextmanager
    def _failures_translated(self) -> Iterator[None]:
        """What the source has done wrong becomes SourceError; what this process lacks is nobody else's fault."""
        try:
            yield
        except SourceTooSlow as error:
            self._leave(error)
            raise
        except PeerError as error:
            raise SourceFailed(self._explanation(error)) from error
        except OSError as error:
            self._leave(error)
            raise TransportError(f"this process cannot go on: {error}") from error

    def _explanation(self, error: PeerError) -> str:
        """Why the source ended the session, if it did: it breaks the transfer off first, and then says so."""
        if not isinstance(error, ConnectionLost):
            self._leave(error)
            return str(error)
        with contextlib.suppress(PeerError, OSError):
            last = self._opened().receive(Deadline(_EXPLANATION_SECONDS))
            if isinstance(last, End):
                return f"it ended the session: {one_line(last.reason)}"
        return str(error)


@contextlib.contextmanager
def closed_on_failure(memory: Memory) -> Iterator[None]:
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
