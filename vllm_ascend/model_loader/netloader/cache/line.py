"""A connection on the socket of a cache: whole messages with their descriptors, each within a deadline."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from vllm_ascend.model_loader.netloader.cache.messages import (
    CARRYING,
    FRAME_LIMIT,
    CacheMessage,
    Said,
    decode,
    encode,
)
from vllm_ascend.model_loader.netloader.cache.place import private_directory
from vllm_ascend.model_loader.netloader.errors import ConnectionLost, PeerError, ProtocolError
from vllm_ascend.model_loader.netloader.wire.channel import Deadline
from vllm_ascend.model_loader.netloader.wire.failures import translated_errors
from vllm_ascend.model_loader.netloader.wire.unix_sockets import receive_with_descriptors, require_own_user

_LENGTH: Final = struct.Struct("!I")
_STEP: Final = 1 << 20
"""Bytes that are received at a time, so that memory is taken only for what has come."""
_CONNECT_PAUSE: Final = 0.02
"""Seconds."""
_LEAST_TIMEOUT: Final = 1e-6
"""Seconds, for a deadline that has passed: a timeout of 0 would make the socket non-blocking."""


@dataclass
class Received:
    """A message, and the descriptor that came with it, which is closed by whoever takes it, or at the latest here."""

    message: Said
    _descriptor: int = -1

    def take(self) -> int:
        """The descriptor, which the caller closes. Only messages that carry one have it, and only once."""
        descriptor, self._descriptor = self._descriptor, -1
        return descriptor

    def close(self) -> None:
        """Closes the descriptor if nobody has taken it. Idempotent."""
        if self._descriptor >= 0:
            os.close(self.take())


class Line:
    """One end of a connection, which owns `sock`. One thread uses it; `shut_down` is for others."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, message: CacheMessage, seconds: float, descriptor: int | None = None) -> None:
        """Sends `message` within `seconds`, with `descriptor`, which stays the caller's.

        Raises PeerError or OSError.
        """
        data = memoryview(encode(message))
        data = memoryview(_LENGTH.pack(data.nbytes) + data)
        deadline = Deadline(seconds)
        with translated_errors(seconds):
            self._set_timeout(deadline)
            sent = socket.send_fds(self.socket, [data], [] if descriptor is None else [descriptor])
            while sent < data.nbytes:
                self._set_timeout(deadline)
                sent += self.socket.send(data[sent:])

    @contextlib.contextmanager
    def receive(self, seconds: float) -> Iterator[Received]:
        """The next message, which must be whole within `seconds`.

        Raises PeerError where none comes or it is not what it should be, OSError for what this process lacks.
        """
        deadline = Deadline(seconds)
        with translated_errors(seconds):
            header, descriptors = self._receive_header(deadline)
        try:
            with translated_errors(seconds):
                received = Received(decode(self._receive(_LENGTH.unpack(header)[0], deadline)))
            if len(descriptors) != isinstance(received.message, CARRYING):
                raise ProtocolError(f"{type(received.message).__name__} came with {len(descriptors)} descriptors")
        except BaseException:
            for each in descriptors:
                os.close(each)
            raise
        if descriptors:
            received = Received(received.message, descriptors[0])
        with contextlib.closing(received):
            yield received

    def shut_down(self) -> None:
        """Ends whatever the connection waits for."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Closes the connection. Idempotent."""
        self.socket.close()

    def _receive_header(self, deadline: Deadline) -> tuple[bytes, list[int]]:
        self._set_timeout(deadline)
        header, descriptors = receive_with_descriptors(self.socket, _LENGTH.size)
        try:
            if not header:
                raise ConnectionLost("the peer closed the connection")
            return header + self._receive(_LENGTH.size - len(header), deadline), descriptors
        except BaseException:
            for each in descriptors:
                os.close(each)
            raise

    def _receive(self, nbytes: int, deadline: Deadline) -> bytearray:
        if nbytes > FRAME_LIMIT:
            raise ProtocolError(f"a message on the socket of the cache has {nbytes} bytes: at most {FRAME_LIMIT}")
        data = bytearray()
        while len(data) < nbytes:
            self._set_timeout(deadline)
            part = self.socket.recv(min(nbytes - len(data), _STEP))
            if not part:
                raise ConnectionLost("the peer closed the connection within a message")
            data += part
        return data

    def _set_timeout(self, deadline: Deadline) -> None:
        self.socket.settimeout(max(deadline.remaining(), _LEAST_TIMEOUT))


def connect(path: Path, seconds: float) -> Line:
    """A connection to the cache whose socket is at `path`. The caller closes it.

    Raises FileNotFoundError or ConnectionRefusedError if there is no cache, ConfigError if others could have put the
    socket there, and PeerError if it is not a process of this user or does not take the connection.
    """
    with contextlib.ExitStack() as on_failure, private_directory(path.parent) as directory:
        sock = on_failure.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        sock.settimeout(seconds)
        try:
            _connect(sock, directory / path.name, Deadline(seconds))
            require_own_user(sock)
        except (FileNotFoundError, ConnectionRefusedError):
            raise
        except PermissionError as error:
            raise PeerError(str(error)) from error
        except OSError as error:
            with translated_errors(seconds):
                raise error
        on_failure.pop_all()
        return Line(sock)


def _connect(sock: socket.socket, path: Path, deadline: Deadline) -> None:
    """Connects even if many others do so at this moment: then the system refuses at once, whatever the timeout is."""
    while True:
        try:
            return sock.connect(str(path))
        except BlockingIOError:
            if not deadline.remaining():
                raise
            time.sleep(_CONNECT_PAUSE)
