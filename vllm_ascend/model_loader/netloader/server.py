"""The listener of a worker process: hands the weights it holds to whoever may have them.

One thread accepts and does nothing else; every connection gets a thread of its own, with a deadline on every wait,
so a silent, slow or hostile peer ends or delays only itself. Threads that serve give way to inference. What is served
is immutable (a sealed arena), so serving needs no lock against inference, and copies release the GIL.

`publish` and `withdraw` change what is served by role (target, draft). Sessions that still take what was served before
are ended and told why. At most MAX_CLIENTS sessions move bytes at once; the others wait for their turn and are told
which earlier clients now have the same weights.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import socket
import threading
import time
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Self

import msgspec

from vllm_ascend.model_loader.netloader.access import Access
from vllm_ascend.model_loader.netloader.admission import Guard, LogLimit, Turn, Turns
from vllm_ascend.model_loader.netloader.channel import Channel, ConnectionLost, Deadline
from vllm_ascend.model_loader.netloader.config import NetLoaderConfig
from vllm_ascend.model_loader.netloader.endpoint import Endpoint, unmapped
from vllm_ascend.model_loader.netloader.errors import ConfigError, ProtocolError, one_line
from vllm_ascend.model_loader.netloader.greeting import Unauthorized, welcome
from vllm_ascend.model_loader.netloader.identity import Difference, RankCoordinates
from vllm_ascend.model_loader.netloader.listening import Listener
from vllm_ascend.model_loader.netloader.memory import Memory
from vllm_ascend.model_loader.netloader.pacing import Pacer, give_way
from vllm_ascend.model_loader.netloader.protocol import (
    REFERRALS_LIMIT,
    Announce,
    Attach,
    Attached,
    Holding,
    Inquire,
    Join,
    Refuse,
    Role,
    State,
    Status,
    Wait,
)
from vllm_ascend.model_loader.netloader.replicas import Copy, Replicas
from vllm_ascend.model_loader.netloader.server_session import END_SECONDS, Publication, Session
from vllm_ascend.model_loader.netloader.transport.base import Timeouts, Transport

logger = logging.getLogger(__name__)

MAX_CONNECTIONS: Final = 1024
"""Open connections, of all kinds; more are closed at once. Bounds threads and descriptors."""
MAX_CONNECTIONS_PER_HOST: Final = 512
MAX_STRANGERS_PER_HOST: Final = 256
"""Connections of one address that have not said yet what they want."""
MAX_INQUIRIES: Final = 64
"""Status messages on one connection; whoever wants more connects again."""
WAIT_NOTICE: Final = 1.0
"""Seconds between two messages to a client that waits for its turn."""
SLOW: Final = 1 << 20
"""Bytes per second that nobody who takes weights falls below for long, unless MAX_BANDWIDTH makes it so."""
_UNKNOWN_SESSION: Final = (
    "this server has no such session: it is over, or this connection reached another server than the one before, as "
    "behind a load balancer, where each instance needs an address of its own"
)
_REFUSAL_TIMEOUT: Final = 0.1
"""Seconds that the accepting thread may spend on telling a peer that there is no room for it."""
_ACCEPT_PAUSE: Final = 0.05
"""Seconds before the next try after a failed accept, so that a lasting shortage does not busy the process."""


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


@dataclass
class _Connection:
    thread: threading.Thread
    host: str
    is_stranger: bool = True


class WeightServer:
    """Serves from `start` to `close`. `host` None means all addresses, `port` 0 an ephemeral one."""

    def __init__(self, host: str | None, port: int, settings: Settings) -> None:
        self._host = host
        self._port = port
        self._lock = threading.RLock()  # a finalizer may withdraw within any of its blocks
        self._publications: dict[str, Publication] = {}
        self._suspended: dict[str, Publication] = {}
        self._declined: dict[str, str] = {}
        self._generations: dict[str, int] = {}
        self._peers: tuple[Peer, ...] = ()
        self._sessions: dict[bytes, Session] = {}
        self._session_over = threading.Condition(self._lock)
        self._replicas = Replicas()
        self._connections: dict[Channel, _Connection] = {}
        self._guard = Guard()
        self._log_limit = LogLimit()
        self._turns = Turns(settings.max_clients)
        self._pacer = Pacer(settings.max_bandwidth)
        self._listener: Listener | None = None
        self._acceptor: threading.Thread | None = None
        self.configure(settings)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Binds and begins to accept. Raises OSError or ConfigError where the address cannot be had."""
        self._listener = Listener(self._host, self._port, self._settings.timeouts.connect)
        self._acceptor = threading.Thread(target=self._accept_forever, name="netloader-accept", daemon=True)
        self._acceptor.start()

    def close(self) -> None:
        """Ends all sessions, waits for their threads, and closes what is served. Idempotent."""
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.close()
        if self._acceptor is not None:
            self._acceptor.join()
        with self._lock:
            connections = dict(self._connections)
            sessions = list(self._sessions.values())
        self._end(sessions, "the server shuts down")
        for channel in connections.keys() - {session.channel for session in sessions}:
            channel.shut_down()
        for connection in connections.values():
            connection.thread.join(self._settings.timeouts.stall)
        for role in [*self._publications, *self._suspended]:
            self.withdraw(role)

    @property
    def port(self) -> int:
        assert self._listener is not None, "the server is not started"
        return self._listener.port

    def configure(self, settings: Settings) -> None:
        """For sessions from now on: a load may come with another configuration than the one that opened the port."""
        self._settings = settings
        self._pacer.rate = settings.max_bandwidth
        self._turns.set_limit(settings.max_clients)

    def require_access(self, access: Access, role: str) -> None:
        """Raises ConfigError where `role` is to be served to others than what is served already."""
        with self._lock:
            others = sorted(self._publications.keys() - {role})
        if others and access != self._settings.access:
            raise ConfigError(
                f"TOKEN_FILE or TLS_CERT, TLS_KEY, TLS_CA of the {role} model are not those under which the "
                f"{', '.join(others)} model is served, and both are behind one listener: configure them alike"
            )

    @property
    def _slow_rate(self) -> float:
        """Bytes per second below which a session does not count as one of MAX_CLIENTS."""
        share = (self._settings.max_bandwidth or math.inf) / self._settings.max_clients
        return min(SLOW, share / 4)

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

    def _end(self, sessions: Sequence[Session], reason: str) -> None:
        """They are told `reason`, and gone soon, whatever their clients do."""
        for session in sessions:
            session.end(reason)
        channels = [session.channel for session in sessions]  # a session would keep the weights until the time is up

        channels = [session.channel for session in sessions]  # whose end releases what the sessions hold

        def cut() -> None:
            for channel in channels:
                channel.shut_down()

        if sessions:
            timer = threading.Timer(END_SECONDS, cut)
            timer.daemon = True
            try:
                timer.start()
            except RuntimeError:  # the system has no thread left
                cut()

    def _accept_forever(self) -> None:
        listener = self._listener
        while listener is not None and self._listener is listener:
            try:
                sock, address = listener.accept()
            except OSError:  # out of descriptors, a connection already aborted, or the listener closed
                if self._listener is listener:
                    time.sleep(_ACCEPT_PAUSE)
                continue
            self._handle_in_thread(sock, Endpoint(unmapped(address[0]), address[1]))

    def _handle_in_thread(self, sock: socket.socket, peer: Endpoint) -> None:
        channel = Channel(sock, Role.SERVER)
        if not self._guard.admits(peer.host):
            channel.close()
            return
        thread = threading.Thread(target=self._handle, args=(channel, peer), name=f"netloader {peer}", daemon=True)
        with self._lock:
            crowd = self._crowd(peer.host)
            if crowd is None:
                self._connections[channel] = _Connection(thread, peer.host)
        if crowd is not None:
            self._turn_away(channel, peer, crowd)
            return
        try:
            thread.start()
        except RuntimeError as error:  # the system has no thread left
            self._forget(channel)
            self._turn_away(channel, peer, str(error))

    def _crowd(self, host: str) -> str | None:
        """What stands in the way of one more connection, so that no single host can take them all."""
        if len(self._connections) >= MAX_CONNECTIONS:
            return f"there are {MAX_CONNECTIONS} connections"
        same_host = [each for each in self._connections.values() if each.host == host]
        if len(same_host) >= MAX_CONNECTIONS_PER_HOST:
            return f"there are {MAX_CONNECTIONS_PER_HOST} connections from there"
        if sum(each.is_stranger for each in same_host) >= MAX_STRANGERS_PER_HOST:
            return f"{MAX_STRANGERS_PER_HOST} connections from there have not said yet what they want"
        return None

    def _turn_away(self, channel: Channel, peer: Endpoint, reason: str) -> None:
        if self._log_limit.admits(peer.host):
            logger.warning("no room for a connection from %s: %s", peer, reason)
        with channel, contextlib.suppress(ProtocolError, OSError):  # nothing may end the accepting thread
            if self._settings.access.server_tls is None:  # under TLS there is no time for a word
                channel.send(Refuse(f"no room: {reason}"), _REFUSAL_TIMEOUT)

    def _handle(self, channel: Channel, peer: Endpoint) -> None:
        """Ends with the connection. What a peer does wrong is logged once and touches nobody else."""
        give_way()
        try:
            with channel:
                self._converse(channel, peer)
        except Unauthorized as error:
            if self._guard.failed(peer.host):
                logger.warning("turned away %s: %s", peer, one_line(str(error)))
        except ConnectionLost as error:
            level = logging.WARNING if channel.state in (State.TRANSFER, State.CONFIRMING) else logging.DEBUG
            logger.log(level, "%s went away: %s", peer, error)
        except (ProtocolError, OSError) as error:
            if not self._connections[channel].is_stranger or self._log_limit.admits(peer.host):
                logger.warning("ended the connection with %s: %s", peer, one_line(str(error)))
        except Exception:
            logger.exception("ended the connection with %s: an error of this server", peer)
        finally:
            self._forget(channel)

    def _forget(self, channel: Channel) -> None:
        with self._lock:
            del self._connections[channel]

    def _converse(self, channel: Channel, peer: Endpoint) -> None:
        timeout = self._settings.timeouts.connect
        welcome(channel, self._settings.access, timeout)
        self._guard.succeeded(peer.host)
        for _ in range(MAX_INQUIRIES):
            request = channel.receive(Deadline(timeout))
            if isinstance(request, Inquire):
                channel.send(self._status(), timeout)
                continue
            self._connections[channel].is_stranger = False
            match request:
                case Attach(session):
                    self._attach(session, channel)
                case Join() as join:
                    self._serve_join(channel, peer, join)
                case Announce(session, port):
                    self._note_replica(session, Endpoint(peer.host, port))
            return

    def _attach(self, session_id: bytes, channel: Channel) -> None:
        with self._lock:
            session = self._sessions.get(session_id)
        timeout = self._settings.timeouts.connect
        if session is None:
            channel.send(Refuse(_UNKNOWN_SESSION), timeout)
            return
        channel.send(Attached(), timeout)
        with contextlib.suppress(ProtocolError):  # the client closes data connections when it has all, or gives up;
            session.sender.attach(channel)  # which of the two, its control connection says

    def _note_replica(self, session: bytes, endpoint: Endpoint) -> None:
        if not self._replicas.note_serving(session, endpoint):
            raise ProtocolError("it announces weights that it did not take from here")
        logger.info("%s serves weights that it took from here", endpoint)

    def _serve_join(self, channel: Channel, peer: Endpoint, join: Join) -> None:
        answer = self._answer(join)
        with contextlib.ExitStack() as turn_scope:
            turn = None
            if not isinstance(answer, Refuse) and answer[1].copies:
                turn = turn_scope.enter_context(self._turns.queue(peer.host))
                self._await(channel, turn, answer[0])
                answer = self._answer(join)  # which may be another one by now
            if isinstance(answer, Refuse):
                self._refuse(channel, peer, answer)
            else:
                self._serve(channel, peer, *answer, turn)

    def _await(self, channel: Channel, turn: Turn, publication: Publication) -> None:
        """Returns when the turn has come. Raises ConnectionLost when the client no longer waits for it."""
        has_come = turn.wait(0)
        while not has_come:
            channel.send(self._notice(turn, publication), self._settings.timeouts.connect)
            has_come = turn.wait(WAIT_NOTICE)

    def _notice(self, turn: Turn, publication: Publication) -> Wait:
        """Names replicas only with the root by which they can be told from strangers."""
        root = publication.store.root_if_known()
        referrals = self._replicas.referrals(publication.role, publication.store.generation) if root else ()
        return Wait(turn.ahead, referrals, root, publication.identity.fingerprint)

    def _serve(
        self, channel: Channel, peer: Endpoint, publication: Publication, transport: Transport, turn: Turn | None
    ) -> None:
        timeouts = self._settings.timeouts
        with contextlib.ExitStack() as ended:
            forget = ended.enter_context(contextlib.ExitStack())  # the last: by then nothing reads the weights
            sender = ended.enter_context(transport.sender(publication.store, timeouts, self._pacer))
            if turn is not None:
                turn.is_slow = lambda: sender.is_slow(self._slow_rate)
            session = Session(
                channel, peer, publication=publication, transport=transport, sender=sender, timeouts=timeouts
            )
            with self._lock:
                self._sessions[session.id] = session
            forget.callback(self._forget_session, session)
            if self._publications.get(publication.role) is not publication:
                session.end("its weights were replaced by new ones")
            if session.run():
                if sender.has_delivered_all:
                    taken = Copy(peer.host, publication.role, publication.store.generation)
                    self._replicas.note_taken(session.id, taken)
                current = self._publications.get(publication.role)
                session.confirm(current.store.generation if current is not None else 0)

    def _forget_session(self, session: Session) -> None:
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

    def _refuse(self, channel: Channel, peer: Endpoint, refusal: Refuse) -> None:
        if refusal.referrals:
            logger.info("referred %s to %s", peer, ", ".join(refusal.referrals))
        else:
            details = one_line("; ".join(map(str, refusal.differences)))
            if self._log_limit.admits(f"{peer.host} {refusal.reason[:24]}"):
                logger.warning("refused %s: %s%s", peer, refusal.reason, f": {details}" if details else "")
        channel.send(refusal, self._settings.timeouts.connect)

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
