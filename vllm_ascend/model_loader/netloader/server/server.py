"""Hands the weights that a worker process holds to whoever may have them.

The `acceptor` brings connections, each in a thread of its own, with a deadline on every wait, so a silent, slow or
hostile peer ends or delays only itself. Threads that serve give way to inference. What is served is immutable (a sealed
arena), so serving needs no lock against inference, and copies release the GIL.

`publish` and `withdraw` change what is served by role (target, draft). Sessions that still take what was served before
are ended and told why. At most about MAX_CLIENTS sessions move bytes at once; the others are in the `waiting` room
until their turn comes, and are told which earlier clients now have the same weights.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Self

import msgspec

from vllm_ascend.model_loader.netloader.config import NetLoaderConfig
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import ConfigError, PeerError, ProtocolError, one_line
from vllm_ascend.model_loader.netloader.server import descriptors
from vllm_ascend.model_loader.netloader.server.acceptor import Acceptor, Connection
from vllm_ascend.model_loader.netloader.server.admission import Turn, Turns
from vllm_ascend.model_loader.netloader.server.peer_log import PeerLog
from vllm_ascend.model_loader.netloader.server.replicas import Copy, Replicas
from vllm_ascend.model_loader.netloader.server.session import END_SECONDS, Publication, ServerSession
from vllm_ascend.model_loader.netloader.server.waiting import Guest, WaitingRoom
from vllm_ascend.model_loader.netloader.transport.base import Timeouts, Transport
from vllm_ascend.model_loader.netloader.weights.identity import Difference, RankCoordinates
from vllm_ascend.model_loader.netloader.weights.memory import Memory
from vllm_ascend.model_loader.netloader.wire.access import Access
from vllm_ascend.model_loader.netloader.wire.channel import Channel, Deadline
from vllm_ascend.model_loader.netloader.wire.greeting import welcome
from vllm_ascend.model_loader.netloader.wire.messages import (
    REFERRALS_LIMIT,
    Announce,
    Attach,
    Attached,
    Holding,
    Inquire,
    Join,
    Refuse,
    Status,
    Wait,
)
from vllm_ascend.model_loader.netloader.wire.pacing import Pacer

logger = logging.getLogger(__name__)

MAX_INQUIRIES: Final = 64
"""Status messages on one connection; whoever wants more connects again."""
_UNKNOWN_SESSION: Final = (
    "this server has no such session: it is over, or this connection reached another server than the one before, as "
    "behind a load balancer, where each instance needs an address of its own"
)
_TOO_SLOW: Final = "it took next to nothing, and others wait for their turn"


@dataclass(frozen=True)
class Settings:
    """How a server treats its peers. `max_bandwidth` in bytes per second, None without a limit."""

    transports: Sequence[Transport]
    timeouts: Timeouts = field(default_factory=Timeouts)
    access: Access = field(default_factory=Access)
    max_clients: int = NetLoaderConfig.max_clients
    max_bandwidth: int | None = None


class Peer(msgspec.Struct, frozen=True):
    """Another rank of the same instance and where it serves its part; an empty host is that of this server."""

    coordinates: RankCoordinates
    host: str
    port: int


class WeightServer:
    """Serves from `start` to `close`. `host` None means all addresses, `port` 0 an ephemeral one."""

    def __init__(self, host: str | None, port: int, settings: Settings) -> None:
        self._lock = threading.RLock()  # a finalizer may withdraw within any of its blocks
        self._publications: dict[str, Publication] = {}
        self._suspended: dict[str, Publication] = {}
        self._declined: dict[str, str] = {}
        self._generations: dict[str, int] = {}
        self._peers: tuple[Peer, ...] = ()
        self._sessions: dict[bytes, ServerSession] = {}
        self._session_over = threading.Condition(self._lock)
        self._replicas = Replicas()
        self._log = PeerLog(logger)
        self.acceptor = Acceptor(host, port, self._converse, self._log)
        self._turns = Turns(settings.max_clients, settings.max_bandwidth)
        self._waiting_room = WaitingRoom(self._turns)
        self._pacer = Pacer(settings.max_bandwidth)
        self.configure(settings)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Binds and begins to accept. Raises OSError or ConfigError where the address cannot be had."""
        self.acceptor.start(self._settings.timeouts.connect)

    def close(self) -> None:
        """Ends all sessions, waits for their threads, and closes what is served. Idempotent."""
        self.acceptor.stop_accepting()
        with self._lock:
            sessions = list(self._sessions.values())
        self._end(sessions, "the server shuts down")
        self.acceptor.close(self._settings.timeouts.stall, unless={session.channel for session in sessions})
        self._log.tell_left_out(at_once=True)
        for role in [*self._publications, *self._suspended]:
            self.withdraw(role)

    @property
    def port(self) -> int:
        return self.acceptor.port

    def configure(self, settings: Settings) -> None:
        """For sessions from now on: a load may come with another configuration than the one that opened the port."""
        self._settings = settings
        self._pacer.rate = settings.max_bandwidth
        self._turns.configure(settings.max_clients, settings.max_bandwidth)
        self.acceptor.greets_in_clear = settings.access.server_tls is None

    def require_access(self, access: Access, role: str) -> None:
        """Raises ConfigError where `role` is to be served to others than what is served already."""
        with self._lock:
            others = sorted(self._publications.keys() - {role})
        if others and access != self._settings.access:
            raise ConfigError(
                f"TOKEN_FILE or TLS_CERT, TLS_KEY, TLS_CA of the {role} model are not those under which the "
                f"{', '.join(others)} model is served, and both are behind one listener: configure them alike"
            )

    def next_generation(self, role: str) -> int:
        """A generation above all earlier ones of `role`, for the store about to be published."""
        with self._lock:
            self._generations[role] = self._generations.get(role, 0) + 1
            return self._generations[role]

    def publish(self, publication: Publication) -> None:
        """Serves the store from now on, in place of an earlier one of its role. Takes ownership of it."""
        with self._lock:
            replaced = [held.pop(publication.role, None) for held in (self._publications, self._suspended)]
            self._publications[publication.role] = publication
            self._generations[publication.role] = publication.store.generation
            self._declined.pop(publication.role, None)
        for previous in replaced:
            if previous is not None:
                self._give_up(previous, "its weights were replaced by new ones")

    def decline(self, role: str, reason: str) -> None:
        """From now on, clients that want `role` are refused with `reason`; what was served of it no longer is."""
        with self._lock:
            self._declined[role] = reason
            self.withdraw(role)

    def suspend(self, reason: str) -> frozenset[str]:
        """Ends all sessions, and refuses clients with `reason`, until `resume`, `publish` or `give_up`.

        When it returns nothing reads the weights any more, and no client can prevent that; what it returns are the
        roles that were served until now. Raises TimeoutError, and serves them as before, where a session does not end
        all the same, by a fault of this process.
        """
        with self._lock:
            suspended = self._publications
            self._publications = {}
            self._suspended |= suspended
            self._declined |= dict.fromkeys(suspended, reason)
            sessions = list(self._sessions.values())
        self._end(sessions, reason)
        for publication in suspended.values():
            if publication.store.digests is not None:
                publication.store.digests.stop()
        with self._session_over:
            if not self._session_over.wait_for(lambda: not self._sessions, END_SECONDS + self._settings.timeouts.stall):
                left = ", ".join(str(session.peer) for session in self._sessions.values())
                self.resume(suspended)
                raise TimeoutError(
                    f"what is served to {left} is still being read, so it cannot be moved or changed now"
                )
        return frozenset(suspended)

    def resume(self, roles: Iterable[str] | None = None) -> None:
        """Serves again what is suspended, all of it or that of `roles`.

        Its generation is another one: nobody may mix the two.
        """
        with self._lock:
            for role in list(self._suspended) if roles is None else self._suspended.keys() & set(roles):
                publication = self._suspended.pop(role)
                self._declined.pop(role, None)
                store = replace(publication.store, generation=self.next_generation(role))
                if store.digests is not None:
                    store.digests.make_ahead()
                self._publications[role] = replace(publication, store=store)

    def give_up(self, reason: str) -> None:
        """Declines all roles that are served or suspended, for `reason`. Returns and raises as `suspend`."""
        self.suspend(reason)
        with self._lock:
            for role in list(self._suspended):
                self.decline(role, reason)

    def refer_to(self, peers: Iterable[Peer]) -> None:
        """From now on, a client that wants the part of one of `peers` is told where it is."""
        self._peers = tuple(peers)

    def withdraw(self, role: str, memory: weakref.ref[Memory] | None = None) -> None:
        """Stops serving `role`, where given only if it is still served from `memory`."""
        with self._lock:
            held = self._publications if role in self._publications else self._suspended
            publication = held.get(role)
            if publication is None or (memory is not None and memory() is not publication.store.memory):
                return
            del held[role]
        self._give_up(publication, "it does not serve these weights any more")

    def _give_up(self, publication: Publication, reason: str) -> None:
        self._end_sessions(publication, reason)
        publication.store.close()

    def _end_sessions(self, publication: Publication, reason: str) -> None:
        with self._lock:
            concerned = [session for session in self._sessions.values() if session.publication is publication]
        self._end(concerned, reason)

    def _end(self, sessions: Sequence[ServerSession], reason: str) -> None:
        """They are told `reason`, and gone soon, whatever their clients do."""
        for session in sessions:
            session.end(reason)
        if sessions:
            channels = {session.id: session.channel for session in sessions}  # nothing that holds weights
            cutter = threading.Thread(target=self._cut, args=(channels,), name="netloader-end", daemon=True)
            try:
                cutter.start()
            except RuntimeError:  # the system has no thread left
                self._cut(channels, 0)

    def _cut(self, channels: Mapping[bytes, Channel], seconds: float = END_SECONDS) -> None:
        """Closes the connections, by session, of those sessions that are not over after `seconds`."""
        with self._session_over:
            self._session_over.wait_for(lambda: not channels.keys() & self._sessions.keys(), seconds)
            left = [channel for session, channel in channels.items() if session in self._sessions]
        for channel in left:
            channel.shut_down()

    def _converse(self, connection: Connection) -> bool:
        channel, timeout = connection.channel, self._settings.timeouts.connect
        welcome(channel, self._settings.access, timeout)
        self.acceptor.guard.succeeded(connection.peer.host)
        for _ in range(MAX_INQUIRIES):
            request = channel.receive(Deadline(timeout))
            if isinstance(request, Inquire):
                channel.send(self._status(), timeout)
                continue
            connection.is_stranger = False
            match request:
                case Attach(session):
                    self._attach(session, channel)
                case Join() as join:
                    return self._serve_join(connection, join)
                case Announce(session, port):
                    self._note_replica(session, Endpoint(connection.peer.host, port))
            return False
        return False

    def _attach(self, session_id: bytes, channel: Channel) -> None:
        with self._lock:
            session = self._sessions.get(session_id)
        timeout = self._settings.timeouts.connect
        if session is None:
            channel.send(Refuse(_UNKNOWN_SESSION), timeout)
            return
        channel.send(Attached(), timeout)
        with contextlib.suppress(PeerError):  # the client closes data connections when it has all, or gives up;
            session.sender.attach(channel)  # which of the two, its control connection says

    def _note_replica(self, session: bytes, endpoint: Endpoint) -> None:
        if not self._replicas.note_serving(session, endpoint):
            raise ProtocolError("it announces weights that it did not take from here")
        self._log.say(logging.INFO, endpoint.host, "%s serves weights that it took from here", endpoint)

    def _serve_join(self, connection: Connection, join: Join) -> bool:
        """Whether the client waits now."""
        answer = self._answer(join)
        if isinstance(answer, Refuse) or not answer[1].traits.copies:
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
                leave=functools.partial(self.acceptor.end, connection),
            )
        )
        return True

    def _notice(self, join: Join, ahead: int, served: int) -> Wait | None:
        """Of what is served now. None where `join` would not wait now.

        It names replicas only with the root by which they can be told from strangers.
        """
        answer = self._answer(join)
        if isinstance(answer, Refuse) or not answer[1].traits.copies:
            return None
        publication = answer[0]
        root = publication.store.root_if_known()
        referrals = self._replicas.referrals(publication.role, publication.store.generation) if root else ()
        return Wait(ahead, referrals, root, publication.identity.fingerprint, served)

    def _go_on(self, connection: Connection, join: Join, turn: Turn) -> None:
        """The turn of somebody who waited has come."""

        def serve(connection: Connection) -> bool:
            self._serve_in_turn(connection, join, turn)
            return False

        try:
            self.acceptor.go_on(connection, serve)
        except RuntimeError:
            self._turns.leave(turn)

    def _reconsider(self, connection: Connection, join: Join) -> None:
        """What somebody waits for has changed."""
        with contextlib.suppress(RuntimeError):
            self.acceptor.go_on(connection, functools.partial(self._serve_join, join=join))

    def _serve_in_turn(self, connection: Connection, join: Join, turn: Turn) -> None:
        with turn:
            self._serve(connection, join, turn)

    def _serve(self, connection: Connection, join: Join, turn: Turn | None = None) -> None:
        """By what there is to be served now, which may have changed before somebody had a turn, and may do so again."""
        while True:
            answer = self._answer(join)
            if isinstance(answer, Refuse):
                self._refuse(connection, answer)
                return
            if self._hold_session(connection, *answer, turn):
                return

    def _hold_session(
        self, connection: Connection, publication: Publication, transport: Transport, turn: Turn | None
    ) -> bool:
        """False if the publication is not served any more before the session has begun."""
        timeouts = self._settings.timeouts
        if not descriptors.of_peers.take(transport.traits.descriptors):
            self._refuse(connection, Refuse("no room: this process may have no more open files (RLIMIT_NOFILE)"))
            return True
        with contextlib.ExitStack() as ended:
            ended.callback(descriptors.of_peers.give, transport.traits.descriptors)
            forget = ended.enter_context(contextlib.ExitStack())  # the last: by then nothing reads the weights
            try:
                sender = ended.enter_context(transport.sender(publication.store, timeouts, self._pacer))
            except Exception:
                if self._publications.get(publication.role) is publication:
                    raise
                return False  # and its memory was closed
            session = ServerSession(
                connection.channel,
                connection.peer,
                publication=publication,
                transport=transport,
                sender=sender,
                timeouts=timeouts,
                log=self._log,
            )
            with self._lock:
                if self._publications.get(publication.role) is not publication:
                    return False
                self._sessions[session.id] = session
            forget.callback(self._forget_session, session)
            if session.has_ended:
                return False
            if turn is not None:
                turn.meter = sender.rate
                turn.end = functools.partial(self._end, [session], _TOO_SLOW)
            if session.run():
                if sender.has_delivered_all:
                    taken = Copy(connection.peer.host, publication.role, publication.store.generation)
                    self._replicas.note_taken(session.id, taken)
                current = self._publications.get(publication.role)
                session.confirm(current.store.generation if current is not None else 0)
        return True

    def _forget_session(self, session: ServerSession) -> None:
        with self._session_over:
            del self._sessions[session.id]
            self._session_over.notify_all()

    def _answer(self, join: Join) -> Refuse | tuple[Publication, Transport]:
        with self._lock:
            publication = self._publications.get(join.identity.role)
            if publication is None:
                return self._without(join.identity.role)
        differences = publication.identity.mismatch(join.identity)
        displaced = publication.coordinates.mismatch(join.coordinates)
        if displaced and not differences and (referrals := self._referrals(join.coordinates)):
            return Refuse("another rank of this instance holds that part", displaced, referrals=referrals)
        if differences or displaced:
            return Refuse("the model or its partitioning differs", differences + displaced)
        manifest = publication.store.manifest
        if join.manifest_digest != manifest.digest:
            difference = Difference("manifest", manifest.digest, join.manifest_digest)
            return Refuse("the tensors differ", (difference,), manifest.encoded)
        transport = self._choose_transport(join)
        if transport is None:
            names = ", ".join(transport.name for transport in self._settings.transports)
            return Refuse(f"no common transport: this server has {names}")
        return publication, transport

    def _without(self, role: str) -> Refuse:
        roles, declined = sorted(self._publications), self._declined.get(role)
        if declined is not None:
            return Refuse(f"this instance cannot serve its {role} weights: {one_line(declined)}")
        held = f"it holds {', '.join(roles)}" if roles else "it holds no weights yet"
        return Refuse(f"this server does not hold {one_line(role)} weights: {held}")

    def _referrals(self, coordinates: RankCoordinates) -> tuple[str, ...]:
        holding = (peer for peer in self._peers if peer.coordinates == coordinates)
        return tuple(str(Endpoint(peer.host, peer.port)) for peer in itertools.islice(holding, REFERRALS_LIMIT))

    def _choose_transport(self, join: Join) -> Transport | None:
        by_name = {transport.name: transport for transport in self._settings.transports}
        usable = (
            by_name[offer.transport]
            for offer in join.offers
            if offer.transport in by_name and by_name[offer.transport].accepts(offer)
        )
        return next(usable, None)

    def _refuse(self, connection: Connection, refusal: Refuse) -> None:
        peer = connection.peer
        if refusal.referrals:
            self._log.say(logging.INFO, peer.host, "referred %s to %s", peer, ", ".join(refusal.referrals))
        else:
            details = "; ".join(map(str, refusal.differences))
            text = "refused %s: %s%s"
            self._log.say(logging.WARNING, peer.host, text, peer, refusal.reason, f": {details}" if details else "")
        connection.channel.send(refusal, self._settings.timeouts.connect)

    def _status(self) -> Status:
        with self._lock:
            publications, sessions = list(self._publications.values()), len(self._sessions)
            declined = dict(self._declined)
        holdings = tuple(
            Holding(
                role=publication.identity.role,
                identity=publication.identity,
                coordinates=publication.coordinates,
                tensors=len(publication.store.manifest.tensors),
                nbytes=publication.store.manifest.nbytes,
                generation=publication.store.generation,
                root=publication.store.root_if_known(),
            )
            for publication in publications
        )
        names = tuple(transport.name for transport in self._settings.transports)
        return Status(holdings, sessions, names, declined, self._turns.waiting)
