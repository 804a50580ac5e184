"""The places that a client keeps in the queues of busy sources while it attends to another one.

A place is a connection that has joined, and on which the source says every now and then that others come first. A
thread listens on each, so the client moves up whatever else it does.

When a turn comes, it is weighed against the session that the client attends to. A turn at a configured source ends what
a replica is bringing, and whatever only asks; but while a configured source delivers, a turn elsewhere is given back,
so that its server can serve somebody else.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Self

from vllm_ascend.model_loader.netloader.client.order import Contents, SourceOrder
from vllm_ascend.model_loader.netloader.client.session import ClientSession
from vllm_ascend.model_loader.netloader.errors import SourceError, TransportError
from vllm_ascend.model_loader.netloader.wire.messages import Wait

logger = logging.getLogger(__name__)

_JOIN_SECONDS: Final = 5.0
"""How long a listening thread may take to end, once its connection is shut down."""
_PATIENCE: Final = 2.0
"""Seconds in which chunks on their way from a replica may still arrive when the turn at a source has come."""


@dataclass(frozen=True)
class Turn:
    """What has become of a place: it is this client's turn, or the source has failed or refused meanwhile."""

    session: ClientSession
    failure: SourceError | TransportError | None = None


class Places:
    """All places that a client has in queues, and the session that it attends to meanwhile.

    Use it with `with`, which gives up all places in the end.
    """

    def __init__(self, order: SourceOrder) -> None:
        """`order` hears of the replicas that are named to those who wait, and of turns that are given back."""
        self._order = order
        self._changed = threading.Condition()
        self._listening: dict[ClientSession, threading.Thread] = {}
        self._turns: deque[Turn] = deque()
        self._attended: ClientSession | None = None
        self._has_news = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.give_up()

    @contextlib.contextmanager
    def attending(self, session: ClientSession) -> Iterator[None]:
        """A scope within which the client attends to `session`; a turn elsewhere may break that off."""
        with self._changed:
            self._attended = session
        try:
            yield
        finally:
            with self._changed:
                self._attended = None

    def keep(self, session: ClientSession, wait: Wait) -> bool:
        """Keeps the place of `session`, to which the source has said `wait`, if it is worth keeping.

        Returns whether it is kept, and the session no longer the caller's. Raises TransportError where no thread can be
        had.
        """
        self._note_replicas(session, wait)

        candidate = session.candidate
        with self._changed:
            # A turn elsewhere breaks off only what is attended to. So whether one has is certain from here on.
            self._attended = None
            if session.broken_off:
                self._order.postponed(candidate)
                return False
            if not self._order.busy(candidate):
                return False
            thread = threading.Thread(target=self._listen, args=(session,), name="netloader-place", daemon=True)
            self._listening[session] = thread

        text = "waiting for a turn at %s: %d served now, %d more come first"
        logger.info(text, candidate.endpoint, wait.served, wait.ahead)
        try:
            thread.start()
        except RuntimeError as error:
            with self._changed:
                del self._listening[session]
            self._order.left_queue(candidate)
            raise TransportError(f"this process cannot start threads: {error}") from error
        return True

    def take_turn(self) -> Turn | None:
        """The first turn that has come, None where none has. Its session is the caller's again."""
        with self._changed:
            if not self._turns:
                return None
            turn = self._turns.popleft()
        self._order.left_queue(turn.session.candidate)
        return turn

    def wait(self, timeout: float) -> float:
        """Waits up to `timeout` seconds for a turn or for somebody else to be named. Returns how many that took."""
        begun = time.monotonic()
        with self._changed:
            self._changed.wait_for(lambda: self._turns or self._has_news, timeout)
            self._has_news = False
        return time.monotonic() - begun

    def give_up(self) -> list[ClientSession]:
        """Leaves all queues. Returns the sessions that were in them, closed."""
        with self._changed:
            listening, self._listening = self._listening, {}
            turns, self._turns = self._turns, deque()

        # All connections are shut down before any thread is waited for, so that the threads end at the same time.
        for session in listening:
            session.break_off()
            session.shut_down()
        for session, thread in listening.items():
            thread.join(_JOIN_SECONDS)
            session.close()
        for turn in turns:
            turn.session.close()
        return [*listening, *(turn.session for turn in turns)]

    def _listen(self, session: ClientSession) -> None:
        failure: SourceError | TransportError | None = None
        try:
            session.await_turn(lambda wait: self._note_replicas(session, wait))
        except (SourceError, TransportError) as error:
            failure = error

        with self._changed:
            if self._listening.pop(session, None) is None:
                return  # the place was given up, and whoever did that closes the session
            attended = self._attended if failure is None else None
            is_wanted = attended is None or _gives_way(attended)
            if is_wanted:
                self._turns.append(Turn(session, failure))
                self._changed.notify_all()
            else:
                self._order.postponed(session.candidate)
            if is_wanted and attended is not None:
                attended.break_off()

        # The turn was noted first: as soon as the attended session ends, its thread looks for one.
        if not is_wanted:
            session.close()
        elif attended is not None:
            attended.shut_down(_PATIENCE)

    def _note_replicas(self, session: ClientSession, wait: Wait) -> None:
        contents = Contents(wait.root, wait.fingerprint)
        if self._order.replicas_named(session.candidate, session.address, wait.referrals, contents):
            with self._changed:
                self._has_news = True
                self._changed.notify_all()


def _gives_way(attended: ClientSession) -> bool:
    """Whether a turn at a source is worth more than the session that the client attends to."""
    return attended.candidate.is_replica or not attended.accepted
