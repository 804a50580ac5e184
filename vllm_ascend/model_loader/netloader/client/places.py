"""The places that a client keeps in the queues of busy sources while it asks others.

A place is a connection that has joined and on which the source says, every now and then, that others come first. A
thread listens on each, so the places move up whatever else the client does; when a turn comes, whoever holds the
places decides whether it is still wanted.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Self

from vllm_ascend.model_loader.netloader.client.session import ClientSession
from vllm_ascend.model_loader.netloader.errors import SourceError, TransportError
from vllm_ascend.model_loader.netloader.wire.messages import Wait

_JOIN_SECONDS: Final = 5.0
"""How long ending a listening thread may take, once its connection is shut down."""


@dataclass(frozen=True)
class Turn:
    """What has become of a place: it is this client's turn, or the source has failed or refused meanwhile."""

    session: ClientSession
    failure: SourceError | TransportError | None = None


class Places:
    """`told` hears what a source says to those who wait; `wanted` decides on a turn in the moment that it comes, and
    `came` hears of one that can be taken now.

    Use it with `with`, which gives up all places in the end.
    """

    def __init__(
        self,
        told: Callable[[ClientSession, Wait], None],
        wanted: Callable[[ClientSession], bool],
        came: Callable[[ClientSession], None],
    ) -> None:
        self._told = told
        self._wanted = wanted
        self._came = came
        self._changed = threading.Condition()
        self._kept: dict[ClientSession, threading.Thread] = {}
        self._turns: deque[Turn] = deque()
        self._is_news = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.give_up()

    def __len__(self) -> int:
        """Places whose turn has not come yet."""
        with self._changed:
            return len(self._kept)

    def keep(self, session: ClientSession) -> None:
        """Takes over `session`, which waits for its turn. Raises TransportError where no thread can be had."""
        thread = threading.Thread(target=self._listen, args=(session,), name="netloader-place", daemon=True)
        with self._changed:
            self._kept[session] = thread
        try:
            thread.start()
        except RuntimeError as error:
            with self._changed:
                del self._kept[session]
            raise TransportError(f"this process cannot start threads: {error}") from error

    def take_turn(self) -> Turn | None:
        """The first turn that has come; the session is the caller's again."""
        with self._changed:
            return self._turns.popleft() if self._turns else None

    def wait(self, timeout: float) -> float:
        """Returns when a turn has come, somebody else was named, or after `timeout`; the seconds that it took."""
        begun = time.monotonic()
        with self._changed:
            self._changed.wait_for(lambda: self._turns or self._is_news, timeout)
            self._is_news = False
        return time.monotonic() - begun

    def note_news(self) -> None:
        """Wakes whoever waits: there is somebody else to ask."""
        with self._changed:
            self._is_news = True
            self._changed.notify_all()

    def give_up(self) -> list[ClientSession]:
        """Leaves all queues; the sessions that were in them, closed."""
        with self._changed:
            kept, self._kept = self._kept, {}
            turns, self._turns = self._turns, deque()
        for session in kept:
            session.break_off()
        for session, thread in kept.items():
            thread.join(_JOIN_SECONDS)
            session.close()
        for turn in turns:
            turn.session.close()
        return [*kept, *(turn.session for turn in turns)]

    def _listen(self, session: ClientSession) -> None:
        failure: SourceError | TransportError | None = None
        try:
            session.await_turn(lambda wait: self._told(session, wait))
        except (SourceError, TransportError) as error:
            failure = error
        is_wanted = failure is not None or self._wanted(session)
        with self._changed:
            is_given_up = self._kept.pop(session, None) is None
            if is_wanted and not is_given_up:
                self._turns.append(Turn(session, failure))
            self._changed.notify_all()
        if not is_wanted:
            session.close()
        elif failure is None and not is_given_up:
            self._came(session)  # not before it can be taken: whoever is woken by it looks for it
