"""What clients ask of a server, and what is done about it: one connection, one thread, one request.

After the greeting a connection may inquire a few times, and then says what it is for: to join (take weights), to be a
data connection of a session, or to announce that its process serves what it took from here. Whoever joins and has to
wait for a turn leaves its thread; the waiting room keeps the connection until there is something to do with it.

What is served may change while somebody waits or is about to begin. So nothing remembers an answer: the client's Join
is kept, and answered anew each time.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from vllm_ascend.model_loader.netloader.config import NetLoaderConfig
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import PeerError, ProtocolError
from vllm_ascend.model_loader.netloader.server import answers, descriptors
from vllm_ascend.model_loader.netloader.server.admission import Turn, Turns
from vllm_ascend.model_loader.netloader.server.answers import Acceptance, Peer
from vllm_ascend.model_loader.netloader.server.listener import Connection, Listener
from vllm_ascend.model_loader.netloader.server.peer_log import PeerLog
from vllm_ascend.model_loader.netloader.server.publications import Publications
from vllm_ascend.model_loader.netloader.server.replicas import Replicas
from vllm_ascend.model_loader.netloader.server.sessions import Sessions
from vllm_ascend.model_loader.netloader.server.waiting import Guest, WaitingRoom
from vllm_ascend.model_loader.netloader.transport.base import Timeouts, Transport
from vllm_ascend.model_loader.netloader.wire.access import Access
from vllm_ascend.model_loader.netloader.wire.channel import Channel, Deadline
from vllm_ascend.model_loader.netloader.wire.greeting import welcome
from vllm_ascend.model_loader.netloader.wire.messages import (
    Announce,
    Attach,
    Attached,
    Inquire,
    Join,
    Refuse,
    Status,
    Wait,
)

MAX_INQUIRIES: Final = 64
"""Status messages on one connection; whoever wants more connects again."""
_UNKNOWN_SESSION: Final = (
    "this server has no such session: it is over, or this connection reached another server than the one before, as "
    "behind a load balancer, where each instance needs an address of its own"
)


@dataclass(frozen=True)
class Settings:
    """How a server treats its clients. `max_bandwidth` is in bytes per second, None for no limit."""

    transports: Sequence[Transport]
    timeouts: Timeouts = field(default_factory=Timeouts)
    access: Access = field(default_factory=Access)
    max_clients: int = NetLoaderConfig.max_clients
    max_bandwidth: int | None = None


class RequestHandler:
    """Handles the requests of all connections, each in a thread of its own.

    `settings` and `peers` may be replaced at any time; what begins afterwards goes by the new ones.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        listener: Listener,
        publications: Publications,
        sessions: Sessions,
        replicas: Replicas,
        turns: Turns,
        log: PeerLog,
    ) -> None:
        self.settings = settings
        self.peers: tuple[Peer, ...] = ()
        self._listener = listener
        self._publications = publications
        self._sessions = sessions
        self._replicas = replicas
        self._turns = turns
        self._waiting_room = WaitingRoom(turns)
        self._log = log

    def handle(self, connection: Connection) -> bool:
        """Does what the client of a new connection asks for. Whether the connection is kept, because the client waits.

        Raises PeerError or OSError if the client fails.
        """
        channel, timeout = connection.channel, self.settings.timeouts.connect
        welcome(channel, self.settings.access, timeout)
        self._listener.guard.succeeded(connection.peer.host)

        for _ in range(MAX_INQUIRIES):
            request = channel.receive(Deadline(timeout))
            if isinstance(request, Inquire):
                channel.send(self._status(), timeout)
                continue

            connection.is_stranger = False
            match request:
                case Attach(session_id):
                    self._attach(channel, session_id)
                case Announce(session_id, port):
                    self._note_replica(session_id, Endpoint(connection.peer.host, port))
                case Join() as join:
                    return self._join(connection, join)
            return False
        return False

    def _status(self) -> Status:
        return answers.status(self._publications, self.settings.transports, len(self._sessions), self._turns.waiting)

    def _attach(self, channel: Channel, session_id: bytes) -> None:
        session = self._sessions.find(session_id)
        timeout = self.settings.timeouts.connect
        if session is None:
            channel.send(Refuse(_UNKNOWN_SESSION), timeout)
            return
        channel.send(Attached(), timeout)
        # A client closes its data connections when it has everything and when it gives up. Which of the two it was, it
        # says on the control connection.
        with contextlib.suppress(PeerError):
            session.sender.attach(channel)

    def _note_replica(self, session_id: bytes, endpoint: Endpoint) -> None:
        if not self._replicas.note_serving(session_id, endpoint):
            raise ProtocolError("it announces weights that it did not take from here")
        self._log.say(logging.INFO, endpoint.host, "%s serves weights that it took from here", endpoint)

    def _answer(self, join: Join) -> Acceptance | Refuse:
        return answers.answer(join, self._publications, self.settings.transports, self.peers)

    def _join(self, connection: Connection, join: Join) -> bool:
        """Serves or refuses the client, or lets it wait for a turn. Whether it waits."""
        answer = self._answer(join)
        if isinstance(answer, Refuse) or not answer.needs_turn:
            self._serve(connection, join)
            return False

        turn = self._turns.take(connection.peer.host)
        if turn is not None:
            self._serve_in_turn(connection, join, turn)
            return False

        self._waiting_room.admit(
            Guest(
                channel=connection.channel,
                address=connection.peer.host,
                notice=functools.partial(self._notice, join),
                go_on=functools.partial(self._go_on, connection, join),
                reconsider=functools.partial(self._reconsider, connection, join),
                leave=functools.partial(self._listener.end, connection),
            )
        )
        return True

    def _notice(self, join: Join, ahead: int, served: int) -> Wait | None:
        """What somebody who waits is told. None if there is nothing to wait for any more.

        Replicas are named only together with the root digest by which the client can tell them from strangers.
        """
        answer = self._answer(join)
        if isinstance(answer, Refuse) or not answer.needs_turn:
            return None
        publication = answer.publication
        root = publication.store.root_if_known()
        referrals = self._replicas.referrals(publication.role, publication.store.generation) if root else ()
        return Wait(ahead, referrals, root, publication.identity.fingerprint, served)

    def _go_on(self, connection: Connection, join: Join, turn: Turn) -> None:
        """Serves, in a new thread, a client that waited and whose turn has come."""

        def serve(connection: Connection) -> bool:
            self._serve_in_turn(connection, join, turn)
            return False

        try:
            self._listener.go_on(connection, serve)
        except RuntimeError:  # there is no thread, and the listener has closed the connection
            self._turns.leave(turn)

    def _reconsider(self, connection: Connection, join: Join) -> None:
        """Answers, in a new thread, a client that waited for something that is no longer served."""
        with contextlib.suppress(RuntimeError):  # there is no thread, and the listener has closed the connection
            self._listener.go_on(connection, functools.partial(self._join, join=join))

    def _serve_in_turn(self, connection: Connection, join: Join, turn: Turn) -> None:
        with turn:
            self._serve(connection, join, turn)

    def _serve(self, connection: Connection, join: Join, turn: Turn | None = None) -> None:
        """Serves the client what is held now, or refuses it. Asks again as long as that changes before it begins."""
        is_answered = False
        while not is_answered:
            answer = self._answer(join)
            if isinstance(answer, Refuse):
                self._refuse(connection, answer)
                return

            beside_connections = answer.transport.traits.descriptors
            if not descriptors.of_peers.take(beside_connections):
                self._refuse(connection, Refuse("no room: this process may have no more open files (RLIMIT_NOFILE)"))
                return
            try:
                is_answered = self._sessions.run(connection, answer, turn, self.settings.timeouts)
            finally:
                descriptors.of_peers.give(beside_connections)

    def _refuse(self, connection: Connection, refusal: Refuse) -> None:
        peer = connection.peer
        if refusal.referrals:
            self._log.say(logging.INFO, peer.host, "referred %s to %s", peer, ", ".join(refusal.referrals))
        else:
            details = "; ".join(map(str, refusal.differences))
            text = "refused %s: %s%s"
            self._log.say(logging.WARNING, peer.host, text, peer, refusal.reason, f": {details}" if details else "")
        connection.channel.send(refusal, self.settings.timeouts.connect)
