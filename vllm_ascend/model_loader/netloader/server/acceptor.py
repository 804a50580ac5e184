"""Accepts the connections of a server, and keeps the table of them.

One thread accepts and does nothing else; every connection then gets a thread of its own for as long as something is
done with it. Whatever goes wrong in one ends only this one, and is logged here. Nobody may have so many connections
that others get none, and all together never so many descriptors that the engine runs out of them.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import Final

from vllm_ascend.model_loader.netloader.endpoint import Endpoint, unmapped
from vllm_ascend.model_loader.netloader.errors import ConnectionLost, PeerError, Unauthorized
from vllm_ascend.model_loader.netloader.server import descriptors
from vllm_ascend.model_loader.netloader.server.admission import Guard, network_of
from vllm_ascend.model_loader.netloader.server.listening import Listener
from vllm_ascend.model_loader.netloader.server.peer_log import PeerLog
from vllm_ascend.model_loader.netloader.wire.channel import Channel
from vllm_ascend.model_loader.netloader.wire.conversation import Role, State
from vllm_ascend.model_loader.netloader.wire.messages import Refuse
from vllm_ascend.model_loader.netloader.wire.pacing import give_way

MAX_CONNECTIONS: Final = 1024
"""Open connections of all kinds, where there are descriptors for so many; more are closed at once. Bounds threads."""
HOST_SHARE: Final = 2
"""One host may have one in so many of them."""
STRANGERS_SHARE: Final = 4
"""As HOST_SHARE, of those that have not said yet what they want."""
_REFUSAL_TIMEOUT: Final = 0.1
"""Seconds that the accepting thread may spend on telling a peer that there is no room for it."""
_ACCEPT_PAUSE: Final = 0.05
"""Seconds before the next try after a failed accept, so that a lasting shortage does not busy the process."""


@dataclass(eq=False)
class Connection:
    """One that was accepted. `is_stranger` until its peer has said what it wants."""

    channel: Channel
    peer: Endpoint
    is_stranger: bool = True
    thread: threading.Thread | None = None
    host: str = field(init=False)

    def __post_init__(self) -> None:
        self.host = network_of(self.peer.host)


Work = Callable[[Connection], bool]
"""Something to do with a connection: whether somebody else goes on with it, so that it is not to be closed."""


class Acceptor:
    """Accepts from `start` to `close`, and does `work` with each connection in a thread of its own.

    `host` None means all addresses, `port` 0 an ephemeral one. `greets_in_clear` says whether who is turned away at
    once can be told why.
    """

    def __init__(self, host: str | None, port: int, work: Work, log: PeerLog) -> None:
        self._address = (host, port)
        self._work = work
        self._log = log
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self.connections: dict[Channel, Connection] = {}
        self.guard = Guard()
        self.greets_in_clear = True
        self.listener: Listener | None = None
        self._acceptor: threading.Thread | None = None

    def start(self, timeout: float) -> None:
        """Has the port and begins to accept. `timeout` and what is raised as for `Listener`."""
        descriptors.raise_limit()
        self.listener = Listener(*self._address, timeout)
        self._acceptor = threading.Thread(target=self._accept_forever, name="netloader-accept", daemon=True)
        self._acceptor.start()

    @property
    def port(self) -> int:
        assert self.listener is not None, "the server is not started"
        return self.listener.port

    def stop_accepting(self) -> None:
        """Idempotent."""
        listener, self.listener = self.listener, None
        if listener is not None:
            listener.close()
        if self._acceptor is not None:
            self._acceptor.join()

    def close(self, timeout: float, unless: Container[Channel] = ()) -> None:
        """Ends the connections, waits up to `timeout` seconds for them; those of `unless` end by themselves."""
        self.stop_accepting()
        with self._changed:
            connections = list(self.connections.values())
            for connection in connections:
                if connection.channel not in unless:
                    connection.channel.shut_down()
            self._changed.wait_for(lambda: not self.connections, timeout)
        for connection in connections:
            if connection.thread is not None:
                connection.thread.join(timeout)

    def go_on(self, connection: Connection, work: Work) -> None:
        """Does `work` with a connection that is in the table, in a new thread.

        Raises RuntimeError where there is none; then the connection is closed.
        """
        thread = threading.Thread(
            target=self._do, args=(connection, work), name=f"netloader {connection.peer}", daemon=True
        )
        connection.thread = thread
        try:
            thread.start()
        except RuntimeError as error:  # the system has no thread left
            connection.thread = None
            self._remove(connection)
            self._turn_away(connection, str(error))
            raise

    def end(self, connection: Connection, reason: BaseException | None = None) -> None:
        """Closes it, and logs a `reason` that is worth it. For whoever has it now."""
        connection.channel.close()
        if reason is not None:
            self._explain(connection, reason)
        self._remove(connection)

    def _accept_forever(self) -> None:
        listener = self.listener
        while listener is not None and self.listener is listener:
            try:
                self._admit(*listener.accept())
            except OSError:  # out of descriptors, a connection already aborted, or the listener closed
                if self.listener is listener:
                    time.sleep(_ACCEPT_PAUSE)
            except Exception:  # nothing may end this thread
                self._log.say(logging.ERROR, "", "could not take a connection: an error of this server", error=True)
                time.sleep(_ACCEPT_PAUSE)

    def _admit(self, sock: socket.socket, address: tuple[str, int]) -> None:
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(sock.close)
            self._log.tell_left_out()
            peer = Endpoint(unmapped(address[0]), address[1])
            if not self.guard.admits(peer.host):
                return
            connection = Connection(Channel(sock, Role.SERVER), peer)
            with self._lock:
                crowd = self._crowd(connection)
                if crowd is None:
                    self.connections[connection.channel] = connection
            on_failure.pop_all()
        if crowd is not None:
            self._turn_away(connection, crowd)
            return
        with contextlib.suppress(RuntimeError):
            self.go_on(connection, self._work)

    def _crowd(self, connection: Connection) -> str | None:
        """What stands in the way of one more connection; where nothing does, its descriptor is taken."""
        most = min(MAX_CONNECTIONS, descriptors.of_peers.limit)
        if len(self.connections) >= most:
            return f"there are {most} connections"
        same_host = [each for each in self.connections.values() if each.host == connection.host]
        if len(same_host) >= most // HOST_SHARE:
            return f"there are {most // HOST_SHARE} connections from there"
        if sum(each.is_stranger for each in same_host) >= most // STRANGERS_SHARE:
            return f"{most // STRANGERS_SHARE} connections from there have not said yet what they want"
        if descriptors.is_among_the_last(connection.channel.socket.fileno()) or not descriptors.of_peers.take(1):
            return "this process may have no more open files (RLIMIT_NOFILE)"
        return None

    def _turn_away(self, connection: Connection, reason: str) -> None:
        self._log.say(
            logging.WARNING, connection.peer.host, "no room for a connection from %s: %s", connection.peer, reason
        )
        channel = connection.channel
        with channel, contextlib.suppress(PeerError, OSError):
            if self.greets_in_clear:  # under TLS there is no time for a word
                channel.send(Refuse(f"no room: {reason}"), _REFUSAL_TIMEOUT)

    def _do(self, connection: Connection, work: Work) -> None:
        give_way()
        try:
            if work(connection):
                return
        except Exception as error:
            self.end(connection, error)
        else:
            self.end(connection)

    def _remove(self, connection: Connection) -> None:
        descriptors.of_peers.give(1)
        with self._changed:
            del self.connections[connection.channel]
            self._changed.notify_all()

    def _explain(self, connection: Connection, reason: BaseException) -> None:
        peer = connection.peer
        match reason:
            case Unauthorized():
                self.guard.failed(peer.host)
                self._log.say(logging.WARNING, peer.host, "turned away %s: %s", peer, reason)
            case ConnectionLost():
                in_transfer = connection.channel.state in (State.TRANSFER, State.CONFIRMING)
                level = logging.WARNING if in_transfer else logging.DEBUG
                self._log.say(level, peer.host, "%s went away: %s", peer, reason)
            case PeerError() | OSError():
                self._log.say(logging.WARNING, peer.host, "ended the connection with %s: %s", peer, reason)
            case _:
                text = "ended the connection with %s: an error of this server"
                self._log.say(logging.ERROR, peer.host, text, peer, error=True)
