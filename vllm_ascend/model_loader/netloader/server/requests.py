"""What clients ask of a server, and what is done about it: one connection, one thread, one request.

After the greeting a connection may inquire a few times, and then says what it is for: to join (take weights), to be a
data connection of a session, or to announce that its process serves what it took from here. Whoever joins and has to
wait for a turn leaves its thread; the waiting room keeps the connection until there is something to do with it.

What is served may change while somebody waits or is about to begin. So nothing remembers an answer: the client's Join
is kept, and answered anew each time.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from vllm_ascend.model_loader.netloader.config import NetLoaderConfig
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import PeerError, ProtocolError
from vllm_ascend.model_loader.netloader.server import answers, descriptors
from vllm_ascend.model_loader.netloader.server.admission.turns import Turn, Turns
from vllm_ascend.model_loader.netloader.server.admission.waiting import Guest, WaitingRoom
from vllm_ascend.model_loader.netloader.server.answers import Acceptance, ModelFiles, Peer
from vllm_ascend.model_loader.netloader.server.listener import Connection, Listener
from vllm_ascend.model_loader.netloader.server.peer_log import PeerLog
from vllm_ascend.model_loader.netloader.server.publications import Publications
from vllm_ascend.model_loader.netloader.server.replicas import Replicas
from vllm_ascend.model_loader.netloader.server.sessions import Sessions
from vllm_ascend.model_loader.netloader.transport.base import Timeouts, Transport
from vllm_ascend.model_loader.netloader.wire.access import Access
from vllm_ascend.model_loader.netloader.wire.channel import Channel, Deadline
from vllm_ascend.model_loader.netloader.wire.greeting import welcome
from vllm_ascend.model_loader.netloader.wire.messages import (
    Announce,
    AskFiles,
    Attach,
    Attached,
    Describe,
    Inquire,
    Join,
    Message,
    ReadFile,
    Refuse,
    Wait,
)

MAX_INQUIRIES: Final = 64
"""Questions of one kind on one connection; whoever has more connects again."""
MAX_PARTS: Final = 512
"""Parts of small files that are read on one connection: more than all files of a model have."""
_LIMITS: Final[dict[type[Message], int]] = {ReadFile: MAX_PARTS}
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
    """Handles the requests of all connections, each in its connection's thread, by means of the server's other parts.

    `settings`, `peers` and `files` may be replaced at any time; what begins afterwards goes by the new ones.
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
        self.files: ModelFiles | None = None
        self.listener = listener
        self.publications = publications
        self.sessions = sessions
        self.replicas = replicas
        self.turns = turns
        self.waiting_room = WaitingRoom(turns)
        self.log = log

    def handle(self, connection: Connection) -> bool:
        """Does what the client of a new connection asks for. Whether the connection is kept, because the client waits.

        Raises PeerError or OSError if the client fails.
        """
        channel, timeout = connection.channel, self.settings.timeouts.connect
        welcome(channel, self.settings.access, timeout)
        self.listener.guard.succeeded(connection.peer.host)

        asked: Counter[type[Message]] = Counter()
        while True:
            request = channel.receive(Deadline(timeout))
            answer = self._answer(request)
            if answer is not None:
                channel.send(answer, timeout)
                asked[type(request)] += 1
                if isinstance(answer, Refuse) or asked[type(request)] >= _LIMITS.get(type(request), MAX_INQUIRIES):
                    return False
                continue

            connection.is_stranger = False
            match request:
                case Attach(session_id):
                    self._attach(channel, session_id)
                case Announce(session_id, port):
                    self._note_replica(session_id, Endpoint(connection.peer.host, port))
                case Join() as join:
                    return JoinRequest(self, connection, join).begin()
            return False

    def _answer(self, request: Message) -> Message | None:
        """The answer to a question; None where the client says what it has come for."""
        match request:
            case Inquire():
                transports, sessions, waiting = self.settings.transports, len(self.sessions), self.turns.waiting
                return answers.status(self.publications, transports, sessions, waiting, self.peers)
            case Describe(digest):
                return answers.description(digest, self.publications)
            case AskFiles():
                return answers.files(self.publications, self.files)
            case ReadFile(name, offset):
                return answers.part(self.files, name, offset)
            case _:
                return None

    def _attach(self, channel: Channel, session_id: bytes) -> None:
        session = self.sessions.find(session_id)
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
        if not self.replicas.note_serving(session_id, endpoint):
            raise ProtocolError("it announces weights that it did not take from here")
        self.log.say(logging.INFO, endpoint.host, "%s serves weights that it took from here", endpoint)


