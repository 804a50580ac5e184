"""The way of a client through its sources, until all chunks have passed and a source has confirmed them.

Each source has a session in a thread of its own (`Attendance`); what has to be done next is taken from the
`SourceOrder`. Sources are asked one after another at first, since one of them may be enough. Others join in when a
transfer has lasted for a moment, and while the client waits in a queue: further sources, and replicas, which have the
same weights or load them. Whoever brings a chunk, it stays if it has passed.

Weights are good when every chunk has passed, and a source that is trusted has confirmed that it still has the same.
Where no such source is left, and one of them has told the root digest before, each chunk is proven to be what that
source had, and nobody has said that it was replaced since: then they are good too, with a warning.

Every attempt that fails is noted with its reason. Only errors of sources and transports lead to the next step; any
other error is a fault of this process and ends the search.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from vllm_ascend.model_loader.netloader.client.intake import Intake
from vllm_ascend.model_loader.netloader.client.options import FetchOptions
from vllm_ascend.model_loader.netloader.client.search.backoff import pauses
from vllm_ascend.model_loader.netloader.client.search.order import (
    Ask,
    AwaitTurn,
    Contents,
    LeaveQueues,
    Pause,
    SourceOrder,
    Step,
)
from vllm_ascend.model_loader.netloader.client.session.attendance import Attendance, Stage
from vllm_ascend.model_loader.netloader.client.session.session import ClientSession, Fetched
from vllm_ascend.model_loader.netloader.client.stages import Stages
from vllm_ascend.model_loader.netloader.client.verification import Evidence
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import (
    SourceError,
    SourceFailed,
    SourceRefused,
    SourcesExhausted,
    TransportError,
    one_line,
)
from vllm_ascend.model_loader.netloader.report import Attempt
from vllm_ascend.model_loader.netloader.transport.base import Transport
from vllm_ascend.model_loader.netloader.wire.messages import Wait

logger = logging.getLogger(__name__)

HELP_AFTER: Final = 0.25
"""Seconds for which a source delivers alone. Most of what takes longer is worth the connections to others."""
SOURCES_AT_ONCE: Final = 4
"""Configured sources that are asked beside each other."""
FRESH_SECONDS: Final = 2.0
"""For how long the word of a source about its contents holds, which repeats it every second to those who wait."""
_REASON_LIMIT: Final = 10_000
"""Characters of a reason; a refusal names eight tensors, and says of each what differs."""
_LOOK_SECONDS: Final = 0.25
"""How often it is looked whether more sources are to be asked, while nothing else happens."""
_LAST_WORD_SECONDS: Final = 1.0
"""For how long sessions may take leave, once one of their sources has confirmed everything."""


class Search:
    """One search among `sources`, for one thread; `run` it once.

    `intake` takes in what the sources bring. `stages`, `attempts` and `received` (bytes by source) fill as it goes, and
    `sleep` waits for so many seconds.
    """

    def __init__(
        self,
        options: FetchOptions,
        sources: Sequence[Endpoint],
        transports: Sequence[Transport],
        *,
        intake: Intake,
        stages: Stages,
        attempts: list[Attempt],
        received: Counter[str],
        sleep: Callable[[float], None],
    ) -> None:
        self._options = options
        self._transports = transports
        self._intake = intake
        self._stages = stages
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
        self._changed = threading.Condition()
        self._has_news = False
        self._attended: list[Attendance] = []
        self._alone: ClientSession | None = None
        """The latest session that may bring something; without verification, the only one."""
        self._taking_since: float | None = None
        self._vouched: dict[Endpoint, tuple[str, float]] = {}
        """The root digest that a source has told which is trusted and has everything, and when it was said to those who
        wait. Those that have denied it since are left out.
        """
        self._best: tuple[int, Fetched] | None = None
        """The session that has brought most, and how much."""
        intake.on_joined = self._note_joined
        self._referrals: list[str] = []
        """What sources have said that only referred to others."""

    def run(self) -> Fetched:
        """The weights, once they are complete and confirmed. Raises SourcesExhausted with every attempt's reason."""
        try:
            while True:
                if (fetched := self._settle_those_that_are_over() or self._go_on()) is not None:
                    return fetched
        finally:
            self._end_all()

    def _go_on(self) -> Fetched | None:
        """Does what is to be done next, or waits until something happens."""
        if self._intake.is_complete:
            self._order.follow_nobody()
        busy = [each for each in self._attended if each.is_busy]
        trusted = [each for each in busy if not each.candidate.is_replica]

        if self._wants_replicas(trusted):
            while (ask := self._order.replica()) is not None:
                self._attend(ask)
                busy.append(self._attended[-1])

        if not busy:
            return self._confirmed_in_a_queue() or self._do(self._order.next())
        if self._wants_help(trusted) and (ask := self._order.helper()) is not None:
            self._attend(ask)
            return None

        self._leave_the_useless()
        self._watch(busy)
        self._await_news(_LOOK_SECONDS)
        return None

    def _confirmed_in_a_queue(self) -> Fetched | None:
        """The complete weights, if a source that lets this client wait says that it has just these."""
        evidence = self._intake.evidence
        if not self._intake.is_complete or evidence is None or self._best is None:
            return None
        is_waiting = any(each.stage is Stage.WAITING and not each.candidate.is_replica for each in self._attended)
        said_at = max((at for root, at in list(self._vouched.values()) if root == evidence.root), default=-math.inf)
        if not is_waiting or time.monotonic() - said_at >= FRESH_SECONDS:
            return None
        return self._settled(evidence)

    def _settled(self, evidence: Evidence) -> Fetched | None:
        """The weights that are described by `evidence`, which nobody replaces any more; None if they were replaced."""
        best = self._best
        if best is None or best[1].evidence is None or best[1].evidence.root != evidence.root:
            return None
        try:
            self._intake.settle(evidence)
        except SourceFailed:  # a source whose turn has just come has others
            return None
        return best[1]

    def _wants_replicas(self, trusted: Sequence[Attendance]) -> bool:
        if not self._options.verify or self._intake.is_complete:
            return False
        is_waiting = any(each.stage is Stage.WAITING for each in self._attended)
        return is_waiting or not trusted or self._has_lasted()

    def _wants_help(self, trusted: Sequence[Attendance]) -> bool:
        """Whether another source that is trusted is to be asked, beside those that are."""
        if not trusted:
            return True
        has_room = len(trusted) < SOURCES_AT_ONCE and not self._intake.is_complete
        return self._options.verify and has_room and self._has_lasted()

    def _has_lasted(self) -> bool:
        """Whether chunks have been coming for a while."""
        if self._intake.evidence is None or not any(each.stage is Stage.TAKING for each in self._attended):
            self._taking_since = None
            return False
        self._taking_since = self._taking_since or time.monotonic()
        return time.monotonic() - self._taking_since >= HELP_AFTER

    def _do(self, step: Step | None) -> Fetched | None:
        match step:
            case Ask():
                self._attend(step)
            case AwaitTurn(seconds):
                begun = time.monotonic()
                self._await_news(seconds)
                self._order.waited(time.monotonic() - begun)
            case LeaveQueues():
                refusal = SourceRefused(f"its turns were taken for WAIT_TIMEOUT, {self._options.wait_timeout:g} s")
                for attendance in self._attended:
                    attendance.end()
                    attendance.join()
                    self._note(attendance.session, refusal)
                self._attended.clear()
            case Pause(seconds):
                self._sleep(seconds)
            case None:
                return self._without_confirmation()
        return None

    def _attend(self, ask: Ask) -> None:
        candidate = ask.candidate
        offered = [transport for transport in self._transports if transport.name in ask.transports]
        session = ClientSession(
            self._options,
            candidate,
            transports=offered,
            intake=self._intake,
            may_leave=partial(self._order.may_leave, candidate),
            stages=self._stages,
            named=self._note_replicas,
        )
        attendance = Attendance(
            session, may_wait=self._may_wait, may_take=self._may_take, told=self._told, changed=self._tell
        )
        self._attended.append(attendance)
        try:
            attendance.start()
        except RuntimeError as error:  # no thread can be had, and one source at a time needs none
            attendance.run_here(error)

    def _may_wait(self, session: ClientSession, wait: Wait) -> bool:
        self._told(session, wait)
        if not self._order.busy(session.candidate):
            return False
        text = "waiting for a turn at %s: %d served now, %d more come first"
        logger.info(text, session.candidate.endpoint, wait.served, wait.ahead)
        return True

    def _may_take(self, session: ClientSession) -> bool:
        """Whether `session` may bring anything. Without verification only one may at a time, and others ask again."""
        with self._changed:
            may_take = self._options.verify or self._alone is None
            if may_take:
                self._alone = session
        if not may_take:
            self._order.postponed(session.candidate)
        return may_take

    def _told(self, session: ClientSession, wait: Wait) -> None:
        """Takes in what a busy source says to those who wait. A replica is not believed about contents."""
        candidate = session.candidate
        if candidate.is_replica:
            return
        if wait.root and not wait.filling:
            self._vouched[candidate.endpoint] = wait.root, time.monotonic()
        contents = Contents(wait.root, wait.fingerprint)
        if self._order.replicas_named(candidate, session.address, wait.referrals, contents):
            self._tell()

    def _note_replicas(self, session: ClientSession, endpoints: Sequence[str]) -> None:
        """Takes in whom a source names while it delivers: they have to have what is being loaded."""
        evidence = self._intake.evidence
        if evidence is not None:
            contents = Contents(evidence.root, self._intake.fingerprint)
            if self._order.replicas_named(session.candidate, session.address, endpoints, contents):
                self._tell()

    def _note_joined(self, endpoint: Endpoint) -> None:
        """Takes in that a client of this process relays the same weights."""
        evidence = self._intake.evidence
        if evidence is not None and self._order.joined_here(
            endpoint, Contents(evidence.root, self._intake.fingerprint)
        ):
            self._tell()

    def _tell(self) -> None:
        with self._changed:
            self._has_news = True
            self._changed.notify_all()

    def _await_news(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._has_news, seconds)
            self._has_news = False

    def _settle_those_that_are_over(self) -> Fetched | None:
        """The weights, if one of the sessions that are over has confirmed them."""
        while over := [each for each in self._attended if each.stage is Stage.OVER]:
            attendance = over[0]
            self._attended.remove(attendance)
            if (fetched := self._settle(attendance)) is not None:
                return fetched
        for each in self._attended:
            if each.stage is Stage.TAKING:
                self._order.left_queue(each.candidate)
        return None

    def _settle(self, attendance: Attendance) -> Fetched | None:
        """Takes in what has become of a session: the weights, if they are complete and confirmed."""
        attendance.join()
        session, candidate = attendance.session, attendance.candidate
        failure = attendance.take_failure()
        self._received[str(candidate.endpoint)] += session.received
        self._order.left_queue(candidate)
        self._order.spent(candidate, session.owing_seconds, session.brought)
        self._note_contents(session)

        if attendance.fetched is not None:
            return attendance.fetched
        with self._changed:
            self._alone = None if self._alone is session else self._alone
        if failure is None:
            if not attendance.gave_up_its_place:
                self._order.ended(candidate)
            return None
        if not isinstance(failure, SourceError | TransportError):
            try:
                raise failure
            finally:
                del failure  # its traceback holds this frame
        if session.broken_off:
            self._order.ended(candidate)
        elif not (candidate.is_replica and self._intake.is_complete):
            self._failed(session, failure)
        return None

    def _note_contents(self, session: ClientSession) -> None:
        """What a session has shown of the contents, and how much it has brought."""
        evidence = self._intake.evidence
        if session.accepted and evidence is not None:
            if not (session.candidate.is_replica or session.fills or session.has_denied):
                self._vouched[session.candidate.endpoint] = evidence.root, -math.inf
            if self._best is None or session.brought > self._best[0]:
                self._best = session.brought, session.fetched(self._intake.memory, evidence)
        if session.has_denied:
            self._vouched.pop(session.candidate.endpoint, None)

    def _failed(self, session: ClientSession, error: SourceError | TransportError) -> None:
        candidate = session.candidate
        if isinstance(error, SourceRefused) and self._order.referred(candidate, session.address, error.referrals):
            logger.info("%s refers to %s: %s", candidate.endpoint, one_line(", ".join(error.referrals)), error)
            self._referrals.append(f"{candidate.endpoint}: {error}")
            return
        if isinstance(error, SourceRefused):
            self._vouched.pop(candidate.endpoint, None)  # it has no longer what it has told before
        self._order.failed(candidate, error, session.untried_transports)
        self._note(session, error)

    def _note(self, session: ClientSession, error: Exception) -> None:
        transport = session.transport.name if session.transport is not None else None
        reason = one_line(str(error), _REASON_LIMIT)
        attempt = Attempt(str(session.candidate.endpoint), transport, reason, session.age, session.received)
        self._attempts.append(attempt)
        logger.warning("could not load from %s", attempt)

    def _leave_the_useless(self) -> None:
        """Leaves a replica that has long had nothing new, if there is another one to try."""
        now = time.monotonic()
        idle = {each.candidate.endpoint: now - each.session.useful_at for each in self._attended if each.is_busy}
        endpoint = self._order.useless(idle)
        for attendance in self._attended:
            if attendance.candidate.endpoint == endpoint:
                attendance.session.break_off()

    def _watch(self, busy: Sequence[Attendance]) -> None:
        """Leaves all replicas where nobody else delivers and nothing has come for too long: for STALL_TIMEOUT, or for
        WAIT_TIMEOUT while a source lets this client wait, since the replicas may wait for the same.
        """
        is_waiting = any(each.stage is Stage.WAITING for each in self._attended)
        limit = self._options.wait_timeout if is_waiting else self._options.timeouts.stall
        passed_at = self._intake.passed_at
        if not passed_at or time.monotonic() - passed_at < limit or self._intake.is_complete:
            return
        left = [each for each in busy if not each.session.broken_off]
        if all(each.candidate.is_replica and each.session.age >= limit for each in left):
            self._order.follow_nobody()
            failure = SourceFailed(f"no replica has brought a chunk for {limit:g} s")
            for attendance in left:
                attendance.end()
                self._note(attendance.session, failure)

    def _without_confirmation(self) -> Fetched:
        """The weights where nobody is left to confirm them. Raises SourcesExhausted unless they are good anyway."""
        evidence = self._intake.evidence
        is_known = evidence is not None and any(root == evidence.root for root, _ in list(self._vouched.values()))
        fetched = self._settled(evidence) if evidence is not None and is_known and self._intake.is_complete else None
        if evidence is None or fetched is None:
            raise SourcesExhausted([str(attempt) for attempt in self._attempts] or self._referrals)
        logger.warning(
            "nobody is left to confirm that the weights have not been replaced since: they are, byte for byte, those "
            "with the root digest %s, which a source had",
            evidence.root,
        )
        return fetched

    def _end_all(self) -> None:
        """Ends all sessions. Nobody writes into the memory any more when this returns."""
        self._order.follow_nobody()
        self._intake.on_joined = lambda _: None
        patience = time.monotonic() + _LAST_WORD_SECONDS
        for attendance in self._attended:
            if attendance.stage is not Stage.TAKING or not self._intake.is_complete:
                attendance.end()
        for attendance in self._attended:
            if attendance.stage is Stage.TAKING and not attendance.join(max(patience - time.monotonic(), 0.0)):
                attendance.end()
        for attendance in self._attended:
            session = attendance.session
            # Whoever still connects has no part of the memory, and ends by itself.
            attendance.join(None if session.accepted else _LAST_WORD_SECONDS)
            self._received[str(attendance.candidate.endpoint)] += session.received
            if attendance.fetched is not None and not self._intake.holds(attendance.fetched.memory):
                attendance.fetched.memory.close()
        self._attended.clear()
        self._alone = None
        self._best = None  # an error that leaves this search keeps it alive, and it would keep the memory alive
