"""Bytes without frames, between the messages of a connection: those of the weights.

They go from the pages of a file to the socket, and from the socket to their place in memory, without a copy between.
Only TLS needs one, for what it encrypts. Progress is noted after every system call, and each of them moves so little
that a slow peer is not taken for a silent one.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from vllm_ascend.model_loader.netloader.errors import ConnectionLost
from vllm_ascend.model_loader.netloader.weights.manifest import chunks
from vllm_ascend.model_loader.netloader.weights.memory import Readable
from vllm_ascend.model_loader.netloader.wire.failures import translated_errors
from vllm_ascend.model_loader.netloader.wire.pacing import Pacer

_SEND_BYTES: Final = 1 << 20
"""Bytes for one system call, which returns only when all of them are sent, however slow the peer."""
_RECEIVE_BYTES: Final = 1 << 20
"""Bytes for one system call."""
_TLS_BYTES: Final = 256 << 10
"""Bytes to encrypt at a time."""
_TIMEVAL: Final = struct.Struct("@ll")  # seconds and microseconds: socket(7), SO_RCVTIMEO

Progress = Callable[[int], None]
"""Is told how many bytes have moved since it was told last."""


@dataclass(frozen=True)
class FileRange:
    """Bytes [offset, offset + length) of a file, or of memory without a file, where `descriptor` is None.

    `mapped` shows the whole of it from its beginning.
    """

    descriptor: int | None
    mapped: Readable
    offset: int
    length: int


def send_range(
    sock: socket.socket,
    source: FileRange,
    *,
    timeout: float,
    pacer: Pacer,
    progress: Progress,
    given_up: threading.Event | None = None,
) -> None:
    """Sends `source` as fast as `pacer` allows.

    The kernel sends from the pages of the file; under TLS, or without a file, bytes are taken from `source.mapped`.
    `timeout` bounds the seconds without progress. Whoever sets `given_up` before shutting the socket down need not wait
    for the pacer. Raises ConnectionLost or Stalled.
    """
    from_memory = isinstance(sock, ssl.SSLSocket) or source.descriptor is None
    send = _send_mapped if from_memory else _send_pages
    with translated_errors(timeout):
        for offset, length in chunks(source.length, pacer.piece or source.length):
            pacer.wait_for(length, given_up)
            send(sock, replace(source, offset=source.offset + offset, length=length), timeout, progress)


def _send_pages(sock: socket.socket, source: FileRange, timeout: float, progress: Progress) -> None:
    descriptor, offset, end = source.descriptor, source.offset, source.offset + source.length
    assert descriptor is not None
    with _blocking(sock, socket.SO_SNDTIMEO, timeout):
        while offset < end:
            sent = os.sendfile(sock.fileno(), descriptor, offset, min(_SEND_BYTES, end - offset))
            if not sent:
                raise ConnectionLost("the file ended before the range that was to be sent")
            progress(sent)
            offset += sent


def _send_mapped(sock: socket.socket, source: FileRange, timeout: float, progress: Progress) -> None:
    sock.settimeout(timeout)
    for offset, length in chunks(source.length, _SEND_BYTES):
        content, sent = source.mapped[source.offset + offset : source.offset + offset + length], 0
        while sent < length:
            step = sock.send(content[sent : sent + _TLS_BYTES])
            progress(step)
            sent += step


def receive_into(sock: socket.socket, memory: memoryview, timeout: float, progress: Progress) -> None:
    """Fills `memory`, fastest where its pages exist already.

    `timeout` bounds the seconds without progress. Raises ConnectionLost or Stalled.
    """
    receive = _receive_decrypted if isinstance(sock, ssl.SSLSocket) else _receive_plain
    with translated_errors(timeout):
        receive(sock, memory, timeout, progress)


def _receive_plain(sock: socket.socket, memory: memoryview, timeout: float, progress: Progress) -> None:
    offset = 0
    with _blocking(sock, socket.SO_RCVTIMEO, timeout):
        while offset < memory.nbytes:
            offset += _received(sock.recv_into(memory[offset : offset + _RECEIVE_BYTES]), progress)


def _receive_decrypted(sock: socket.socket, memory: memoryview, timeout: float, progress: Progress) -> None:
    offset = 0
    sock.settimeout(timeout)
    while offset < memory.nbytes:
        offset += _received(sock.recv_into(memory[offset:]), progress)


def _received(nbytes: int, progress: Progress) -> int:
    if not nbytes:
        raise ConnectionLost("the peer closed the connection")
    progress(nbytes)
    return nbytes


@contextlib.contextmanager
def _blocking(sock: socket.socket, option: int, timeout: float) -> Iterator[None]:
    """Lets the kernel keep the time, because Python's own timeouts make the descriptor non-blocking."""
    sock.settimeout(None)
    sock.setsockopt(socket.SOL_SOCKET, option, _TIMEVAL.pack(int(timeout), int(timeout % 1 * 1e6)))
    yield
