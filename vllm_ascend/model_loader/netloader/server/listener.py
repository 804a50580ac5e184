"""Accepts the connections of a server, and keeps the table of them.

One thread accepts and does nothing else. Every connection gets a thread of its own for as long as there is something to
do with it. Whatever goes wrong with a connection ends only that one, and is logged here.

Nobody may have so many connections that others get none, and all of them together may never take so many descriptors
that the engine runs out of them.
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
from vllm_ascend.model_loader.netloader.server.admission.hosts import Guard, network_of
from vllm_ascend.model_loader.netloader.server.listening import ListeningSocket
from vllm_ascend.model_loader.netloader.server.peer_log import PeerLog
from vllm_ascend.model_loader.netloader.wire.channel import Channel
from vllm_ascend.model_loader.netloader.wire.conversation import Role, State
from vllm_ascend.model_loader.netloader.wire.messages import Refuse
from vllm_ascend.model_loader.netloader.wire.pacing import give_way

MAX_CONNECTIONS: Final = 1024
"""Open connections of all kinds, if there are descriptors for so many; more are closed at once. Bounds the threads."""
HOST_SHARE: Final = 2
"""One host may have one in so many of the connections."""
STRANGERS_SHARE: Final = 4
"""One host may have one in so many of the connections without having said yet what it wants."""
_REFUSAL_TIMEOUT: Final = 0.1
"""Seconds that the accepting thread may spend on telling a peer that there is no room for it."""
_ACCEPT_PAUSE: Final = 0.05
"""Seconds before the next try after a failed accept, so that a lasting shortage does not keep the process busy."""


@dataclass(eq=False)
class Connection:
    """A connection that was accepted. It is a stranger's until its peer has said what it wants."""

    channel: Channel
    peer: Endpoint
    is_stranger: bool = True
    thread: threading.Thread | None = None
    host: str = field(init=False)
    """What counts as one host where connections are counted, see `network_of`."""

    def __post_init__(self) -> None:
        self.host = network_of(self.peer.host)


Work = Callable[[Connection], bool]
"""Something to do with a connection. It returns whether the connection is kept, because somebody else goes on with it;
otherwise the connection is closed. It may raise anything."""


class Listener:
    """Accepts from `start` to `close`. `host` None means all addresses, `port` 0 any free one.

    `guard` keeps out hosts that keep failing to authenticate. `greets_in_clear` says whether a peer that is turned away
    at once can be told why.
    """

    def __init__(self, host: str | None, port: int, log: PeerLog) -> None:
        self._address = (host, port)
        self._log = log
        self._lock = threading.Lock()
        self._one_is_over = threading.Condition(self._lock)
        self.connections: dict[Channel, Connection] = {}
        self.guard = Guard()
        self.greets_in_clear = True
        self.bound: ListeningSocket | None = None
        self._accepting: threading.Thread | None = None

    def start(self, work: Work, timeout: float) -> None:
        """Takes the port, and does `work` with each connection from now on, in a thread of its own.

        `timeout` is in seconds, for looking up a host name. Raises ConfigError if the address is none of this machine
        or not for this user, OSError if it is in use.
        """
        descriptors.raise_limit()
        self.bound = ListeningSocket(*self._address, timeout)
        self._accepting = threading.Thread(
            target=self._accept_forever, args=(self.bound, work), name="netloader-accept", daemon=True
        )
        self._accepting.start()

    @property
    def port(self) -> int:
        """The port on which it listens, once it is started."""
        assert self.bound is not None, "the server is not started"
        return self.bound.port

    @property
    def address(self) -> Endpoint:
        """Where processes of this host reach it, once it is started."""
        assert self.bound is not None, "the server is not started"
        return self.bound.address

    def stop_accepting(self) -> None:
        """Gives the port back. Connections that exist go on. Idempotent."""
        bound, self.bound = self.bound, None
        if bound is not None:
            bound.close()
        if self._accepting is not None:
            self._accepting.join()

    def close(self, timeout: float, unless: Container[Channel] = ()) -> None:
        """Gives the port back, ends all connections, and waits up to `timeout` seconds for their threads.

        Those with a channel in `unless` are waited for, but have to end by themselves.
        """
        self.stop_accepting()
        with self._one_is_over:
            connections = list(self.connections.values())
            for connection in connections:
                if connection.channel not in unless:
                    connection.channel.shut_down()
            self._one_is_over.wait_for(lambda: not self.connections, timeout)

        for connection in connections:
            if connection.thread is not None:
                connection.thread.join(timeout)

    def go_on(self, connection: Connection, work: Work) -> None:
        """Does `work` with a connection that was kept, in a new thread.

        Raises RuntimeError if the system has no thread left; the connection is closed then.
        """
        thread = threading.Thread(
            target=self._do, args=(connection, work), name=f"netloader {connection.peer}", daemon=True
        )
        connection.thread = thread
        try:
            thread.start()
        except RuntimeError as error:
            connection.thread = None
            self._remove(connection)
            self._turn_away(connection, str(error))
            raise

    def end(self, connection: Connection, reason: BaseException | None = None) -> None:
        """Closes a connection, and logs `reason` if it is worth it. For whoever has the connection now."""
        connection.channel.close()
        if reason is not None:
            self._explain(connection, reason)
        self._remove(connection)

    def _accept_forever(self, bound: ListeningSocket, work: Work) -> None:
        while self.bound is bound:
            try:
                self._admit(*bound.accept(), work)
            except OSError:  # out of descriptors, a connection already aborted, or the listener closed
                if self.bound is bound:
                    time.sleep(_ACCEPT_PAUSE)
            except Exception:  # nothing may end this thread
                self._log.say(logging.ERROR, "", "could not take a connection: an error of this server", error=True)
                time.sleep(_ACCEPT_PAUSE)

    def _admit(self, sock: socket.socket, address: tuple[str, int], work: Work) -> None:
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
        with contextlib.suppress(RuntimeError):  # there is no thread, and the connection is closed
            self.go_on(connection, work)

    def _crowd(self, connection: Connection) -> str | None:
        """What stands in the way of one more connection. If nothing does, its descriptor is taken."""
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
        """Closes a connection that is not in the table, and tells its peer why if that takes no time."""
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
        with self._one_is_over:
            del self.connections[connection.channel]
            self._one_is_over.notify_all()

    def _explain(self, connection: Connection, reason: BaseException) -> None:
        """Logs why a connection ended, and tells the guard of those who failed to authenticate."""
        peer = connection.peer
        match reason:
            case Unauthorized():
                self.guard.failed(peer.host)
                self._log.say(logging.WARNING, peer.host, "turned away %s: %s", peer, reason)
            case ConnectionLost():
                in_transfer = connection.channel.state in (State.TRANSFER, State.FOLLOWING, State.CONFIRMING)
                level = logging.WARNING if in_transfer else logging.DEBUG
                self._log.say(level, peer.host, "%s went away: %s", peer, reason)
            case PeerError() | OSError():
                self._log.say(logging.WARNING, peer.host, "ended the connection with %s: %s", peer, reason)
            case _:
                text = "ended the connection with %s: an error of this server"
                self._log.say(logging.ERROR, peer.host, text, peer, error=True)
