"""A conversation over a connected socket, with a deadline on every wait.

`OSError` becomes an error that says what happened to the peer: `ConnectionLost` when it went away, `Stalled` when it
was silent for too long. Both are PeerErrors: the session ends, and only this one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final, Self

from vllm_ascend.model_loader.netloader.endpoint import Endpoint, unmapped
from vllm_ascend.model_loader.netloader.errors import ConnectionLost, Stalled
from vllm_ascend.model_loader.netloader.weights.manifest import chunks
from vllm_ascend.model_loader.netloader.weights.memory import Readable
from vllm_ascend.model_loader.netloader.wire.conversation import Conversation, Role, State
from vllm_ascend.model_loader.netloader.wire.messages import Message
from vllm_ascend.model_loader.netloader.wire.pacing import Pacer
from vllm_ascend.model_loader.netloader.wire.resolution import resolve

_RECEIVE_BYTES: Final = 64 << 10
_SEND_BYTES: Final = 1 << 20
"""Bytes after which progress shows: the kernel would come back only after all of them, however slow the peer."""
_TLS_BYTES: Final = 256 << 10
_RECEIVE_INTO_BYTES: Final = 1 << 20
_OUR_OWN: Final = {errno.ENOSPC, errno.ENOMEM, errno.ENOBUFS, errno.EMFILE, errno.ENFILE, errno.EFBIG, errno.EPERM}
_TIMEVAL: Final = struct.Struct("@ll")


class Deadline:
    """A point in time, `seconds` from now."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self._clock = clock
        self._end = clock() + seconds

    def remaining(self) -> float:
        """Seconds left, 0 when it has passed."""
        return max(0.0, self._end - self._clock())


@dataclass(frozen=True)
class FileRange:
    """Bytes [offset, offset + length) of a file, which `mapped` shows from its beginning.

    Without a descriptor they are only in memory.
    """

    descriptor: int | None
    mapped: Readable
    offset: int
    length: int


