"""Fetches the weights of one rank from the first source that delivers them.

A source is asked with each transport that is left to try until it delivers or proves unusable; then comes the next
source. Only `SourceError` moves on; everything else is a fault of this process and propagates. Nothing is bound to
the model here: the caller gets an arena that holds all bytes, confirmed by the source, or an error with every reason.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vllm_ascend.model_loader.netloader.arena import Arena, allocate
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
)
from vllm_ascend.model_loader.netloader.identity import ModelIdentity, RankCoordinates
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

logger = logging.getLogger(__name__)

SHOWN_DIFFERENCES = 8
"""Differing tensors named in a message; the rest is counted."""


@dataclass(frozen=True)
class Request:
    """What is wanted."""

    identity: ModelIdentity
    coordinates: RankCoordinates
    manifest: Manifest


@dataclass(frozen=True)
class Fetched:
    """Where the weights came from; the caller closes `arena`."""

    arena: Arena
    source: Endpoint
    transport: str


@dataclass
class Client:
    """Fetches `request`.

    `phases` and `attempts` fill as it goes, so that they can be read after a failure too.
    """

    request: Request
    transports: Sequence[Transport]
    timeouts: Timeouts
    phases: Phases = field(default_factory=Phases)
    progress: Callable[[int], None] = lambda _: None
    attempts: list[Attempt] = field(default_factory=list)
    _arena: Arena | None = None

    def fetch(self, sources: Sequence[Endpoint]) -> Fetched:
        """Raises SourcesExhausted with every attempt's reason."""
        for source in sources:
            fetched = self._fetch_from(source)
            if fetched is not None:
                return fetched
        self._give_up_arena()
        raise SourcesExhausted([str(attempt) for attempt in self.attempts])

    def _fetch_from(self, source: Endpoint) -> Fetched | None:
        remaining = list(self.transports)
        while remaining:
            session = _Session(self, source, remaining)
            begun = time.perf_counter()
            try:
                return session.run()
            except (SourceError, TransportError) as error:
                self._note(Attempt(str(source), session.transport_name, str(error), time.perf_counter() - begun))
                if not isinstance(error, TransportError) or session.transport is None:
                    return None
                remaining.remove(session.transport)
        return None

    def _note(self, attempt: Attempt) -> None:
        self.attempts.append(attempt)
        logger.warning("could not load from %s", attempt)

    def arena_to_fill(self, *, mapped: bool) -> Arena:
        """The memory for transports that copy: made once, kept from source to source."""
        if self._arena is None:
            with self.phases("allocate"):
                self._arena = allocate(self.request.manifest, mapped=mapped)
        return self._arena

    def _give_up_arena(self) -> None:
        if self._arena is not None:
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
                    self._confirm(channel, accept)
            except (ProtocolError, OSError) as error:
                raise SourceFailed(str(error)) from error
        return Fetched(arena, self._source, accept.transport)

    def _join(self, channel: Channel) -> Accept:
        request, timeout = self._client.request, self._client.timeouts.connect
        offers = tuple(transport.offer() for transport in self._transports)
        channel.send(Join(request.identity, request.coordinates, request.manifest.digest, offers), timeout)
        accept = _granted(channel.receive(Deadline(timeout)), request.manifest)
        assert isinstance(accept, Accept)
        self.transport = next((each for each in self._transports if each.name == accept.transport), None)
        if self.transport is None:
            raise ProtocolError(f"the source chose the transport {accept.transport!r}, which was not offered")
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
            channel.send(Leave(str(error)), client.timeouts.connect)
            raise

    def _confirm(self, channel: Channel, accept: Accept) -> None:
        timeouts = self._client.timeouts
        channel.send(Done(), timeouts.connect)
        confirm = channel.receive(Deadline(timeouts.stall))
        assert isinstance(confirm, Confirm)
        if confirm.generation != accept.generation:
            raise SourceFailed(
                f"its weights changed during the transfer (generation {accept.generation} -> {confirm.generation})"
            )


def greet(source: Endpoint, timeout: float) -> Channel:
    """A greeted connection, which the caller closes. Raises SourceUnreachable or SourceRefused."""
    try:
        channel = connect(source, timeout)
    except OSError as error:
        raise SourceUnreachable(f"no connection within {timeout:g} s: {error.strerror or error}") from error
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
    shown = [str(difference) for difference in differences[:SHOWN_DIFFERENCES]]
    if len(differences) > SHOWN_DIFFERENCES:
        shown.append(f"and {len(differences) - SHOWN_DIFFERENCES} more")
    raise SourceRefused(f"it refused: {answer.reason}" + (f": {'; '.join(shown)}" if shown else ""))
