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
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final

from vllm_ascend.model_loader.netloader.client.candidates import Candidate
from vllm_ascend.model_loader.netloader.client.fetched import Fetched
from vllm_ascend.model_loader.netloader.client.intake import Intake
from vllm_ascend.model_loader.netloader.client.options import FetchOptions
from vllm_ascend.model_loader.netloader.client.search.attempts import Attempts
from vllm_ascend.model_loader.netloader.client.search.attendances import Attendances
from vllm_ascend.model_loader.netloader.client.search.backoff import pauses
from vllm_ascend.model_loader.netloader.client.search.order import SourceOrder
from vllm_ascend.model_loader.netloader.client.search.steps import Ask, AwaitTurn, LeaveQueues, Pause, Step
from vllm_ascend.model_loader.netloader.client.search.vouchers import Vouchers
from vllm_ascend.model_loader.netloader.client.session.attendance import Attendance, Stage
from vllm_ascend.model_loader.netloader.client.session.session import ClientSession
from vllm_ascend.model_loader.netloader.client.stages import Stages
from vllm_ascend.model_loader.netloader.client.swarm.peering import SESSIONS
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import (
    OtherContents,
    SourceError,
    SourceFailed,
    SourceRefused,
    TransportError,
)
from vllm_ascend.model_loader.netloader.report import Attempt
from vllm_ascend.model_loader.netloader.transport.base import Transport

logger = logging.getLogger(__name__)

