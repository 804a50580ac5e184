"""The reference for transports: plain sockets, as many as `tcp` has, that move the same bytes and do nothing else."""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator

from benchmarks.harness.memory import anonymous_memory, touch
from vllm_ascend.model_loader.netloader.transport.tcp import CONNECTIONS

HOST = "127.0.0.1"
_RANGE = struct.Struct("!QQ")


class RawServer:
    """Sends each connection the range of bytes that it asks for, in a thread of its own, as long as the process lives.

    `send(connection, begin, end)` is how.
    """

    def __init__(self, send: Callable[[socket.socket, int, int], None]) -> None:
        self._send = send
        self._listener = socket.create_server((HOST, 0), backlog=1024)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection:
            request = connection.recv(_RANGE.size, socket.MSG_WAITALL)
            if len(request) == _RANGE.size:  # else the peer is through without having asked
                self._send(connection, *_RANGE.unpack(request))


class MemorySender:
    """Serves `nbytes` of private memory by `sendall`; for a process of its own, which is asked for the port."""

    def __init__(self, nbytes: int) -> None:
        memory = anonymous_memory(nbytes)
        touch(memory)
        self._view = memoryview(memory)
        self._server = RawServer(lambda connection, begin, end: connection.sendall(self._view[begin:end]))

    def __call__(self, _: object) -> int:
        return self._server.port


def send_file(descriptor: int) -> Callable[[socket.socket, int, int], None]:
    """Sends from a file without copying it to this process. The caller closes the descriptor when nobody sends."""

    def send(connection: socket.socket, begin: int, end: int) -> None:
        while begin < end:
            begin += os.sendfile(connection.fileno(), descriptor, begin, end - begin)

    return send


@contextlib.contextmanager
def prepared_raw(memory: mmap.mmap, port: int) -> Iterator[Callable[[], None]]:
    """A function that fills `memory` once, over connections that are made already. The memory is closed in the end."""
    nbytes = len(memory)
    bounds = [nbytes * part // CONNECTIONS for part in range(CONNECTIONS + 1)]
    with contextlib.ExitStack() as opened:
        opened.callback(memory.close)
        view = opened.enter_context(memoryview(memory))
        connections = [opened.enter_context(socket.create_connection((HOST, port))) for _ in range(CONNECTIONS)]
        failed: list[BaseException] = []

        def receive(part: int) -> None:
            try:
                _receive(connections[part], view, bounds[part], bounds[part + 1])
            except BaseException as error:
                failed.append(error)

        def run() -> None:
            threads = [threading.Thread(target=receive, args=(part,)) for part in range(CONNECTIONS)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            if failed:
                raise failed[0]

        yield run


def _receive(connection: socket.socket, memory: memoryview, begin: int, end: int) -> None:
    connection.sendall(_RANGE.pack(begin, end))
    while begin < end:
        with memory[begin:end] as rest:
            received = connection.recv_into(rest)
        if not received:
            raise ConnectionError("the raw server closed the connection")
        begin += received