class JoinRequest(Guest):
    """A client that wants weights, from its Join until it is served or refused. It may wait for a turn in between."""

    def __init__(self, handler: RequestHandler, connection: Connection, join: Join) -> None:
        super().__init__(connection.channel, connection.peer.host)
        self._handler = handler
        self._connection = connection
        self._join = join

    def begin(self) -> bool:
        """Serves or refuses the client, or lets it wait for a turn. Whether it waits."""
        answer = self._answer()
        if isinstance(answer, Refuse) or not answer.needs_turn:
            self._serve()
            return False

        turn = self._handler.turns.take(self.address, in_parts=answer.publication.store.is_filling)
        if turn is not None:
            self._serve_in_turn(turn)
            return False

        self._handler.waiting_room.admit(self)
        return True

    def notice(self, ahead: int, served: int) -> Wait | None:
        """See `Guest`. Replicas are named only with the root digest that tells them from strangers."""
        answer = self._answer()
        if isinstance(answer, Refuse) or not answer.needs_turn:
            return None
        publication = answer.publication
        root = publication.store.root_if_known()
        referrals = self._handler.replicas.referrals(publication.role, publication.store.generation) if root else ()
        return Wait(ahead, referrals, root, publication.identity.fingerprint, served, publication.store.is_filling)

    def go_on(self, turn: Turn) -> None:
        """Serves the client in a new thread."""

        def serve(_: Connection) -> bool:
            self._serve_in_turn(turn)
            return False

        try:
            self._handler.listener.go_on(self._connection, serve)
        except RuntimeError:  # there is no thread, and the listener has closed the connection
            self._handler.turns.leave(turn)

    def reconsider(self) -> None:
        """Begins again in a new thread."""
        begin_again = JoinRequest(self._handler, self._connection, self._join).begin
        with contextlib.suppress(RuntimeError):  # there is no thread, and the listener has closed the connection
            self._handler.listener.go_on(self._connection, lambda _: begin_again())

    def leave(self, reason: PeerError | OSError) -> None:
        """Closes the connection."""
        self._handler.listener.end(self._connection, reason)

    def _answer(self) -> Acceptance | Refuse:
        handler = self._handler
        return answers.answer(self._join, handler.publications, handler.settings.transports, handler.peers)

    def _serve_in_turn(self, turn: Turn) -> None:
        with turn:
            self._serve(turn)

    def _serve(self, turn: Turn | None = None) -> None:
        """Serves the client what is held now, or refuses it. Asks again as long as that changes before it begins."""
        is_answered = False
        while not is_answered:
            answer = self._answer()
            if isinstance(answer, Refuse):
                self._refuse(answer)
                return

            beside_connections = answer.transport.traits.descriptors
            if not descriptors.of_peers.take(beside_connections):
                self._refuse(Refuse("no room: this process may have no more open files (RLIMIT_NOFILE)"))
                return
            try:
                timeouts = self._handler.settings.timeouts
                is_answered = self._handler.sessions.run(self._connection, answer, turn, timeouts)
            finally:
                descriptors.of_peers.give(beside_connections)

    def _refuse(self, refusal: Refuse) -> None:
        peer, log = self._connection.peer, self._handler.log
        if refusal.referrals:
            log.say(logging.INFO, peer.host, "referred %s to %s", peer, ", ".join(refusal.referrals))
        else:
            details = "; ".join(map(str, refusal.differences))
            text = "refused %s: %s%s"
            log.say(logging.WARNING, peer.host, text, peer, refusal.reason, f": {details}" if details else "")
        self.channel.send(refusal, self._handler.settings.timeouts.connect)
