"""The listener of a worker process: hands the weights it holds to whoever may have them.

One thread accepts and does nothing else; every connection gets a thread of its own, with a deadline on every wait,
so a silent, slow or hostile peer ends or delays only itself. What is served is immutable (a sealed arena), so serving
needs no lock against inference, and copies release the GIL.

`publish` and `withdraw` change what is served by role (target, draft). A session holds on to the store it began with
and is told at the end, through the generation, whether that store is still the current one.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import socket
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Self

import msgspec

from vllm_ascend.model_loader.netloader.channel import Channel, ConnectionLost, Deadline, Stalled
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import ProtocolError, one_line
from vllm_ascend.model_loader.netloader.identity import Difference, ModelIdentity, RankCoordinates
from vllm_ascend.model_loader.netloader.protocol import (
    PROTOCOL_VERSION,
    Accept,
    Attach,
    Confirm,
    Done,
    Hello,
    Holding,
    Inquire,
    Join,
    Leave,
    Refuse,
    Role,
    State,
    Status,
    Welcome,
)
from vllm_ascend.model_loader.netloader.transport.base import Sender, Timeouts, Transport
from vllm_ascend.model_loader.netloader.weights import WeightStore

logger = logging.getLogger(__name__)

MAX_CONNECTIONS: Final = 256
"""Open connections, of all kinds; more are closed at once. Bounds threads and descriptors."""
_REFUSAL_TIMEOUT: Final = 0.1
"""Seconds that the accepting thread may spend on telling a peer that there is no room for it."""
_ACCEPT_PAUSE: Final = 0.05
"""Seconds before the next try after a failed accept, so that a lasting shortage does not busy the process."""


@dataclass(frozen=True)
class Publication:
    """One model that is served."""

    identity: ModelIdentity
    coordinates: RankCoordinates
    store: WeightStore


class Peer(msgspec.Struct, frozen=True):
    """Another rank of the same instance and where it serves its part; an empty host is that of this server."""

    coordinates: RankCoordinates
    host: str
    port: int


class WeightServer:
    """Serves from `start` to `close`. `host` None means all addresses, `port` 0 an ephemeral one."""

    def __init__(self, host: str | None, port: int, transports: Sequence[Transport], timeouts: Timeouts) -> None:
        self._host = host
        self._port = port
        self._transports = tuple(transports)
        self._timeouts = timeouts
        self._lock = threading.RLock()  # a finalizer may withdraw within any of its blocks
        self._publications: dict[str, Publication] = {}
        self._declined: dict[str, str] = {}
        self._generations: dict[str, int] = {}
        self._peers: tuple[Peer, ...] = ()
        self._senders: dict[bytes, Sender] = {}
        self._channels: dict[Channel, threading.Thread] = {}
        self._listener: socket.socket | None = None
        self._acceptor: threading.Thread | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Binds and begins to accept. Raises OSError where the address cannot be had."""
        self._listener = _bind(self._host, self._port)
        self._acceptor = threading.Thread(target=self._accept_forever, name="netloader-accept", daemon=True)
        self._acceptor.start()

    def close(self) -> None:
        """Ends all sessions, waits for their threads, and closes what is served. Idempotent."""
        listener, self._listener = self._listener, None
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        if self._acceptor is not None:
            self._acceptor.join()
        with self._lock:
            connections = dict(self._channels)
            senders = list(self._senders.values())
        for channel in connections:
            channel.shut_down()
        for sender in senders:
            sender.close()
        for thread in connections.values():
            thread.join(self._timeouts.stall)
        for role in list(self._publications):
            self.withdraw(role)

    @property
    def port(self) -> int:
        assert self._listener is not None, "the server is not started"
        port: int = self._listener.getsockname()[1]
        return port

    def configure(self, transports: Sequence[Transport], timeouts: Timeouts) -> None:
        """For sessions from now on: a load may come with another configuration than the one that opened the port."""
        self._transports = tuple(transports)
        self._timeouts = timeouts

    def next_generation(self, role: str) -> int:
        """A generation above all earlier ones of `role`, for the store about to be published."""
        with self._lock:
            self._generations[role] = self._generations.get(role, 0) + 1
            return self._generations[role]

    def publish(self, publication: Publication) -> None:
        """Serves the store from now on, in place of an earlier one of its role. Takes ownership of it."""
        with self._lock:
            previous = self._publications.get(publication.identity.role)
            self._publications[publication.identity.role] = publication
            self._declined.pop(publication.identity.role, None)
        if previous is not None:
            previous.store.close()

    def decline(self, role: str, reason: str) -> None:
        """From now on, clients that want `role` are refused with `reason`; what was served of it no longer is."""
        with self._lock:
            self._declined[role] = reason
            self.withdraw(role)

    def refer_to(self, peers: Iterable[Peer]) -> None:
        """From now on, a client that wants the part of one of `peers` is told where it is."""
        self._peers = tuple(peers)

    def withdraw(self, role: str, generation: int | None = None) -> None:
        """Stops serving `role`, where given only if it is still of that `generation`."""
        with self._lock:
            publication = self._publications.get(role)
            if publication is None or generation not in (None, publication.store.generation):
                return
            del self._publications[role]
        publication.store.close()

    def _accept_forever(self) -> None:
        listener = self._listener
        while listener is not None and self._listener is listener:
            try:
                sock, address = listener.accept()
            except OSError:  # out of descriptors, a connection already aborted, or the listener closed
                if self._listener is listener:
                    time.sleep(_ACCEPT_PAUSE)
                continue
            self._handle_in_thread(sock, Endpoint(_unmapped(address[0]), address[1]))

    def _handle_in_thread(self, sock: socket.socket, peer: Endpoint) -> None:
        channel = Channel(sock, Role.SERVER)
        thread = threading.Thread(target=self._handle, args=(channel, peer), name=f"netloader {peer}", daemon=True)
        with self._lock:
            has_room = len(self._channels) < MAX_CONNECTIONS
            if has_room:
                self._channels[channel] = thread
        if not has_room:
            self._turn_away(channel, peer, f"there are {MAX_CONNECTIONS} connections")
            return
        try:
            thread.start()
        except RuntimeError as error:  # the system has no thread left
            self._channels.pop(channel, None)
            self._turn_away(channel, peer, str(error))

    def _turn_away(self, channel: Channel, peer: Endpoint, reason: str) -> None:
        logger.warning("no room for a connection from %s: %s", peer, reason)
        with channel, contextlib.suppress(ProtocolError):
            channel.send(Refuse(f"no room: {reason}"), _REFUSAL_TIMEOUT)

    def _handle(self, channel: Channel, peer: Endpoint) -> None:
        """Ends with the connection. What a peer does wrong is logged once and touches nobody else."""
        try:
            with channel:
                self._converse(channel, peer)
        except ConnectionLost as error:
            level = logging.WARNING if channel.state in (State.TRANSFER, State.CONFIRMING) else logging.DEBUG
            logger.log(level, "%s went away: %s", peer, error)
        except (ProtocolError, OSError) as error:
            logger.warning("ended the connection with %s: %s", peer, one_line(str(error)))
        except Exception:
            logger.exception("ended the connection with %s: an error of this server", peer)
        finally:
            with self._lock:
                del self._channels[channel]

    def _converse(self, channel: Channel, peer: Endpoint) -> None:
        timeout = self._timeouts.connect
        match channel.receive(Deadline(timeout)):
            case Hello(protocol) if protocol != PROTOCOL_VERSION:
                difference = Difference("protocol", str(PROTOCOL_VERSION), str(protocol))
                self._refuse(channel, peer, Refuse("the protocol versions differ", (difference,)))
                return
        channel.send(Welcome(), timeout)
        while True:
            match channel.receive(Deadline(timeout)):
                case Inquire():
                    channel.send(self._status(), timeout)
                case Attach(session):
                    self._attach(session, channel)
                    return
                case Join() as join:
                    self._serve_join(channel, peer, join)
                    return

    def _attach(self, session: bytes, channel: Channel) -> None:
        with self._lock:
            sender = self._senders.get(session)
        if sender is None:
            raise ProtocolError("a data connection names a session that does not exist")
        with contextlib.suppress(ProtocolError):  # the client closes data connections when it has all, or gives up;
            sender.attach(channel)  # which of the two, its control connection says

    def _serve_join(self, channel: Channel, peer: Endpoint, join: Join) -> None:
        answer = self._answer(join)
        if isinstance(answer, Refuse):
            self._refuse(channel, peer, answer)
            return
        publication, transport = answer
        store, server_host = publication.store, _unmapped(channel.socket.getsockname()[0])
        with transport.sender(store, server_host, self._timeouts) as sender:
            session = secrets.token_bytes(16)
            with self._lock:
                self._senders[session] = sender
            try:
                accept = Accept(
                    session=session,
                    generation=store.generation,
                    transport=transport.name,
                    parameters=sender.parameters,
                    attributes=store.attributes,
                    fingerprint=publication.identity.fingerprint,
                )
                channel.send(accept, self._timeouts.connect)
                sender.run()
                self._finish(channel, peer, publication, transport.name, sender)
            finally:
                with self._lock:
                    del self._senders[session]

    def _finish(
        self, channel: Channel, peer: Endpoint, publication: Publication, transport: str, sender: Sender
    ) -> None:
        role = publication.identity.role
        match self._wait_while_progressing(channel, sender):
            case Leave(reason):
                logger.warning("%s gave up taking the %s weights by %s: %s", peer, role, transport, one_line(reason))
            case Done():
                with self._lock:
                    current = self._publications.get(role)
                    generation = current.store.generation if current else 0
                channel.send(Confirm(generation), self._timeouts.connect)
                nbytes = publication.store.manifest.nbytes
                logger.info("%s took the %s weights by %s: %.1f MB", peer, role, transport, nbytes / 1e6)

    def _wait_while_progressing(self, channel: Channel, sender: Sender) -> object:
        sender.note_progress()
        while True:
            remaining = self._timeouts.stall - sender.idle_seconds()
            try:
                return channel.receive(Deadline(max(remaining, 0.001)))
            except Stalled as error:
                if sender.idle_seconds() >= self._timeouts.stall:
                    raise Stalled(f"the client took nothing for {self._timeouts.stall:g} s") from error

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
            names = ", ".join(transport.name for transport in self._transports)
            return Refuse(f"no common transport: this server has {names}")
        return publication, transport

    def _without(self, role: str) -> Refuse:
        roles, declined = sorted(self._publications), self._declined.get(role)
        if declined is not None:
            return Refuse(f"this instance cannot serve its {role} weights: {one_line(declined)}")
        held = f"it holds {', '.join(roles)}" if roles else "it holds no weights yet"
        return Refuse(f"this server does not hold {one_line(role)} weights: {held}")

    def _referrals(self, coordinates: RankCoordinates) -> tuple[str, ...]:
        return tuple(str(Endpoint(peer.host, peer.port)) for peer in self._peers if peer.coordinates == coordinates)

    def _choose_transport(self, join: Join) -> Transport | None:
        by_name = {transport.name: transport for transport in self._transports}
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
            logger.warning("refused %s: %s%s", peer, refusal.reason, f": {details}" if details else "")
        channel.send(refusal, self._timeouts.connect)

    def _status(self) -> Status:
        with self._lock:
            publications, sessions = list(self._publications.values()), len(self._senders)
            declined = dict(self._declined)
        holdings = tuple(
            Holding(
                role=publication.identity.role,
                identity=publication.identity,
                coordinates=publication.coordinates,
                tensors=len(publication.store.manifest.tensors),
                nbytes=publication.store.manifest.nbytes,
                generation=publication.store.generation,
            )
            for publication in publications
        )
        return Status(holdings, sessions, tuple(transport.name for transport in self._transports), declined)


def _bind(host: str | None, port: int) -> socket.socket:
    if host is None:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=128)
        return socket.create_server(("", port), backlog=128)
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    return socket.create_server(address[:2], family=family, backlog=128)


def _unmapped(address: str) -> str:
    """An IPv4 peer of a dual-stack socket has an address like ::ffff:10.0.0.1."""
    return address.removeprefix("::ffff:")
