"""A conversation over a connected socket, with a deadline on every wait.

A channel carries messages, and between them bytes without frames: those of the weights. An OSError becomes an error
that says what happened to the peer, `ConnectionLost` when it went away and `Stalled` when it was silent for too long.
Both are PeerErrors, which end this session and no other. What this process or host lacks stays an OSError, because no
peer is to blame for it (`is_our_own`).
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
"""Bytes for one system call, after which progress is noted: it returns when all are sent, however slow the peer."""
_TLS_BYTES: Final = 256 << 10
"""Bytes to encrypt at a time."""
_RECEIVE_INTO_BYTES: Final = 1 << 20
"""Bytes for one system call, after which progress is noted."""
_LEAST_TIMEOUT: Final = 1e-6
"""Seconds, for a deadline that has passed: a timeout of 0 would make the socket non-blocking."""
_OUR_OWN: Final = {errno.ENOSPC, errno.ENOMEM, errno.ENOBUFS, errno.EMFILE, errno.ENFILE, errno.EFBIG, errno.EPERM}
"""Error numbers that tell of a limit of this process or host."""
_TIMEVAL: Final = struct.Struct("@ll")  # seconds and microseconds: socket(7), SO_RCVTIMEO


class Deadline:
    """A point in time, `seconds` after it was made, for several waits that share it."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self._clock = clock
        self._end = clock() + seconds

    def remaining(self) -> float:
        """Seconds left, 0 when it has passed."""
        return max(0.0, self._end - self._clock())


@dataclass(frozen=True)
class FileRange:
    """Bytes [offset, offset + length) of a file, or of memory without a file, where `descriptor` is None.

    `mapped` shows the whole of it from its beginning.
    """

    descriptor: int | None
    mapped: Readable
    offset: int
    length: int


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
        with _translated_errors(0):
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
        with _translated_errors(timeout):
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
        with _translated_errors(timeout):
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
            with _translated_errors(deadline.seconds):
                self.socket.settimeout(deadline.remaining() or _LEAST_TIMEOUT)
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
        """Sends `source` unframed, as fast as `pacer` allows, and tells `progress` how many bytes have gone.

        The kernel sends from the pages of the file, without a copy; under TLS, or without a file, bytes are taken from
        `source.mapped`. `timeout` bounds the seconds without progress. Whoever sets `given_up` before it calls
        `shut_down` need not wait for the pacer. Raises ConnectionLost or Stalled.
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
        """Fills `memory` with unframed bytes, and tells `progress` how many have come.

        `timeout` bounds the seconds without progress. It is fastest where the pages of `memory` exist already. Raises
        ConnectionLost or Stalled.
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
        """Lets the kernel keep the time, because Python's own timeouts make the descriptor non-blocking."""
        self.socket.settimeout(None)
        self.socket.setsockopt(socket.SOL_SOCKET, option, _TIMEVAL.pack(int(timeout), int(timeout % 1 * 1e6)))
        yield

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


def is_our_own(error: OSError) -> bool:
    """Whether `error` tells of something that this process or host lacks, for which no peer is to blame."""
    has_other_numbers = isinstance(error, ssl.SSLError | socket.gaierror)
    return error.errno in _OUR_OWN and not has_other_numbers


@contextlib.contextmanager
def _translated_errors(timeout: float) -> Iterator[None]:
    """Says what an OSError means for the peer, unless it is our own. `timeout` is how long the peer had, in seconds."""
    try:
        yield
    except (TimeoutError, BlockingIOError) as error:
        raise Stalled(f"the peer was silent for {timeout:g} s") from error
    except OSError as error:
        if is_our_own(error):
            raise
        raise ConnectionLost(f"the connection broke: {error.strerror or error}") from error