class Channel:
    """One end of a connection. Owns `sock`; use it with `with`, or call `close`."""

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
        with _translated_errors(0):
            numeric = socket.NI_NUMERICHOST | socket.NI_NUMERICSERV
            host, port = socket.getnameinfo(self.socket.getpeername(), numeric)
        return Endpoint(host, int(port))

    @property
    def state(self) -> State:
        return self._conversation.state

    @property
    def local_host(self) -> str:
        """The address by which the peer reaches this end, unless something between them translates it."""
        return unmapped(self.socket.getsockname()[0])

    @property
    def peer_host(self) -> str:
        """Raises OSError where the connection has ended."""
        return unmapped(self.socket.getpeername()[0])

    def may_send(self, kind: type[Message]) -> bool:
        """Whether it is this end's turn to say that."""
        return self._conversation.may_send(kind)

    def secure(self, context: ssl.SSLContext, timeout: float) -> None:
        """Goes on under TLS, as the server's end if this is one. Raises ConnectionLost or Stalled."""
        with _translated_errors(timeout):
            self.socket.settimeout(timeout)
            server_side = self._conversation.role is Role.SERVER
            secured = context.wrap_socket(self.socket, server_side=server_side, do_handshake_on_connect=False)
            self.socket = secured  # at once, so that `shut_down` ends the handshake too
            secured.do_handshake()

    def limit_frames(self, nbytes: int) -> None:
        """From now on, a frame of more than `nbytes` from the peer raises ProtocolError."""
        self._conversation.limit_frames(nbytes)

    def authenticate(self, key: bytes) -> None:
        """From now on, frames carry tags made with `key`."""
        self._conversation.authenticate(key)

    def send(self, message: Message, timeout: float) -> None:
        """Raises ConnectionLost or Stalled."""
        with _translated_errors(timeout):
            self.socket.settimeout(timeout)
            self.socket.sendall(self._conversation.send(message))

    def say_last(self, content: bytes, seconds: float) -> None:
        """Sends what is no message of ours, and lets the peer read it: to close with bytes unread would reset it away.

        Whether it does read does not matter.
        """
        deadline = Deadline(seconds)
        with contextlib.suppress(OSError):
            self.socket.settimeout(seconds)
            self.socket.sendall(content)
            socket.socket.shutdown(self.socket, socket.SHUT_WR)
            while self.socket.recv(_RECEIVE_BYTES):
                self.socket.settimeout(deadline.remaining() or 1e-6)

    def receive(self, deadline: Deadline) -> Message:
        """The next message. Raises PeerError."""
        while (message := self._conversation.next_message()) is None:
            with _translated_errors(deadline.seconds):
                self.socket.settimeout(deadline.remaining() or 1e-6)
                data = self.socket.recv(_RECEIVE_BYTES)
            if not data:
                raise ConnectionLost("the peer closed the connection")
            self._conversation.feed(data)
        return message

    def send_file(
        self,
        source: FileRange,
        timeout: float,
        pacer: Pacer,
        progress: Callable[[int], None],
        given_up: threading.Event | None = None,
    ) -> None:
        """Sends a range of a file unframed, from its pages without a copy, under TLS or without a file by `mapped`.

        `timeout` bounds the time without progress; whoever sets `given_up` before `shut_down` need not wait for the
        pacer. Raises ConnectionLost or Stalled.
        """
        from_memory = isinstance(self.socket, ssl.SSLSocket) or source.descriptor is None
        send = self._send_mapped if from_memory else self._send_pages
        with _translated_errors(timeout):
            for offset, length in chunks(source.length, pacer.piece or source.length):
                pacer.wait_for(length, given_up)
                send(replace(source, offset=source.offset + offset, length=length), timeout, progress)

    def _send_pages(self, source: FileRange, timeout: float, progress: Callable[[int], None]) -> None:
        descriptor, offset, end = source.descriptor, source.offset, source.offset + source.length
        assert descriptor is not None
        with self._blocking(socket.SO_SNDTIMEO, timeout):
            while offset < end:
                sent = os.sendfile(self.socket.fileno(), descriptor, offset, min(_SEND_BYTES, end - offset))
                if not sent:
                    raise ConnectionLost("the file ended before the range that was to be sent")
                progress(sent)
                offset += sent

    def _send_mapped(self, source: FileRange, timeout: float, progress: Callable[[int], None]) -> None:
        self.socket.settimeout(timeout)
        for offset, length in chunks(source.length, _SEND_BYTES):
            content, sent = source.mapped[source.offset + offset : source.offset + offset + length], 0
            while sent < length:
                step = self.socket.send(content[sent : sent + _TLS_BYTES])
                progress(step)
                sent += step

    def receive_into(self, memory: memoryview, timeout: float, progress: Callable[[int], None]) -> None:
        """Fills `memory` with unframed bytes; `timeout` bounds the time without progress.

        It is fastest where the pages of `memory` exist. Raises ConnectionLost or Stalled.
        """
        if isinstance(self.socket, ssl.SSLSocket):
            self._receive_decrypted(memory, timeout, progress)
            return
        offset = 0
        with _translated_errors(timeout), self._blocking(socket.SO_RCVTIMEO, timeout):
            while offset < memory.nbytes:
                received = self.socket.recv_into(memory[offset : offset + _RECEIVE_INTO_BYTES])
                offset += self._received(received, progress)

    def _receive_decrypted(self, memory: memoryview, timeout: float, progress: Callable[[int], None]) -> None:
        offset = 0
        with _translated_errors(timeout):
            self.socket.settimeout(timeout)
            while offset < memory.nbytes:
                offset += self._received(self.socket.recv_into(memory[offset:]), progress)

    def _received(self, nbytes: int, progress: Callable[[int], None]) -> int:
        if not nbytes:
            raise ConnectionLost("the peer closed the connection")
        progress(nbytes)
        return nbytes

    @contextlib.contextmanager
    def _blocking(self, option: int, timeout: float) -> Iterator[None]:
        """Lets the kernel keep the time: Python's own timeouts make the descriptor non-blocking."""
        self.socket.settimeout(None)
        self.socket.setsockopt(socket.SOL_SOCKET, option, _TIMEVAL.pack(int(timeout), int(timeout % 1 * 1e6)))
        yield

    def shut_down(self) -> None:
        """Ends the connection for the thread that uses it, from any thread; that thread closes it.

        Closing it here could give its descriptor's number to another file while a system call is about to use it.
        """
        with contextlib.suppress(OSError):  # an SSLSocket's own shutdown would take TLS from under that thread
            socket.socket.shutdown(self.socket, socket.SHUT_RDWR)

    def interrupt(self) -> None:
        """Ends the receiving of the thread that uses it, from any thread; that thread can still send."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.socket, socket.SHUT_RD)

    def close(self) -> None:
        """Gives up the connection. Idempotent."""
        self.shut_down()
        self.socket.close()


def connect(endpoint: Endpoint, timeout: float) -> Channel:
    """Connects as a client, not greeted yet, to the first address of the host that answers.

    `timeout` bounds it all: asking for the addresses, and trying them. Raises OSError, that of the last address.
    """
    deadline = Deadline(timeout)
    failure: OSError = TimeoutError(f"{endpoint.host} has no address")
    addresses = resolve(endpoint, timeout)
    for untried, (family, address) in zip(range(len(addresses), 0, -1), addresses, strict=True):
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.settimeout(deadline.remaining() / untried or 1e-6)  # a silent one leaves time for the others
            sock.connect(address)
        except OSError as error:
            sock.close()
            failure = error
        else:
            return Channel(sock, Role.CLIENT)
    raise failure


def is_our_own(error: OSError) -> bool:
    """Whether it tells what this process or host lacks, which is not the peer's doing."""
    has_own_numbers = isinstance(error, ssl.SSLError | socket.gaierror)
    return error.errno in _OUR_OWN and not has_own_numbers


@contextlib.contextmanager
def _translated_errors(timeout: float) -> Iterator[None]:
    try:
        yield
    except (TimeoutError, BlockingIOError) as error:
        raise Stalled(f"the peer was silent for {timeout:g} s") from error
    except OSError as error:
        if is_our_own(error):
            raise
        raise ConnectionLost(f"the connection broke: {error.strerror or error}") from error
