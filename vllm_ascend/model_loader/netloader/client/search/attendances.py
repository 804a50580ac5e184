"""The sessions of a search, each with a thread of its own, and what they tell it meanwhile."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Final

from vllm_ascend.model_loader.netloader.client.candidates import Candidate, Contents
from vllm_ascend.model_loader.netloader.client.intake import Intake
from vllm_ascend.model_loader.netloader.client.options import FetchOptions
from vllm_ascend.model_loader.netloader.client.search.order import SourceOrder
from vllm_ascend.model_loader.netloader.client.search.steps import Ask
from vllm_ascend.model_loader.netloader.client.search.vouchers import Vouchers
from vllm_ascend.model_loader.netloader.client.session.attendance import Attendance, Stage
from vllm_ascend.model_loader.netloader.client.session.session import ClientSession
from vllm_ascend.model_loader.netloader.client.stages import Stages
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.transport.base import Transport
from vllm_ascend.model_loader.netloader.wire.messages import Wait

logger = logging.getLogger(__name__)

_LAST_WORD_SECONDS: Final = 1.0
"""For how long sessions may take leave, once one of their sources has confirmed everything."""


class Attendances:
    """Those that are being asked. One thread uses it; what sessions tell comes from their own."""

    def __init__(
        self,
        options: FetchOptions,
        transports: Sequence[Transport],
        *,
        intake: Intake,
        stages: Stages,
        order: SourceOrder,
        vouchers: Vouchers,
    ) -> None:
        self._options = options
        self._transports = transports
        self._intake = intake
        self._stages = stages
        self._order = order
        self._vouchers = vouchers
        self._changed = threading.Condition()
        self._has_news = False
        self._all: list[Attendance] = []
        self._nearby: Candidate | None = None
        """A process of this host of which a session in a queue has found that it has the weights, or brings them."""
        self._alone: ClientSession | None = None
        """The latest session that may bring something; without verification, the only one."""
        intake.on_joined = self._note_joined

    def __iter__(self) -> Iterator[Attendance]:
        return iter(tuple(self._all))

    @property
    def busy(self) -> list[Attendance]:
        """Those from which something is to be expected, other than a turn."""
        return [each for each in self._all if each.is_busy]

    @property
    def is_waiting(self) -> bool:
        """Whether there is a place in a queue."""
        return any(each.stage is Stage.WAITING for each in self._all)

    @property
    def is_taking(self) -> bool:
        """Whether anybody delivers."""
        return any(each.stage is Stage.TAKING for each in self._all)

    @property
    def is_any_over(self) -> bool:
        """Whether there is any to take over."""
        return any(each.stage is Stage.OVER for each in self._all)

    def take_nearby(self) -> Candidate | None:
        """A process of this host to be waited for, once for each time that it was found in a queue."""
        nearby, self._nearby = self._nearby, None
        return nearby

    def begin(self, ask: Ask) -> None:
        """Asks somebody."""
        candidate = ask.candidate
        session = ClientSession(
            self._options,
            candidate,
            transports=[transport for transport in self._transports if transport.name in ask.transports],
            intake=self._intake,
            may_leave=partial(self._order.may_leave, candidate),
            stages=self._stages,
            named=self._note_replicas,
        )
        attendance = Attendance(
            session, may_wait=self._may_wait, may_take=self._may_take, told=self._told, changed=self._tell
        )
        self._all.append(attendance)
        try:
            attendance.start()
        except RuntimeError as error:  # no thread can be had, and one source at a time needs none
            attendance.run_here(error)

    def take_over(self) -> Attendance | None:
        """One that is over, which is not among these any more; None where there is none."""
        attendance = next((each for each in self._all if each.stage is Stage.OVER), None)
        if attendance is not None:
            attendance.join()
            self._all.remove(attendance)
            with self._changed:
                self._alone = None if self._alone is attendance.session else self._alone
        return attendance

    def await_news(self, seconds: float) -> None:
        """Returns when something has happened, or after `seconds`."""
        with self._changed:
            self._changed.wait_for(lambda: self._has_news, seconds)
            self._has_news = False

    def end_all(self) -> list[Attendance]:
        """Ends all sessions, and returns them. Nobody writes into the memory any more then."""
        self._intake.on_joined = lambda _: None
        patience = time.monotonic() + _LAST_WORD_SECONDS
        for attendance in self._all:
            if attendance.stage is not Stage.TAKING or not self._intake.is_complete:
                attendance.end()
        for attendance in self._all:
            if attendance.stage is Stage.TAKING and not attendance.join(max(patience - time.monotonic(), 0.0)):
                attendance.end()
        for attendance in self._all:
            # Whoever still connects has no part of the memory, and ends by itself.
            attendance.join(None if attendance.session.accepted else _LAST_WORD_SECONDS)
            if attendance.fetched is not None and not self._intake.holds(attendance.fetched.memory):
                attendance.fetched.memory.close()
        ended, self._all = self._all, []
        self._alone = None
        return ended

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
            self._vouchers.holds_now(candidate.endpoint, wait.root)
        contents = Contents(wait.root, wait.fingerprint)
        if wait.root and (holder := self._intake.found_nearby(wait.root)) is not None:
            self._nearby = Candidate(holder, candidate.endpoint, contents, is_nearby=True)
            self._tell()
        if self._order.replicas.named(candidate, session.address, wait.referrals, contents):
            self._tell()

    def _note_replicas(self, session: ClientSession, endpoints: Sequence[str]) -> None:
        """Takes in whom a source names while it delivers: they have to have what is being loaded."""
        if session.evidence is not None and session.vouches and not session.candidate.is_replica:
            self._vouchers.holds(session.candidate.endpoint, session.evidence.root)
        contents = self._contents()
        if contents is not None and self._order.replicas.named(session.candidate, session.address, endpoints, contents):
            self._tell()

    def _note_joined(self, endpoint: Endpoint) -> None:
        """Takes in that a client of this process relays the same weights."""
        contents = self._contents()
        if contents is not None and self._order.replicas.joined_here(endpoint, contents):
            self._tell()

    def _contents(self) -> Contents | None:
        evidence = self._intake.evidence
        return None if evidence is None else Contents(evidence.root, self._intake.fingerprint)

    def _tell(self) -> None:
        with self._changed:
            self._has_news = True
            self._changed.notify_all()
