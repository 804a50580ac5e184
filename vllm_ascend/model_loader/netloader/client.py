"""Fetches the weights of one rank from the first sources that deliver them, wherever they are by now.

A source is asked with each transport that is left to try until it delivers or proves unusable; then comes the next
source. What has arrived and passed stays: the next source brings only what is missing. A source that failed in the
middle or is busy is asked again, after a pause, when the others have been; one that refuses or cannot be reached is
not. Only `SourceError` moves on; everything else is a fault of this process and propagates. Nothing is bound to the
model here: the caller gets memory that holds all bytes, confirmed by the last source, or an error with every reason.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from vllm_ascend.model_loader.netloader import backoff
from vllm_ascend.model_loader.netloader.access import Access
from vllm_ascend.model_loader.netloader.channel import Deadline
from vllm_ascend.model_loader.netloader.client_session import Fetched, Session, Terms
from vllm_ascend.model_loader.netloader.delivery import Inventory
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import (
    ProtocolError,
    SourceBusy,
    SourceError,
    SourceFailed,
    SourceRefused,
    SourcesExhausted,
    TransportError,
    one_line,
)
from vllm_ascend.model_loader.netloader.greeting import greet
from vllm_ascend.model_loader.netloader.memory import Memory
from vllm_ascend.model_loader.netloader.protocol import Announce, Inquire, Status
from vllm_ascend.model_loader.netloader.report import Attempt, Phases
from vllm_ascend.model_loader.netloader.transport.base import Transport

logger = logging.getLogger(__name__)

TRIES: Final = 3
"""How often a source may fail in the middle before it is given up."""
REFERRALS_FOLLOWED: Final = 64
"""Endpoints that are tried because others named them."""
_REASON_LIMIT: Final = 10_000
"""Characters; a refusal names eight tensors, and says of each what differs."""


@dataclass
class Client:
    """Fetches what `terms` ask for.

    `phases` and `attempts` fill as it goes, so that they can be read after a failure too; `received` counts bytes by
    source.
    """

    terms: Terms
    transports: Sequence[Transport]
    phases: Phases = field(default_factory=Phases)
    attempts: list[Attempt] = field(default_factory=list)
    received: Counter[str] = field(default_factory=Counter)
    pause: Callable[[float], None] = time.sleep
    _memory: Memory | None = None

    def fetch(self, sources: Sequence[Endpoint]) -> Fetched:
        """Raises SourcesExhausted with every attempt's reason."""
        try:
            fetched = _Search(self, sources).run()
        except BaseException:
            self._give_up_memory()
            raise
        self._give_up_memory(unless=fetched.memory)
        return fetched

    def memory_to_fill(self) -> Memory:
        """For transports that copy: made once, kept from source to source."""
        if self._memory is None:
            with self.phases("allocate"):
                self._memory = self.terms.allocate(self.terms.request.manifest)
        return self._memory

    def _give_up_memory(self, unless: Memory | None = None) -> None:
        if self._memory is not None and self._memory is not unless:
            self._memory.close()
        self._memory = None


class _Search:
    """The way through the sources, and whoever they refer to."""

    def __init__(self, client: Client, sources: Sequence[Endpoint]) -> None:
        self._client = client
        self._configured = frozenset(sources)
        self._known = set(sources)
        self._next = deque(sources)
        self._later: list[Endpoint] = []
        self._failures: Counter[Endpoint] = Counter()
        self._referred: list[str] = []
        self._inventory = Inventory(client.terms.request.manifest.nbytes)

    def run(self) -> Fetched:
        pauses = backoff.pauses()
        while self._next or self._later:
            if not self._next:
                self._client.pause(next(pauses))
                self._next.extend(self._later)
                self._later.clear()
            source = self._next.popleft()
            try:
                return self._fetch_from(source)
            except SourceBusy as error:
                logger.info("%s is busy, asking others first: %s", source, error)
                self._later.append(source)
                self._follow(source, error.referrals)
            except SourceRefused as error:
                if source in self._configured:  # a referral is followed once: the ranks of an instance know each other
                    self._follow(source, error.referrals)
            except SourceFailed:
                self._failures[source] += 1
                if self._failures[source] < TRIES:
                    self._later.append(source)
            except (SourceError, TransportError):
                continue
        raise SourcesExhausted([str(attempt) for attempt in self._client.attempts] or self._referred)

    def _fetch_from(self, source: Endpoint) -> Fetched:
        """By the first transport that works. Raises what the last one ended with, after noting it."""
        remaining = list(self._client.transports)
        while True:
            session = self._session(source, remaining)
            begun = time.perf_counter()
            try:
                return session.run()
            except SourceBusy:
                raise
            except (SourceError, TransportError) as error:
                if isinstance(error, SourceRefused) and error.referrals and source in self._configured:
                    logger.info("%s refers to %s: %s", source, one_line(", ".join(error.referrals)), error)
                    self._referred.append(f"{source}: {error}")
                    raise
                self._note(session, source, error, time.perf_counter() - begun)
                if not isinstance(error, TransportError) or session.transport is None:
                    raise
                remaining.remove(session.transport)
                if not remaining:
                    raise
            finally:
                self._client.received[str(source)] += session.received

    def _session(self, source: Endpoint, transports: Sequence[Transport]) -> Session:
        client = self._client
        return Session(
            client.terms,
            source,
            transports=transports,
            inventory=self._inventory,
            memory_to_fill=client.memory_to_fill,
            may_wait=lambda referrals: self._may_wait(source, referrals),
            phases=client.phases,
        )

    def _may_wait(self, source: Endpoint, referrals: Sequence[str]) -> bool:
        """Waiting is for when there is nobody else to ask."""
        return not self._next and not self._new(source, referrals)

    def _new(self, source: Endpoint, referrals: Sequence[str]) -> list[Endpoint]:
        room = REFERRALS_FOLLOWED - (len(self._known) - len(self._configured))
        return [each for each in dict.fromkeys(_referred(source, referrals)) if each not in self._known][:room]

    def _follow(self, source: Endpoint, referrals: Sequence[str]) -> None:
        new = self._new(source, referrals)
        self._known.update(new)
        self._next.extendleft(reversed(new))

    def _note(self, session: Session, source: Endpoint, error: Exception, seconds: float) -> None:
        reason = one_line(str(error), _REASON_LIMIT)
        attempt = Attempt(str(source), session.transport_name, reason, seconds, session.received)
        self._client.attempts.append(attempt)
        logger.warning("could not load from %s", attempt)


def inquire(source: Endpoint, timeout: float, access: Access | None = None) -> Status:
    """What `source` holds. Raises SourceError."""
    with greet(source, access or Access(), timeout) as channel:
        try:
            channel.send(Inquire(), timeout)
            status = channel.receive(Deadline(timeout))
        except ProtocolError as error:
            raise SourceFailed(str(error)) from error
    assert isinstance(status, Status)
    return status


def announce(source: Endpoint, session: bytes, port: int, timeout: float, access: Access) -> None:
    """Tells `source` that what was taken from it in `session` is served on `port` now. Raises SourceError."""
    with greet(source, access, timeout) as channel:
        try:
            channel.send(Announce(session, port), timeout)
        except ProtocolError as error:
            raise SourceFailed(str(error)) from error


def _referred(source: Endpoint, referrals: Sequence[str]) -> Iterator[Endpoint]:
    """The endpoints in `referrals`, those without a host on that of `source`; what is none is left out."""
    for referral in referrals:
        with contextlib.suppress(ValueError):
            own_host = str(source).rpartition(":")[0]
            yield Endpoint.parse(own_host + referral if referral.startswith(":") else referral)
