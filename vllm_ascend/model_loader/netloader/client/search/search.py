"""The way of a client through its sources, until all chunks have passed and a source has confirmed them.

Each source has a session in a thread of its own (`Attendance`); what has to be done next is taken from the
`SourceOrder`. Sources are asked one after another at first, since one of them may be enough. Others join in when a
transfer has lasted for a moment, and while the client waits in a queue: further sources, and replicas, which have the
same weights or load them. Whoever brings a chunk, it stays if it has passed.

A process of this host that brings the same weights for all is waited for instead, and nobody else is asked meanwhile.

When the weights are good is decided in `outcomes`.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final

from vllm_ascend.model_loader.netloader.client.fetched import Fetched
from vllm_ascend.model_loader.netloader.client.intake import Intake
from vllm_ascend.model_loader.netloader.client.options import FetchOptions
from vllm_ascend.model_loader.netloader.client.search.attempts import Attempts
from vllm_ascend.model_loader.netloader.client.search.attendances import Attendances
from vllm_ascend.model_loader.netloader.client.search.backoff import pauses
from vllm_ascend.model_loader.netloader.client.search.order import SourceOrder
from vllm_ascend.model_loader.netloader.client.search.outcomes import Outcomes
from vllm_ascend.model_loader.netloader.client.search.steps import Ask, AwaitTurn, LeaveQueues, Pause, Step
from vllm_ascend.model_loader.netloader.client.search.vouchers import Vouchers
from vllm_ascend.model_loader.netloader.client.session.attendance import Attendance, Stage
from vllm_ascend.model_loader.netloader.client.session.session import ClientSession
from vllm_ascend.model_loader.netloader.client.stages import Stages
from vllm_ascend.model_loader.netloader.client.swarm.peering import SESSIONS
from vllm_ascend.model_loader.netloader.config import SOURCES_AT_ONCE
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import (
    SourceFailed,
    SourceRefused,
)
from vllm_ascend.model_loader.netloader.report import Attempt
from vllm_ascend.model_loader.netloader.transport.base import Transport

logger = logging.getLogger(__name__)

HELP_AFTER: Final = 0.25
"""Seconds for which a source delivers alone. Most of what takes longer is worth the connections to others."""
_LOOK_SECONDS: Final = 0.25
"""How often it is looked whether more sources are to be asked, while nothing else happens."""


class Search:
    """One search among `sources`, for one thread; `run` it once.

    `intake` takes in what the sources bring. `stages`, `attempts`, `received` and `shared` (bytes by source, see
    `Client`) fill as it goes, and `sleep` waits for so many seconds.
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
        shared: Counter[str],
        sleep: Callable[[float], None],
    ) -> None:
        self._options = options
        self._intake = intake
        self._sleep = sleep
        self._attempts = Attempts(intake, attempts, received, shared)
        vouchers = Vouchers()
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
            options, transports, intake=intake, stages=stages, order=self._order, vouchers=vouchers
        )
        mapping = tuple(each.name for each in transports if not each.traits.copies)
        self._outcomes = Outcomes(
            intake,
            order=self._order,
            attended=self._attended,
            attempts=self._attempts,
            vouchers=vouchers,
            mapping=mapping,
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
        if (nearby := self._attended.take_nearby()) is not None:
            self._outcomes.wait_for(nearby)
        if any(each.candidate.is_nearby for each in self._attended.busy):  # what it brings has not to come twice
            self._attended.await_news(_LOOK_SECONDS)
            return None
        if self._intake.is_complete:
            self._order.replicas.follow_nobody()
        trusted = [each for each in self._attended.busy if not each.candidate.is_replica]
        if self._wants_replicas(trusted):
            self._ask_replicas()

        busy = self._attended.busy
        if not busy and self._attended.is_any_over:  # some are done that quickly, and what they have brought may be all
            return None
        if not busy:
            return self._outcomes.confirmed_in_a_queue() or self._do(self._order.next())
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
                return self._outcomes.without_confirmation()
        return None

    def _settle_those_that_are_over(self) -> Fetched | None:
        """The weights, if one of the sessions that are over has confirmed them."""
        while (attendance := self._attended.take_over()) is not None:
            if (fetched := self._outcomes.settle(attendance)) is not None:
                return fetched
        for each in self._attended:
            if each.stage is Stage.TAKING:
                self._order.left_queue(each.candidate)
        return None

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


def _may_wait_for_others(session: ClientSession) -> bool:
    """Whether the other side of `session` may be unable to deliver, without any fault."""
    return session.candidate.is_replica or session.fills
