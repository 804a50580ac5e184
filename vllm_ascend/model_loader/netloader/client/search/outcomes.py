"""What follows from sessions that are over: when the weights are good, and who is asked again.

Weights are good when every chunk has passed, and a source that is trusted has confirmed that it still has the same.
Where no such source is left, and one of them has told the root digest before, each chunk is proven to be what that
source had, and nobody has said that it was replaced since: then they are good too, with a warning.

Every attempt that fails is noted with its reason. Only errors of sources and transports lead to the next step; any
other error is a fault of this process and ends the search.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from vllm_ascend.model_loader.netloader.client.candidates import Candidate
from vllm_ascend.model_loader.netloader.client.fetched import Fetched
from vllm_ascend.model_loader.netloader.client.intake import Intake
from vllm_ascend.model_loader.netloader.client.search.attempts import Attempts
from vllm_ascend.model_loader.netloader.client.search.attendances import Attendances
from vllm_ascend.model_loader.netloader.client.search.order import SourceOrder
from vllm_ascend.model_loader.netloader.client.search.steps import Ask
from vllm_ascend.model_loader.netloader.client.search.vouchers import Vouchers
from vllm_ascend.model_loader.netloader.client.session.attendance import Attendance, Stage
from vllm_ascend.model_loader.netloader.client.session.session import ClientSession
from vllm_ascend.model_loader.netloader.errors import (
    OtherContents,
    SourceError,
    SourceFailed,
    SourceRefused,
    TransportError,
)

logger = logging.getLogger(__name__)


class Outcomes:
    """Judges what becomes of the sessions of one search. For its thread."""

    def __init__(
        self,
        intake: Intake,
        *,
        order: SourceOrder,
        attended: Attendances,
        attempts: Attempts,
        vouchers: Vouchers,
        mapping: Sequence[str],
    ) -> None:
        """`mapping` are the names of the transports by which pages of this host can be had."""
        self._intake = intake
        self._order = order
        self._attended = attended
        self._attempts = attempts
        self._vouchers = vouchers
        self._mapping = tuple(mapping)

    def settle(self, attendance: Attendance) -> Fetched | None:
        """Takes in what has become of a session: the weights, if they are complete and confirmed."""
        session, candidate = attendance.session, attendance.candidate
        failure = attendance.take_failure()
        self._attempts.over(session)
        self._order.left_queue(candidate)
        if candidate.is_nearby:
            self._intake.leave_nearby(candidate.endpoint)
            self._order.begin_round()
        elif candidate.is_replica:
            self._order.replicas.spent(session.owing_seconds, session.brought)
        else:
            self._note_contents(session, failure)

        if session.holder_nearby is not None:
            self._postponed(candidate)
            self.wait_for(session.holder_nearby)
            return None
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

    def wait_for(self, holder: Candidate) -> None:
        """Waits for a process of this host, unless one is being waited for already."""
        if not any(each.candidate.is_nearby for each in self._attended):
            self._attended.begin(Ask(holder, self._mapping))

    def confirmed_in_a_queue(self) -> Fetched | None:
        """The complete weights, if a source that lets this client wait says that it has just these."""
        evidence = self._intake.evidence
        if not self._intake.is_complete or evidence is None or not self._attended.is_waiting:
            return None
        return self._attempts.settled(evidence) if self._vouchers.know_now(evidence.root) else None

    def without_confirmation(self) -> Fetched:
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

    def _postponed(self, candidate: Candidate) -> None:
        if candidate.is_replica:
            self._order.replicas.ended(candidate)
        else:
            self._order.postponed(candidate)

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
