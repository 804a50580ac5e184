"""A conversation over a connected socket, with a deadline on every wait.

A `Channel` carries messages; `bulk` moves the bytes of the weights between them, on the same socket. One thread uses
both, and any other thread may end them.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import time
from collections.abc import Callable
from typing import Final, Self

from vllm_ascend.model_loader.netloader.endpoint import Endpoint, unmapped
from vllm_ascend.model_loader.netloader.errors import ConnectionLost
from vllm_ascend.model_loader.netloader.wire.conversation import Conversation, Role, State
from vllm_ascend.model_loader.netloader.wire.failures import translated_errors
from vllm_ascend.model_loader.netloader.wire.messages import Message
from vllm_ascend.model_loader.netloader.wire.resolution import resolve
from vllm_ascend.model_loader.netloader.wire.wakeup import Wakeup

_RECEIVE_BYTES: Final = 64 << 10
_LEAST_TIMEOUT: Final = 1e-6
"""Seconds, for a deadline that has passed: a timeout of 0 would make the socket non-blocking."""


class Deadline:
    """A point in time, `seconds` after it was made, for several waits that share it."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self._clock = clock
        self._end = clock() + seconds

    def remaining(self) -> float:
        """Seconds left, 0 when it has passed."""
        return max(0.0, self._end - self._clock())


class Channel:
    """One end of a connection. It owns `sock`: use it with `with`, or call `close`.

    One thread uses it; `shut_down` and `interrupt` are for others.
    """

    def __init__(self, sock: socket.socket, role: Role) -> None:
        self.socket = sock
        self._conversation = Conversation(role)
        with contextlib.suppress(OSError):  # Unix sockets have no such option
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def peer(self) -> Endpoint:
        """The address at the other end, whatever name led to it. Raises ConnectionLost."""
        with translated_errors(0):
            numeric = socket.NI_NUMERICHOST | socket.NI_NUMERICSERV
            host, port = socket.getnameinfo(self.socket.getpeername(), numeric)
        return Endpoint(host, int(port))

    @property
    def state(self) -> State:
        """How far the conversation is."""
        return self._conversation.state

    @property
    def local_host(self) -> str:
        """The address by which the peer reaches this end, unless something between them translates it."""
        return unmapped(self.socket.getsockname()[0])

    @property
    def peer_host(self) -> str:
        """The address by which this end reaches the peer. Raises OSError where the connection has ended."""
        return unmapped(self.socket.getpeername()[0])

    def may_send(self, kind: type[Message]) -> bool:
        """Whether this end may say a message of that kind now."""
        return self._conversation.may_send(kind)

    def secure(self, context: ssl.SSLContext, timeout: float) -> None:
        """Goes on under TLS, whose handshake may take `timeout` seconds. Raises ConnectionLost or Stalled."""
        with translated_errors(timeout):
            self.socket.settimeout(timeout)
            server_side = self._conversation.role is Role.SERVER
            secured = context.wrap_socket(self.socket, server_side=server_side, do_handshake_on_connect=False)
            self.socket = secured  # before the handshake, so that `shut_down` can end it
            secured.do_handshake()

    def limit_frames(self, nbytes: int) -> None:
        """From now on, a frame of more than `nbytes` from the peer raises ProtocolError."""
        self._conversation.limit_frames(nbytes)

    def authenticate(self, key: bytes) -> None:
        """From now on, every frame in either direction carries a tag made with `key`."""
        self._conversation.authenticate(key)

    def send(self, message: Message, timeout: float) -> None:
        """Says `message`, which may take `timeout` seconds in all. Raises ConnectionLost or Stalled."""
        with translated_errors(timeout):
            self.socket.settimeout(timeout)
            self.socket.sendall(self._conversation.send(message))

    def say_last(self, content: bytes, seconds: float) -> None:
        """Sends what is no message of ours, and gives the peer `seconds` to read it. Raises nothing if it does not.

        To close at once, with bytes of the peer unread, would reset the connection and discard what was sent.
        """
        deadline = Deadline(seconds)
        with contextlib.suppress(OSError):
            self.socket.settimeout(seconds)
            self.socket.sendall(content)
            socket.socket.shutdown(self.socket, socket.SHUT_WR)
            while self.socket.recv(_RECEIVE_BYTES):
                self.socket.settimeout(deadline.remaining() or _LEAST_TIMEOUT)

    def receive(self, deadline: Deadline) -> Message:
        """The next message, which has to be complete by `deadline`.

        Raises Stalled, ConnectionLost, or ProtocolError for whatever the peer may not send.
        """
        while (message := self._conversation.next_message()) is None:
            with translated_errors(deadline.seconds):
                self.socket.settimeout(deadline.remaining() or _LEAST_TIMEOUT)
                data = self.socket.recv(_RECEIVE_BYTES)
            if not data:
                raise ConnectionLost("the peer closed the connection")
            self._conversation.feed(data)
        return message

    def receive_unless(self, wakeup: Wakeup, deadline: Deadline) -> Message | None:
        """As `receive`, but returns None where no message is there and `wakeup` is set, now or while it waits."""
        poller = select.poll()
        poller.register(wakeup, select.POLLIN)
        poller.register(self.socket, select.POLLIN)
        while (message := self._conversation.next_message()) is None:
            with translated_errors(deadline.seconds):
                ready = {descriptor for descriptor, _ in poller.poll(deadline.remaining() * 1000)}
                if not ready:
                    raise TimeoutError
                is_woken = wakeup.fileno() in ready
                self.socket.settimeout(_LEAST_TIMEOUT)
                try:
                    data = self.socket.recv(_RECEIVE_BYTES) if ready - {wakeup.fileno()} else None
                except TimeoutError:  # what came was a message of TLS itself
                    data = None
            if data == b"":
                raise ConnectionLost("the peer closed the connection")
            if data is not None:
                self._conversation.feed(data)
            elif is_woken:
                return None
        return message

    def shut_down(self) -> None:
        """Ends the connection from any thread: the thread that uses it gets an error, and closes it.

        To close it here could give the number of its descriptor to another file just before a system call uses it.
        """
        with contextlib.suppress(OSError):  # an SSLSocket's own shutdown would take TLS from under that thread
            socket.socket.shutdown(self.socket, socket.SHUT_RDWR)

    def interrupt(self) -> None:
        """Ends the receiving from any thread: the thread that uses the channel gets an error, and can still send."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.socket, socket.SHUT_RD)

    def close(self) -> None:
        """Ends the connection. For the thread that uses it; idempotent."""
        self.shut_down()
        self.socket.close()


def connect(endpoint: Endpoint, timeout: float) -> Channel:
    """A channel to the first address of the host that answers, not greeted yet. The caller closes it.

    `timeout` bounds in seconds both to ask for the addresses and to try them. Raises the OSError of the last address.
    """
    deadline = Deadline(timeout)
    failure: OSError = TimeoutError(f"{endpoint.host} has no address")
    addresses = resolve(endpoint, timeout)

    for untried, (family, address) in zip(range(len(addresses), 0, -1), addresses, strict=True):
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            # A silent address leaves time for those that are still untried.
            sock.settimeout(deadline.remaining() / untried or _LEAST_TIMEOUT)
            sock.connect(address)
        except OSError as error:
            sock.close()
            failure = error
        else:
            return Channel(sock, Role.CLIENT)

    raise failure
