"""Fetches the weights of one rank from the first source that delivers them.

A source is asked with each transport that is left to try until it delivers or proves unusable; then comes the next
source. Only `SourceError` moves on; everything else is a fault of this process and propagates. Nothing is bound to
the model here: the caller gets an arena that holds all bytes, confirmed by the source, or an error with every reason.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from vllm_ascend.model_loader.netloader.arena import Arena, allocate
from vllm_ascend.model_loader.netloader.attributes import Plain
from vllm_ascend.model_loader.netloader.channel import Channel, Deadline, connect
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import (
    ProtocolError,
    SourceError,
    SourceFailed,
    SourceRefused,
    SourcesExhausted,
    SourceUnreachable,
    TransportError,
    one_line,
)
from vllm_ascend.model_loader.netloader.manifest import Manifest
from vllm_ascend.model_loader.netloader.protocol import (
    PROTOCOL_VERSION,
    Accept,
    Confirm,
    Done,
    Hello,
    Inquire,
    Join,
    Leave,
    Message,
    Refuse,
    Status,
    Welcome,
)
from vllm_ascend.model_loader.netloader.report import Attempt, Phases
from vllm_ascend.model_loader.netloader.transport.base import Reception, Timeouts, Transport
from vllm_ascend.model_loader.netloader.weights import Request

logger = logging.getLogger(__name__)

REFERRALS_FOLLOWED = 8
SHOWN_DIFFERENCES = 8
"""Differing tensors named in a message; the rest is counted."""


@dataclass(frozen=True)
class Fetched:
    """The weights and where they came from; the caller closes `arena`.

    `fingerprint` is that of the checkpoint that the source knows them by, empty if it knows none.
    """

    arena: Arena
    source: Endpoint
    transport: str
    attributes: Mapping[str, Plain] = field(default_factory=dict)
    fingerprint: str = ""


@dataclass
class Client:
    """Fetches `request`.

    `check_attributes` raises ProtocolError for attributes that the model cannot take. `phases` and `attempts` fill as
    it goes, so that they can be read after a failure too.
    """

    request: Request
    transports: Sequence[Transport]
    timeouts: Timeouts
    phases: Phases = field(default_factory=Phases)
    progress: Callable[[int], None] = lambda _: None
    check_attributes: Callable[[Mapping[str, Plain]], None] = lambda _: None
    attempts: list[Attempt] = field(default_factory=list)
    _arena: Arena | None = None

    def fetch(self, sources: Sequence[Endpoint]) -> Fetched:
        """Raises SourcesExhausted with every attempt's reason."""
        waiting, known = deque(sources), set(sources)
        while waiting:
            source = waiting.popleft()
            # A referral is followed once: the ranks of an instance know each other.
            outcome = self._fetch_from(source, follow_referrals=source in sources)
            if isinstance(outcome, Fetched):
                self._give_up_arena(unless=outcome.arena)
                return outcome
            referrals = [each for each in _referred(source, outcome[:REFERRALS_FOLLOWED]) if each not in known]
            known.update(referrals)
            waiting.extendleft(reversed(referrals))
        self._give_up_arena()
        raise SourcesExhausted([str(attempt) for attempt in self.attempts])

    def _fetch_from(self, source: Endpoint, *, follow_referrals: bool) -> Fetched | tuple[str, ...]:
        """What `source` delivered, or the endpoints that it refers to."""
        remaining = list(self.transports)
        while remaining:
            session = _Session(self, source, remaining)
            begun = time.perf_counter()
            try:
                return session.run()
            except (SourceError, TransportError) as error:
                if follow_referrals and isinstance(error, SourceRefused) and error.referrals:
                    logger.info("%s refers to %s: %s", source, ", ".join(error.referrals), error)
                    return error.referrals
                self._note(Attempt(str(source), session.transport_name, str(error), time.perf_counter() - begun))
                if not isinstance(error, TransportError) or session.transport is None:
                    return ()
                remaining.remove(session.transport)
        return ()

    def _note(self, attempt: Attempt) -> None:
        self.attempts.append(attempt)
        logger.warning("could not load from %s", attempt)

    def arena_to_fill(self, *, mapped: bool) -> Arena:
        """The memory for transports that copy: made once, kept from source to source."""
        if self._arena is None:
            with self.phases("allocate"):
                self._arena = allocate(self.request.manifest, mapped=mapped)
        return self._arena

    def _give_up_arena(self, unless: Arena | None = None) -> None:
        if self._arena is not None and self._arena is not unless:
            self._arena.close()
        self._arena = None


