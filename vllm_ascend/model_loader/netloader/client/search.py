"""The way of a client through its sources, until one of them has delivered.

Each step is taken from the `SourceOrder` and done here: a source is asked, and delivers or fails; a busy one is waited
for, while others are asked (`Places`). What has arrived and passed stays, whoever brought it, so each further source
brings only what is missing.

Every attempt that fails is noted with its reason. Only errors of sources and transports lead to the next step; any
other error is a fault of this process and ends the search.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Final

from vllm_ascend.model_loader.netloader.client.backoff import pauses
from vllm_ascend.model_loader.netloader.client.intake import Intake
from vllm_ascend.model_loader.netloader.client.options import FetchOptions
from vllm_ascend.model_loader.netloader.client.order import (
    Ask,
    AwaitTurn,
    Candidate,
    LeaveQueues,
    Pause,
    SourceOrder,
    Step,
)
from vllm_ascend.model_loader.netloader.client.places import Places, Turn
from vllm_ascend.model_loader.netloader.client.session import ClientSession, Fetched
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import (
    SourceError,
    SourceRefused,
    SourcesExhausted,
    TransportError,
    one_line,
)
from vllm_ascend.model_loader.netloader.report import Attempt, Phases
from vllm_ascend.model_loader.netloader.transport.base import Transport

logger = logging.getLogger(__name__)

_REASON_LIMIT: Final = 10_000
"""Characters of a reason; a refusal names eight tensors, and says of each what differs."""


class Search:
    """One search among `sources`, for one thread; `run` it once.

    `intake` takes in what the sources bring. `phases`, `attempts` and `received` (bytes by source) fill as it goes, and
    `sleep` waits for so many seconds.
    """

    def __init__(
        self,
        options: FetchOptions,
        sources: Sequence[Endpoint],
        transports: Sequence[Transport],
        *,
        intake: Intake,
        phases: Phases,
        attempts: list[Attempt],
        received: Counter[str],
        sleep: Callable[[float], None],
    ) -> None:
        self._options = options
        self._transports = transports
        self._intake = intake
        self._phases = phases
        self._attempts = attempts
        self._received = received
        self._sleep = sleep
        self._order = SourceOrder(
            sources,
            [transport.name for transport in transports],
            pauses(),
            wait_timeout=options.wait_timeout,
            replica_seconds=options.timeouts.stall,
            follows_replicas=options.verify,  # without verification, a replica is no better than a stranger
            disk_remains=options.disk_remains,
        )
        self._places = Places(self._order)
        self._referrals: list[str] = []
        """What sources have said that only referred to others."""

    def run(self) -> Fetched:
        """The weights from the first source that delivers. Raises SourcesExhausted with every attempt's reason."""
        with self._places:
            while True:
                # A turn that has come is used before anybody else is asked: its server holds it for this client.
                turn = self._places.take_turn()
                fetched = self._use(turn) if turn is not None else self._do(self._order.next())
                if fetched is not None:
                    return fetched

    def _do(self, step: Step | None) -> Fetched | None:
        match step:
            case Ask(candidate, names):
                offered = [transport for transport in self._transports if transport.name in names]
                return self._ask(candidate, offered)
            case AwaitTurn(seconds):
                with self._phases("join"):
                    waited = self._places.wait(seconds)
                self._order.waited(waited)
            case LeaveQueues():
                refusal = SourceRefused(f"its turns were taken for WAIT_TIMEOUT, {self._options.wait_timeout:g} s")
                for session in self._places.give_up():
                    self._note(session, refusal)
            case Pause(seconds):
                self._sleep(seconds)
            case None:
                raise SourcesExhausted([str(attempt) for attempt in self._attempts] or self._referrals)
        return None

    def _ask(self, candidate: Candidate, transports: Sequence[Transport]) -> Fetched | None:
        session = ClientSession(
            self._options,
            candidate,
            transports=transports,
            intake=self._intake,
            may_leave=partial(self._order.may_leave, candidate),
            phases=self._phases,
        )
        with self._attempt(session) as scope:
            wait = session.ask()
            if wait is None:
                return session.take()
            if self._places.keep(session, wait):
                scope.pop_all()
        return None

    def _use(self, turn: Turn) -> Fetched | None:
        with self._attempt(turn.session):
            if turn.failure is not None:
                raise turn.failure
            return turn.session.take()
        return None

    @contextlib.contextmanager
    def _attempt(self, session: ClientSession) -> Iterator[contextlib.ExitStack]:
        """A scope within which the client attends to `session`; at its end the order hears what came of that.

        The stack that is yielded closes the session, unless somebody else has taken it over.
        """
        candidate, begun, held = session.candidate, time.monotonic(), self._intake.nbytes_held
        with contextlib.ExitStack() as scope:
            scope.callback(session.close)

            # Attending ends before the outcome is judged: only then is it certain whether a turn elsewhere was the end.
            try:
                with self._places.attending(session):
                    yield scope
            except (SourceError, TransportError) as error:
                if session.broken_off:  # for a turn elsewhere, so the failure is not the source's
                    self._order.postponed(candidate)
                else:
                    self._failed(session, error)
            finally:
                brought = max(self._intake.nbytes_held - held, 0)
                self._order.spent(candidate, time.monotonic() - begun, brought)
                self._received[str(candidate.endpoint)] += session.received

    def _failed(self, session: ClientSession, error: SourceError | TransportError) -> None:
        candidate = session.candidate
        if isinstance(error, SourceRefused) and self._order.referred(candidate, session.address, error.referrals):
            logger.info("%s refers to %s: %s", candidate.endpoint, one_line(", ".join(error.referrals)), error)
            self._referrals.append(f"{candidate.endpoint}: {error}")
            return
        self._order.failed(candidate, error, session.untried_transports)
        self._note(session, error)

    def _note(self, session: ClientSession, error: Exception) -> None:
        transport = session.transport.name if session.transport is not None else None
        reason = one_line(str(error), _REASON_LIMIT)
        attempt = Attempt(str(session.candidate.endpoint), transport, reason, session.age, session.received)
        self._attempts.append(attempt)
        logger.warning("could not load from %s", attempt)