HELP_AFTER: Final = 0.25
"""Seconds for which a source delivers alone. Most of what takes longer is worth the connections to others."""
SOURCES_AT_ONCE: Final = 4
"""Configured sources that are asked beside each other."""
_LOOK_SECONDS: Final = 0.25
"""How often it is looked whether more sources are to be asked, while nothing else happens."""


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
        self._intake = intake
        self._sleep = sleep
        self._attempts = Attempts(intake, attempts, received)
        self._vouchers = Vouchers()
        self._order = SourceOrder(
            sources,
            [transport.name for transport in transports],
            pauses(),
            wait_timeout=options.wait_timeout,
            replica_seconds=options.timeouts.stall,
            follows_replicas=options.verify,  # without verification, a replica is no better than a stranger
            disk_remains=options.disk_remains,
            peers=min((each.traits.peers or SESSIONS for each in transports), default=SESSIONS),
        )
        self._attended = Attendances(
            options, transports, intake=intake, stages=stages, order=self._order, vouchers=self._vouchers
        )
        self._taking_since: float | None = None
        self._round_due: float | None = None
        """When sources that failed are asked again while only replicas deliver."""

    def run(self) -> Fetched:
        """The weights, once they are complete and confirmed. Raises SourcesExhausted with every attempt's reason."""
        try:
            while True:
                if (fetched := self._settle_those_that_are_over() or self._go_on()) is not None:
                    return fetched
        finally:
            self._order.replicas.follow_nobody()
            for attendance in self._attended.end_all():
                self._attempts.over(attendance.session)
            self._attempts.forget_the_best()

    def _go_on(self) -> Fetched | None:
        """Does what is to be done next, or waits until something happens."""
        if self._intake.is_complete:
            self._order.replicas.follow_nobody()
        trusted = [each for each in self._attended.busy if not each.candidate.is_replica]
        if self._wants_replicas(trusted):
            self._ask_replicas()

        busy = self._attended.busy
        if not busy and self._attended.is_any_over:  # some are done that quickly, and what they have brought may be all
            return None
        if not busy:
            return self._confirmed_in_a_queue() or self._do(self._order.next())
        self._ask_again_beside_replicas(trusted)
        if self._wants_help(trusted) and (ask := self._order.helper()) is not None:
            self._attended.begin(ask)
            return None

        self._leave_the_useless(busy)
        self._watch(busy)
        self._attended.await_news(_LOOK_SECONDS)
        return None

    def _ask_replicas(self) -> None:
        if (evidence := self._intake.evidence) is not None:
            self._order.replicas.agreed(evidence.root)
        while (ask := self._order.replicas.next()) is not None:
            self._attended.begin(ask)

    def _ask_again_beside_replicas(self, trusted: Sequence[Attendance]) -> None:
        """Sources that failed are not left alone because replicas deliver: these may lack what only a source has."""
        now = time.monotonic()
        if trusted or self._attended.is_waiting:
            self._round_due = None
        elif self._round_due is None:
            pause = self._order.pause_beside_replicas()
            self._round_due = None if pause is None else now + pause
        elif now >= self._round_due:
            self._round_due = None
            self._order.begin_round()

    def _confirmed_in_a_queue(self) -> Fetched | None:
        """The complete weights, if a source that lets this client wait says that it has just these."""
        evidence = self._intake.evidence
        if not self._intake.is_complete or evidence is None or not self._attended.is_waiting:
            return None
        return self._attempts.settled(evidence) if self._vouchers.know_now(evidence.root) else None

    def _wants_replicas(self, trusted: Sequence[Attendance]) -> bool:
        if not self._options.verify or self._intake.is_complete:
            return False
        return self._attended.is_waiting or not trusted or self._has_lasted()

    def _wants_help(self, trusted: Sequence[Attendance]) -> bool:
        """Whether another source that is trusted is to be asked, beside those that are."""
        if not trusted:
            return True
        has_room = len(trusted) < SOURCES_AT_ONCE and not self._intake.is_complete
        return self._options.verify and has_room and self._has_lasted()

    def _has_lasted(self) -> bool:
        """Whether chunks have been coming for a while."""
        if self._intake.evidence is None or not self._attended.is_taking:
            self._taking_since = None
            return False
        self._taking_since = self._taking_since or time.monotonic()
        return time.monotonic() - self._taking_since >= HELP_AFTER

    def _do(self, step: Step | None) -> Fetched | None:
        match step:
            case Ask():
                self._attended.begin(step)
            case AwaitTurn(seconds):
                begun = time.monotonic()
                self._attended.await_news(seconds)
                self._order.waited(time.monotonic() - begun)
            case LeaveQueues():
                refusal = SourceRefused(f"its turns were taken for WAIT_TIMEOUT, {self._options.wait_timeout:g} s")
                for attendance in self._attended:
                    self._attempts.failed(attendance.session, refusal)
                    attendance.end()
                    attendance.join()
            case Pause(seconds):
                self._sleep(seconds)
            case None:
                return self._without_confirmation()
        return None

    def _settle_those_that_are_over(self) -> Fetched | None:
        """The weights, if one of the sessions that are over has confirmed them."""
        while (attendance := self._attended.take_over()) is not None:
            if (fetched := self._settle(attendance)) is not None:
                return fetched
        for each in self._attended:
            if each.stage is Stage.TAKING:
                self._order.left_queue(each.candidate)
        return None

    def _settle(self, attendance: Attendance) -> Fetched | None:
        """Takes in what has become of a session: the weights, if they are complete and confirmed."""
        session, candidate = attendance.session, attendance.candidate
        failure = attendance.take_failure()
        self._attempts.over(session)
        self._order.left_queue(candidate)
        if candidate.is_replica:
            self._order.replicas.spent(session.owing_seconds, session.brought)
        else:
            self._note_contents(session, failure)

        if attendance.fetched is not None:
            return self._believed(session, attendance.fetched)
        if failure is None:
            if not attendance.gave_up_its_place:
                self._order.replicas.ended(candidate)
            return None
        if not isinstance(failure, SourceError | TransportError):
            try:
                raise failure
            finally:
                del failure  # its traceback holds this frame
        if session.broken_off:
            self._order.replicas.ended(candidate)
        elif not (candidate.is_replica and self._intake.is_complete):
            self._failed(session, failure)
        return None

    def _believed(self, session: ClientSession, fetched: Fetched) -> Fetched | None:
        """`fetched`, if it comes from a source, or a source has these weights too. A replica's own word is nobody's."""
        evidence = fetched.evidence
        if not session.candidate.is_replica or (evidence is not None and self._vouchers.agree_on(evidence.root)):
            return fetched
        fetched.memory.close()
        self._failed(session, SourceFailed("no source says any more that these weights are the right ones"))
        return None

    def _note_contents(self, session: ClientSession, failure: BaseException | None) -> None:
        """What a source that is trusted has shown of its contents."""
        evidence, endpoint = session.evidence, session.candidate.endpoint
        if session.has_denied and not isinstance(failure, OtherContents):
            self._vouchers.denies(endpoint)
        elif evidence is not None and (session.vouches or isinstance(failure, OtherContents)):
            self._vouchers.holds(endpoint, evidence.root)

    def _failed(self, session: ClientSession, error: SourceError | TransportError) -> None:
        candidate = session.candidate
        if isinstance(error, SourceRefused) and self._order.referred(candidate, session.address, error.referrals):
            self._attempts.referred(session, error.referrals, error)
            return
        if isinstance(error, SourceRefused) and not candidate.is_replica:
            self._vouchers.denies(candidate.endpoint)  # it has no longer what it has told before
        self._attempts.failed(session, error)
        if isinstance(error, OtherContents) and not session.fills and self._give_up_what_nobody_has(candidate):
            return
        self._order.failed(candidate, error, session.untried_transports)

    def _give_up_what_nobody_has(self, candidate: Candidate) -> bool:
        """Gives up contents that no source is left to confirm, for the sake of those that `candidate` has. Whether it
        does. It is asked again at once.
        """
        evidence = self._intake.evidence
        if candidate.is_replica or evidence is None or self._vouchers.know_now(evidence.root):
            return False
        left = [each for each in self._attended if each.stage is not Stage.WAITING]
        if any(not each.candidate.is_replica and not each.session.fills for each in left):
            return False  # these may be the ones that have them
        for attendance in left:
            attendance.end()
        for attendance in left:
            attendance.join(None if attendance.session.accepted else 0.0)
        self._order.retry(candidate)
        return True

    def _leave_the_useless(self, busy: Sequence[Attendance]) -> None:
        """Leaves a replica that has long had nothing new, if there is another one to try."""
        now = time.monotonic()
        endpoint = self._order.replicas.useless(
            {each.candidate.endpoint: now - each.session.useful_at for each in busy}
        )
        for attendance in busy:
            if attendance.candidate.endpoint == endpoint:
                attendance.session.break_off()

    def _watch(self, busy: Sequence[Attendance]) -> None:
        """Leaves all that load the weights themselves, and all replicas, where nobody else delivers and nothing has
        come for too long: for STALL_TIMEOUT, or for WAIT_TIMEOUT while a source lets this client wait, since these may
        wait for the same, or for each other.
        """
        limit = self._options.wait_timeout if self._attended.is_waiting else self._options.timeouts.stall
        passed_at = self._intake.passed_at
        if not passed_at or time.monotonic() - passed_at < limit or self._intake.is_complete:
            return
        left = [each for each in busy if not each.session.broken_off]
        if not all(_may_wait_for_others(each.session) and each.session.age >= limit for each in left):
            return
        self._order.replicas.follow_nobody()
        for attendance in left:
            reason = f"it still loads these weights itself, and nobody has brought a chunk for {limit:g} s"
            if attendance.candidate.is_replica:
                reason = f"no replica has brought a chunk for {limit:g} s"
            self._attempts.failed(attendance.session, SourceFailed(reason))
            attendance.end()

    def _without_confirmation(self) -> Fetched:
        """The weights where nobody is left to confirm them. Raises SourcesExhausted unless they are good anyway."""
        evidence = self._intake.evidence
        is_known = evidence is not None and self._intake.is_complete and self._vouchers.agree_on(evidence.root)
        fetched = self._attempts.settled(evidence) if evidence is not None and is_known else None
        if evidence is None or fetched is None:
            raise self._attempts.exhausted()
        logger.warning(
            "nobody is left to confirm that the weights have not been replaced since: they are, byte for byte, those "
            "with the root digest %s, which a source had",
            evidence.root,
        )
        return fetched


def _may_wait_for_others(session: ClientSession) -> bool:
    """Whether the other side of `session` may be unable to deliver, without any fault."""
    return session.candidate.is_replica or session.fills
