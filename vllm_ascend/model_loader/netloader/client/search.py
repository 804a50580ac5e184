"""The way of a client through its sources, until one of them has delivered.

A source is asked with each transport that is left to try until it delivers or proves unusable; then comes the next one
of the route. Where others come first, the client keeps its place in that queue and asks somebody else meanwhile: the
replicas that the source names, and the other sources. Sources are trusted in the order of what they can do: a turn at
a configured source ends what a replica is bringing, since a replica is trusted with nothing but time, and all of them
together with no more than STALL_TIMEOUT beyond what they bring. What has arrived and passed stays, whoever brought it.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from vllm_ascend.model_loader.netloader.client import backoff
from vllm_ascend.model_loader.netloader.client.options import FetchOptions
from vllm_ascend.model_loader.netloader.client.places import Places, Turn
from vllm_ascend.model_loader.netloader.client.route import Candidate, Contents, Route
from vllm_ascend.model_loader.netloader.client.session import ClientSession, Fetched
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import (
    SourceError,
    SourceFailed,
    SourceRefused,
    SourcesExhausted,
    SourceTooSlow,
    TransportError,
    one_line,
)
from vllm_ascend.model_loader.netloader.report import Attempt, Phases
from vllm_ascend.model_loader.netloader.transport.base import Transport
from vllm_ascend.model_loader.netloader.transport.delivery import Inventory
from vllm_ascend.model_loader.netloader.weights.memory import Memory
from vllm_ascend.model_loader.netloader.wire.messages import Wait

logger = logging.getLogger(__name__)

_EXCUSED_RATE: Final = 1 << 20
"""Bytes per second of chunks that have passed, at which the time that a replica takes is not wasted."""
_PATIENCE: Final = 2.0
"""Seconds in which chunks on their way from a replica may still arrive when the turn at a source has come."""
_REASON_LIMIT: Final = 10_000
"""Characters; a refusal names eight tensors, and says of each what differs."""


class Search:
    """One search, from the first of `sources` to the last resort. For one thread; `run` once.

    `phases`, `attempts` and `received` (bytes by source) fill as it goes. `memory_to_fill` makes the memory when it is
    first wanted, and `pause` waits for so many seconds.
    """

    def __init__(
        self,
        options: FetchOptions,
        sources: Sequence[Endpoint],
        transports: Sequence[Transport],
        *,
        memory_to_fill: Callable[[], Memory],
        phases: Phases,
        attempts: list[Attempt],
        received: Counter[str],
        pause: Callable[[float], None],
    ) -> None:
        self._options = options
        self._transports = transports
        self._memory_to_fill = memory_to_fill
        self._phases = phases
        self._attempts = attempts
        self._received = received
        self._pause = pause
        self._route = Route(sources, slow_at_last=not options.disk_remains)
        self._inventory = Inventory(options.request.manifest.nbytes)
        self._other_transports: list[tuple[Candidate, list[Transport]]] = []
        self._places = Places(self._note_wait, self._wants_turn, self._make_way)
        self._pauses = backoff.pauses()
        self._lock = threading.Lock()
        self._current: ClientSession | None = None
        self._referred: list[str] = []
        self._waited = 0.0
        self._wasted = 0.0

    def run(self) -> Fetched:
        """Raises SourcesExhausted with every attempt's reason."""
        with self._places:
            while True:
                fetched = self._step()
                if fetched is not None:
                    return fetched

    def _step(self) -> Fetched | None:
        """One attempt, or one wait for another. Raises SourcesExhausted where there is nothing left to do."""
        if turn := self._places.take_turn():
            return self._use(turn)
        if self._other_transports:
            return self._ask(*self._other_transports.pop())
        if candidate := self._route.next():
            return self._ask(candidate, list(self._transports))

        if len(self._places):
            self._wait_for_turn()
        elif self._route.has_later:
            self._pause(next(self._pauses))
            self._route.begin_round()
        elif not self._route.begin_round():
            raise SourcesExhausted([str(attempt) for attempt in self._attempts] or self._referred)
        return None

    def _ask(self, candidate: Candidate, transports: list[Transport]) -> Fetched | None:
        session = self._session(candidate, transports)
        with self._attempt(session) as scope:
            wait = session.ask()
            if wait is None:
                return session.take()
            if self._queue(session, wait):
                scope.pop_all()
        return None

    def _use(self, turn: Turn) -> Fetched | None:
        with self._attempt(turn.session):
            if turn.failure is not None:
                raise turn.failure
            return turn.session.take()
        return None

    def _queue(self, session: ClientSession, wait: Wait) -> bool:
        """Keeps the place, but not at a replica while there is anybody else; whether it does."""
        candidate = session.candidate
        self._note_wait(session, wait)
        with self._lock:
            self._current = None  # from here on, a turn elsewhere does not break it off
        if session.broken_off or (candidate.is_replica and (self._route.has_next or len(self._places))):
            self._route.postponed(candidate)
            return False
        text = "waiting for a turn at %s: %d served now, %d more come first"
        logger.info(text, candidate.endpoint, wait.served, wait.ahead)
        self._places.keep(session)
        return True

    def _wait_for_turn(self) -> None:
        """Until there is something to do, and in all no longer than WAIT_TIMEOUT."""
        left = self._options.wait_timeout - self._waited
        if left <= 0:
            refusal = SourceRefused(f"its turns were taken for WAIT_TIMEOUT, {self._options.wait_timeout:g} s")
            for session in self._places.give_up():
                self._note(session, refusal)
            self._route.forget_replicas()
            return
        pause = next(self._pauses) if self._route.has_later else left
        with self._phases("join"):
            waited = self._places.wait(min(pause, left))
        self._waited += waited
        if waited >= pause and self._route.has_later:
            self._route.begin_round()

    @contextlib.contextmanager
    def _attempt(self, session: ClientSession) -> Iterator[contextlib.ExitStack]:
        """Notes how it ends, and decides who is asked again. What is given closes the session in the end."""
        candidate, begun, held = session.candidate, time.monotonic(), self._inventory.nbytes_held
        scope = contextlib.ExitStack()
        scope.callback(session.close)
        with self._lock:
            self._current = session
        try:
            yield scope
        except (SourceError, TransportError) as error:
            if session.broken_off:  # for a turn elsewhere
                self._route.postponed(candidate)
                return
            self._failed(session, error)
        finally:
            if candidate.is_replica:
                brought = max(self._inventory.nbytes_held - held, 0)
                self._waste(time.monotonic() - begun - brought / _EXCUSED_RATE)
            with self._lock:
                self._current = None
            self._received[str(candidate.endpoint)] += session.received
            scope.close()

    def _failed(self, session: ClientSession, error: SourceError | TransportError) -> None:
        candidate = session.candidate
        match error:
            case SourceRefused(referrals=referrals) if referrals and candidate.referrer is None:
                logger.info("%s refers to %s: %s", candidate.endpoint, one_line(", ".join(referrals)), error)
                self._referred.append(f"{candidate.endpoint}: {error}")
                self._route.refer(candidate, session.address or candidate.endpoint, referrals)
                return
            case SourceTooSlow():
                self._route.too_slow(candidate)
            case SourceFailed():
                self._route.failed(candidate)
            case TransportError() if session.transport is not None:
                others = [each for each in session.transports if each is not session.transport]
                if others:
                    self._other_transports.append((candidate, others))
        self._note(session, error)

    def _waste(self, seconds: float) -> None:
        """Beyond what they bring, replicas may cost so much time together, and no more."""
        self._wasted += max(seconds, 0.0)
        if self._wasted > self._options.timeouts.stall:
            self._route.forget_replicas()

    def _note_wait(self, session: ClientSession, wait: Wait) -> None:
        """Also from the threads that keep places."""
        if not self._options.verify:
            return  # nobody could tell a replica from a stranger
        contents = Contents(wait.root, wait.fingerprint)
        address = session.address or session.candidate.endpoint
        if self._route.name_replicas(session.candidate, address, wait.referrals, contents):
            self._places.note_news()

    def _wants_turn(self, session: ClientSession) -> bool:
        """Whether a turn that has come is of use: not while a source of equal trust delivers. From another thread."""
        with self._lock:
            current = self._current
        if current is None or self._gives_way(current):
            return True
        self._route.postponed(session.candidate)
        return False

    def _make_way(self, session: ClientSession) -> None:
        """Ends what is worth less than the turn of `session`. From another thread."""
        with self._lock:
            current = self._current
        if current is not None and current is not session and self._gives_way(current):
            current.break_off(_PATIENCE)

    def _gives_way(self, current: ClientSession) -> bool:
        return current.candidate.is_replica or not current.accepted

    def _may_be_left(self) -> bool:
        """Whether there is another way to the weights than the source that is being asked."""
        return self._options.disk_remains or self._route.has_next or self._route.has_later or len(self._places) > 0

    def _session(self, candidate: Candidate, transports: Sequence[Transport]) -> ClientSession:
        return ClientSession(
            self._options,
            candidate,
            transports=transports,
            inventory=self._inventory,
            memory_to_fill=self._memory_to_fill,
            may_be_left=self._may_be_left,
            phases=self._phases,
        )

    def _note(self, session: ClientSession, error: Exception) -> None:
        reason = one_line(str(error), _REASON_LIMIT)
        source = str(session.candidate.endpoint)
        attempt = Attempt(source, session.transport_name, reason, session.age, session.received)
        self._attempts.append(attempt)
        logger.warning("could not load from %s", attempt)
