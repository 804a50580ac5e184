"""The client's side of one session: from Join to Confirm with one source, by one transport."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from vllm_ascend.model_loader.netloader.access import Access
from vllm_ascend.model_loader.netloader.arena import allocate
from vllm_ascend.model_loader.netloader.attributes import Plain
from vllm_ascend.model_loader.netloader.channel import Channel, ConnectionLost, Deadline
from vllm_ascend.model_loader.netloader.delivery import Delivery, Inventory
from vllm_ascend.model_loader.netloader.digests import Algorithm, Seal
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import (
    ProtocolError,
    SourceBusy,
    SourceError,
    SourceFailed,
    SourceRefused,
    TransportError,
    one_line,
)
from vllm_ascend.model_loader.netloader.greeting import greet
from vllm_ascend.model_loader.netloader.manifest import Manifest, chunks
from vllm_ascend.model_loader.netloader.memory import Memory
from vllm_ascend.model_loader.netloader.protocol import (
    DIGESTS_LIMIT,
    Accept,
    AskDigests,
    Confirm,
    Digests,
    Done,
    End,
    Join,
    Leave,
    Message,
    Refuse,
    State,
    Wait,
)
from vllm_ascend.model_loader.netloader.report import Phases
from vllm_ascend.model_loader.netloader.transport.base import Reception, Timeouts, Transport
from vllm_ascend.model_loader.netloader.weights import Request

logger = logging.getLogger(__name__)

SHOWN_DIFFERENCES: Final = 8
"""Differing tensors named in a message; the rest is counted."""
_EXPLANATION_SECONDS: Final = 1.0


@dataclass(frozen=True)
class Fetched:
    """The weights and where they came from; the caller closes `memory`.

    `fingerprint` is that of the checkpoint that the source knows them by, empty if it knows none. `seal` is what every
    byte was verified by, None where nothing was.
    """

    memory: Memory
    source: Endpoint
    transport: str
    session: bytes
    attributes: Mapping[str, Plain] = field(default_factory=dict)
    fingerprint: str = ""
    seal: Seal | None = None


@dataclass(frozen=True)
class Terms:
    """What a client wants, and how it wants it from every source.

    `allocate` makes the memory to fill, or raises UnsupportedModel; `check_attributes` raises ProtocolError for
    attributes that the model cannot take.
    """

    request: Request
    timeouts: Timeouts
    access: Access = field(default_factory=Access)
    verify: bool = True
    wait_timeout: float = 300.0
    allocate: Callable[[Manifest], Memory] = allocate
    check_attributes: Callable[[Mapping[str, Plain]], None] = lambda _: None
    progress: Callable[[int], None] = lambda _: None


class Session:
    """One conversation with `source`.

    `inventory` says what the memory of `memory_to_fill` holds already, and is added to. `may_wait` decides, told the
    source's referrals, whether to wait for a turn.
    """

    def __init__(
        self,
        terms: Terms,
        source: Endpoint,
        *,
        transports: Sequence[Transport],
        inventory: Inventory,
        memory_to_fill: Callable[[], Memory],
        may_wait: Callable[[Sequence[str]], bool],
        phases: Phases,
    ) -> None:
        self._terms = terms
        self._source = source
        self._transports = transports
        self._inventory = inventory
        self._memory_to_fill = memory_to_fill
        self._may_wait = may_wait
        self._phases = phases
        self.transport: Transport | None = None
        self.delivery: Delivery | None = None

    @property
    def transport_name(self) -> str | None:
        return self.transport.name if self.transport else None

    @property
    def received(self) -> int:
        """Bytes that came over the network."""
        return self.delivery.received if self.delivery else 0

    def run(self) -> Fetched:
        """Raises SourceError or TransportError."""
        timeouts = self._terms.timeouts
        with self._phases("connect"):
            control = greet(self._source, self._terms.access, timeouts.connect)
        with control:
            try:
                with self._phases("join"):
                    accept = self._join(control)
                    seal = self._seal(control, accept)
                with self._phases("transfer"):
                    memory = self._receive(control, accept, seal)
                with self._phases("verify"):
                    self._confirm(control, accept, memory, seal)
            except (ProtocolError, OSError) as error:
                raise SourceFailed(self._explanation(control, error)) from error
        return Fetched(
            memory, self._source, accept.transport, accept.session, accept.attributes, accept.fingerprint, seal
        )

    def _join(self, control: Channel) -> Accept:
        request, timeout = self._terms.request, self._terms.timeouts.connect
        offers = tuple(transport.offer() for transport in self._transports)
        control.send(Join(request.identity, request.coordinates, request.manifest.digest, offers), timeout)
        accept = _granted(self._turn(control), request.manifest)
        self.transport = next((each for each in self._transports if each.name == accept.transport), None)
        if self.transport is None:
            raise ProtocolError(f"the source chose the transport {accept.transport!r}, which was not offered")
        ours = request.identity.fingerprint
        if ours and accept.fingerprint not in ("", ours):
            raise ProtocolError(f"it accepted, but serves a checkpoint with the fingerprint {accept.fingerprint}")
        try:
            self._terms.check_attributes(accept.attributes)
        except ProtocolError as error:
            self._leave(control, error)
            raise SourceRefused(str(error)) from error
        return accept

    def _turn(self, control: Channel) -> Message:
        """The answer to Join, once it is this client's turn."""
        begun, timeouts, waiting = time.monotonic(), self._terms.timeouts, False
        while isinstance(answer := control.receive(Deadline(max(timeouts.connect, timeouts.stall))), Wait):
            if not self._may_wait(answer.referrals):
                raise SourceBusy(f"its turns are taken, {answer.ahead} clients come first", answer.referrals)
            if time.monotonic() - begun > self._terms.wait_timeout:
                raise SourceRefused(f"its turns were taken for WAIT_TIMEOUT, {self._terms.wait_timeout:g} s")
            if not waiting:
                logger.info("waiting for a turn at %s: %d clients come first", self._source, answer.ahead)
            waiting = True
        return answer

    def _seal(self, control: Channel, accept: Accept) -> Seal | None:
        """The digests of all chunks, where bytes are copied and to be verified."""
        assert self.transport is not None
        if not self._terms.verify or not self.transport.copies:
            return None
        if accept.verification is None:
            refusal = SourceRefused('it has no digests (its VERIFY is "off"), and VERIFY is "on" here')
            self._leave(control, refusal)
            raise refusal
        named = accept.verification
        algorithm = Algorithm.named(named.algorithm, named.salt, self._terms.access.token)
        digests: list[bytes] = []
        for first, count in chunks(len(self._inventory.chunks), DIGESTS_LIMIT):
            control.send(AskDigests(first, count), self._terms.timeouts.connect)
            answer = _not_ended(control.receive(Deadline(self._terms.timeouts.stall)))
            assert isinstance(answer, Digests)
            if len(answer.digests) != count:
                raise ProtocolError(f"the source sent {len(answer.digests)} digests: expected {count}")
            digests += answer.digests
        return Seal(algorithm, tuple(digests))

    def _receive(self, control: Channel, accept: Accept, seal: Seal | None) -> Memory:
        assert self.transport is not None

        def deliver() -> Delivery:
            memory = self._memory_to_fill()
            self.delivery = Delivery(memory, self._inventory, seal, self._terms.progress, str(self._source))
            return self.delivery

        def progress(nbytes: int) -> None:
            self._terms.progress(nbytes - self._inventory.shown)  # of which some may be another source's
            self._inventory.shown = nbytes

        reception = Reception(
            parameters=accept.parameters,
            nbytes=self._terms.request.manifest.nbytes,
            control=control,
            connect=self._connect_further,
            session=accept.session,
            deliver=deliver,
            progress=progress,
            timeouts=self._terms.timeouts,
        )
        try:
            memory = self.transport.receive(reception)
        except TransportError as error:
            self._leave(control, error)
            raise
        finally:
            if self.delivery is not None:
                self.delivery.close()
        if self.delivery is not None:
            self._inventory.require_complete()
        return memory

    def _connect_further(self) -> Channel:
        try:
            return greet(self._source, self._terms.access, self._terms.timeouts.connect)
        except SourceError as error:  # it answered a moment ago, so it may do so again
            raise ConnectionLost(f"it takes no data connection: {error}") from error

    def _confirm(self, control: Channel, accept: Accept, memory: Memory, seal: Seal | None) -> None:
        timeouts = self._terms.timeouts
        try:
            control.send(Done(), timeouts.connect)
            confirm = _not_ended(control.receive(Deadline(timeouts.stall)))
            assert isinstance(confirm, Confirm)
            if confirm.generation != accept.generation:
                raise ProtocolError(
                    f"its weights changed during the transfer (generation {accept.generation} -> {confirm.generation})"
                )
            if seal is not None and seal.digests and confirm.digest != seal.algorithm.whole(seal.digests):
                raise ProtocolError("the digest of the whole is not that of the chunks")
        except BaseException:
            if memory.servable:  # the source's own pages: no other transport can fill them
                memory.close()
            raise

    def _leave(self, control: Channel, reason: Exception) -> None:
        with contextlib.suppress(ProtocolError):  # whether the source hears of it or not, the next way is tried
            control.send(Leave(one_line(str(reason))), self._terms.timeouts.connect)

    def _explanation(self, control: Channel, error: Exception) -> str:
        """Why the source ended the session, if it did: it breaks the transfer off first, and then says so."""
        if not isinstance(error, ConnectionLost):
            if control.state is State.TRANSFER:
                self._leave(control, error)
            return str(error)
        with contextlib.suppress(ProtocolError, OSError):
            last = control.receive(Deadline(_EXPLANATION_SECONDS))
            if isinstance(last, End):
                return f"it ended the session: {one_line(last.reason)}"
        return str(error)


def _not_ended(message: Message) -> Message:
    if isinstance(message, End):
        raise ProtocolError(f"it ended the session: {one_line(message.reason)}")
    return message


def _granted(answer: Message, manifest: Manifest) -> Accept:
    """`answer`, unless it is a refusal. Raises SourceRefused, naming the fields or tensors that differ."""
    if isinstance(answer, Accept):
        return answer
    assert isinstance(answer, Refuse)
    differences = [difference.flipped() for difference in answer.differences]
    if answer.manifest:
        differences = list(manifest.mismatch(Manifest.decode(answer.manifest))) or differences
    shown = [one_line(str(difference)) for difference in differences[:SHOWN_DIFFERENCES]]
    if len(differences) > SHOWN_DIFFERENCES:
        shown.append(f"and {len(differences) - SHOWN_DIFFERENCES} more")
    details = f": {'; '.join(shown)}" if shown else ""
    raise SourceRefused(f"it refused: {one_line(answer.reason)}{details}", answer.referrals)
