"""The sessions that run now: each begins, is listed while it reads weights, and ends with its client or before.

Weights can be taken away at any time. A session is listed only while what it serves is still served, and whoever takes
weights away does that first and then ends the sessions that are listed: so none of them is missed. When the table has
no session of some weights any more, nothing reads them.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.server.admission.turns import Turn
from vllm_ascend.model_loader.netloader.server.answers import Acceptance
from vllm_ascend.model_loader.netloader.server.listener import Connection
from vllm_ascend.model_loader.netloader.server.peer_log import PeerLog
from vllm_ascend.model_loader.netloader.server.publications import Publication, Publications
from vllm_ascend.model_loader.netloader.server.replicas import Copy, Replicas
from vllm_ascend.model_loader.netloader.server.session import END_SECONDS, ServerSession
from vllm_ascend.model_loader.netloader.transport.base import Timeouts
from vllm_ascend.model_loader.netloader.wire.channel import Channel
from vllm_ascend.model_loader.netloader.wire.pacing import Pacer

_TOO_SLOW: Final = "it took next to nothing, and others wait for their turn"


@dataclass(frozen=True)
class SessionState:
    """One session at one moment. `delivered` is in bytes, and counts what was sent twice once."""

    id: bytes
    peer: Endpoint
    role: str
    generation: int
    delivered: int


class Sessions:
    """Runs sessions, each in its connection's thread, and ends them from any thread. Thread-safe.

    `lock` is that of `publications`.
    """

    def __init__(
        self, publications: Publications, replicas: Replicas, pacer: Pacer, log: PeerLog, lock: threading.RLock
    ) -> None:
        self._publications = publications
        self._replicas = replicas
        self._pacer = pacer
        self._log = log
        self._lock = lock
        self._listed: dict[bytes, ServerSession] = {}
        self._one_is_over = threading.Condition(lock)

    def __len__(self) -> int:
        return len(self._listed)

    def find(self, session_id: bytes) -> ServerSession | None:
        """The session of that id, if it runs now."""
        with self._lock:
            return self._listed.get(session_id)

    def all(self) -> list[ServerSession]:
        """The sessions that run now, oldest first."""
        with self._lock:
            return list(self._listed.values())

    def states(self) -> tuple[SessionState, ...]:
        """The sessions that run now, oldest first, as values that keep no weights alive."""
        return tuple(
            SessionState(
                session.id,
                session.peer,
                session.publication.role,
                session.publication.store.generation,
                session.sender.delivered,
            )
            for session in self.all()
        )

    def run(self, connection: Connection, acceptance: Acceptance, turn: Turn | None, timeouts: Timeouts) -> bool:
        """Serves the client of `connection` from Accept to Confirm.

        Returns False, having sent nothing, if the weights were taken away before the session began: the client is to be
        answered again. Raises PeerError or OSError if the client or its connection fails.
        """
        publication, transport = acceptance.publication, acceptance.transport
        try:
            sender = transport.sender(publication.store, timeouts, self._pacer)
        except Exception:
            if self._is_served(publication):
                raise
            return False  # its memory was closed meanwhile

        session = ServerSession(
            connection.channel,
            connection.peer,
            publication=publication,
            transport=transport,
            sender=sender,
            replicas=self._replicas,
            timeouts=timeouts,
            log=self._log,
        )
        with contextlib.ExitStack() as closing:
            # Left in reverse order: the sender is closed first, so that a session that is not listed reads nothing.
            closing.callback(self._remove, session)
            closing.enter_context(sender)
            closing.callback(session.close)

            if not self._list(session) or session.has_ended:
                return False
            if turn is not None:
                turn.meter = sender.rate
                turn.end = functools.partial(self.end, [session], _TOO_SLOW, denies=False)

            if session.run():
                self._confirm(session)
        return True

    def end(self, sessions: Iterable[ServerSession], reason: str, *, denies: bool = True) -> None:
        """Tells the clients `reason`. The sessions are over soon, whatever their clients do. Does not block.

        `denies` says whether the weights may be others by now, or none.
        """
        channels: dict[bytes, Channel] = {}  # the thread below must keep no weights alive
        for session in sessions:
            session.end(reason, denies=denies)
            channels[session.id] = session.channel
        if not channels:
            return

        cutter = threading.Thread(target=self._cut, args=(channels, END_SECONDS), name="netloader-end", daemon=True)
        try:
            cutter.start()
        except RuntimeError:  # the system has no thread left
            self._cut(channels, 0)

    def end_those_of(self, publication: Publication, reason: str) -> None:
        """Ends the sessions that serve `publication`, as `end` does."""
        self.end([session for session in self.all() if session.publication is publication], reason)

    def wait_until_over(self, sessions: Iterable[ServerSession], timeout: float) -> bool:
        """Waits up to `timeout` seconds for the end of `sessions`. Whether none of them is left."""
        left = {session.id for session in sessions}
        with self._one_is_over:
            return self._one_is_over.wait_for(lambda: not left & self._listed.keys(), timeout)

    def of(self, publications: Collection[Publication]) -> list[ServerSession]:
        """The sessions that read the memory of any of `publications` now, oldest first."""
        memories = {id(publication.store.memory) for publication in publications}
        return [session for session in self.all() if id(session.publication.store.memory) in memories]

    def _is_served(self, publication: Publication) -> bool:
        return any(each is publication for each in self._publications.offered(publication.role))

    def _list(self, session: ServerSession) -> bool:
        with self._lock:
            if not self._is_served(session.publication):
                return False
            self._listed[session.id] = session
            return True

    def _remove(self, session: ServerSession) -> None:
        with self._one_is_over:
            self._listed.pop(session.id, None)
            self._one_is_over.notify_all()

    def _confirm(self, session: ServerSession) -> None:
        """The last word to a client that has everything: which generation is served now."""
        publication = session.publication
        if session.sender.has_delivered_all:
            copy = Copy(session.peer.host, publication.role, publication.store.generation)
            self._replicas.note_taken(session.id, copy)
        offered = self._publications.offered(publication.role)
        current = publication if self._is_served(publication) else next(iter(offered), None)
        session.confirm(current.store.generation if current is not None else 0)

    def _cut(self, channels: Mapping[bytes, Channel], seconds: float) -> None:
        """Closes the connections, given by session, of those sessions that are not over after `seconds`."""
        with self._one_is_over:
            self._one_is_over.wait_for(lambda: not channels.keys() & self._listed.keys(), seconds)
            left = [channel for session_id, channel in channels.items() if session_id in self._listed]
        for channel in left:
            channel.shut_down()