class _Session:
    """One conversation with one source."""

    def __init__(self, client: Client, source: Endpoint, transports: Sequence[Transport]) -> None:
        self._client = client
        self._source = source
        self._transports = transports
        self.transport: Transport | None = None

    @property
    def transport_name(self) -> str | None:
        return self.transport.name if self.transport else None

    def run(self) -> Fetched:
        """Raises SourceError or TransportError."""
        with self._client.phases("connect"):
            channel = greet(self._source, self._client.timeouts.connect)
        with channel:
            try:
                with self._client.phases("join"):
                    accept = self._join(channel)
                with self._client.phases("transfer"):
                    arena = self._receive(channel, accept)
                with self._client.phases("verify"):
                    self._confirm(channel, accept, arena)
            except (ProtocolError, OSError) as error:
                raise SourceFailed(str(error)) from error
        return Fetched(arena, self._source, accept.transport, accept.attributes, accept.fingerprint)

    def _join(self, channel: Channel) -> Accept:
        request, timeout = self._client.request, self._client.timeouts.connect
        offers = tuple(transport.offer() for transport in self._transports)
        channel.send(Join(request.identity, request.coordinates, request.manifest.digest, offers), timeout)
        accept = _granted(channel.receive(Deadline(timeout)), request.manifest)
        assert isinstance(accept, Accept)
        self.transport = next((each for each in self._transports if each.name == accept.transport), None)
        if self.transport is None:
            raise ProtocolError(f"the source chose the transport {accept.transport!r}, which was not offered")
        try:
            self._client.check_attributes(accept.attributes)
        except ProtocolError as error:
            self._leave(channel, error)
            raise
        return accept

    def _receive(self, channel: Channel, accept: Accept) -> Arena:
        assert self.transport is not None
        client = self._client
        reception = Reception(
            source=self._source,
            session=accept.session,
            parameters=accept.parameters,
            nbytes=client.request.manifest.nbytes,
            allocate=client.arena_to_fill,
            progress=client.progress,
            timeouts=client.timeouts,
        )
        try:
            return self.transport.receive(reception)
        except TransportError as error:
            self._leave(channel, error)
            raise

    def _leave(self, channel: Channel, reason: Exception) -> None:
        with contextlib.suppress(ProtocolError):  # whether the source hears of it or not, the next way is tried
            channel.send(Leave(one_line(str(reason))), self._client.timeouts.connect)

    def _confirm(self, channel: Channel, accept: Accept, arena: Arena) -> None:
        timeouts = self._client.timeouts
        try:
            channel.send(Done(), timeouts.connect)
            confirm = channel.receive(Deadline(timeouts.stall))
            assert isinstance(confirm, Confirm)
            if confirm.generation != accept.generation:
                raise SourceFailed(
                    f"its weights changed during the transfer (generation {accept.generation} -> {confirm.generation})"
                )
        except BaseException:
            if arena.servable:  # the source's own pages: no other transport can fill them
                arena.close()
            raise


def greet(source: Endpoint, timeout: float) -> Channel:
    """A greeted connection, which the caller closes. Raises SourceUnreachable or SourceRefused."""
    try:
        channel = connect(source, timeout)
    except (OSError, UnicodeError) as error:  # the latter for what cannot be a host name
        raise SourceUnreachable(f"no connection: {getattr(error, 'strerror', None) or error}") from error
    try:
        channel.send(Hello(), timeout)
        welcome = _granted(channel.receive(Deadline(timeout)), None)
        assert isinstance(welcome, Welcome)
        if welcome.protocol != PROTOCOL_VERSION:
            raise SourceRefused(f"it speaks protocol {welcome.protocol}: expected {PROTOCOL_VERSION}")
    except ProtocolError as error:
        channel.close()
        raise SourceUnreachable(f"it did not greet: {error}") from error
    except BaseException:
        channel.close()
        raise
    return channel


def inquire(source: Endpoint, timeout: float) -> Status:
    """What `source` holds. Raises SourceError."""
    with greet(source, timeout) as channel:
        try:
            channel.send(Inquire(), timeout)
            status = channel.receive(Deadline(timeout))
        except ProtocolError as error:
            raise SourceFailed(str(error)) from error
    assert isinstance(status, Status)
    return status


def _granted(answer: Message, manifest: Manifest | None) -> Message:
    """`answer`, unless it is a refusal. Raises SourceRefused, naming the fields or tensors that differ."""
    if not isinstance(answer, Refuse):
        return answer
    differences = [difference.flipped() for difference in answer.differences]
    if answer.manifest and manifest is not None:
        differences = list(manifest.mismatch(Manifest.decode(answer.manifest))) or differences
    shown = [one_line(str(difference)) for difference in differences[:SHOWN_DIFFERENCES]]
    if len(differences) > SHOWN_DIFFERENCES:
        shown.append(f"and {len(differences) - SHOWN_DIFFERENCES} more")
    details = f": {'; '.join(shown)}" if shown else ""
    raise SourceRefused(f"it refused: {one_line(answer.reason)}{details}", answer.referrals)


def _referred(source: Endpoint, referrals: Sequence[str]) -> Iterator[Endpoint]:
    """The endpoints in `referrals`, those without a host on that of `source`; what is none is left out."""
    for referral in referrals:
        with contextlib.suppress(ValueError):
            own_host = str(source).rpartition(":")[0]
            yield Endpoint.parse(own_host + referral if referral.startswith(":") else referral)
