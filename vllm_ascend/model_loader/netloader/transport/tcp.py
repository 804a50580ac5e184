"""Other hosts: the client pulls byte ranges over several connections, straight into the pages of its arena.

All connections go to the port of the server's listener, so one open port is enough. The chunks are a queue that the
connections share: a slow one takes fewer. Each asks for its next chunk before the current one has arrived, so that
no round trip stands between them.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Mapping
from typing import Final

from vllm_ascend.model_loader.netloader.arena import Arena
from vllm_ascend.model_loader.netloader.channel import Channel, Deadline, connect
from vllm_ascend.model_loader.netloader.errors import ProtocolError
from vllm_ascend.model_loader.netloader.manifest import chunks
from vllm_ascend.model_loader.netloader.protocol import Attach, Fetch, Hello, Welcome
from vllm_ascend.model_loader.netloader.transport.base import CHUNK_BYTES, Reception, Sender, Timeouts, Transport
from vllm_ascend.model_loader.netloader.weights import WeightStore

CONNECTIONS: Final = min(4, os.cpu_count() or 1)
MAX_CONNECTIONS: Final = 32
"""Data connections that a server takes for one session."""
_REQUESTED_AHEAD: Final = 2


class TcpTransport(Transport):
    name = "tcp"

    def sender(self, store: WeightStore, server_host: str, timeouts: Timeouts) -> Sender:
        return _RangeSender(store, timeouts)

    def receive(self, reception: Reception) -> Arena:
        arena = reception.allocate(mapped=False)
        if reception.nbytes:
            _Pull(reception, arena).run()
        return arena


class _RangeSender(Sender):
    def __init__(self, store: WeightStore, timeouts: Timeouts) -> None:
        super().__init__()
        self._nbytes = store.manifest.nbytes
        self._descriptor = os.dup(store.arena.descriptor)
        self._timeout = timeouts.stall
        self._lock = threading.Lock()
        self._channels: set[Channel] = set()
        self._closed = False

    @property
    def parameters(self) -> Mapping[str, str | int]:
        return {}

    def attach(self, channel: Channel) -> None:
        with self._lock:
            if self._closed or len(self._channels) >= MAX_CONNECTIONS:
                raise ProtocolError(f"the session is over or has {MAX_CONNECTIONS} data connections already")
            self._channels.add(channel)
        try:
            self._serve(channel)
        finally:
            with self._lock:
                self._channels.discard(channel)
                self._close_unused_descriptor()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for channel in self._channels:
                channel.shut_down()
            self._close_unused_descriptor()

    def _close_unused_descriptor(self) -> None:
        """The last one out closes it: its number must not be reused while a connection still sends from it."""
        if self._closed and not self._channels and self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _serve(self, channel: Channel) -> None:
        while not self._closed:
            match channel.receive(Deadline(self._timeout)):
                case Fetch(offset, length):
                    if offset + length > self._nbytes:
                        raise ProtocolError(f"Fetch of {length} bytes at {offset}: there are {self._nbytes}")
                    channel.send_file(self._descriptor, offset, length, self._timeout, self.note_progress)


class _Pull:
    """One transfer: a thread per connection, and one queue of chunks between them."""

    def __init__(self, reception: Reception, arena: Arena) -> None:
        self._reception = reception
        self._descriptor = arena.descriptor
        self._chunks = deque(chunks(reception.nbytes, CHUNK_BYTES))
        self._lock = threading.Lock()
        self._channels: list[Channel] = []
        self._failure: BaseException | None = None

    def run(self) -> None:
        count = min(CONNECTIONS, len(self._chunks))
        threads = [threading.Thread(target=self._connection, name=f"netloader-tcp-{n}") for n in range(count)]
        started: list[threading.Thread] = []
        try:
            for thread in threads:
                thread.start()
                started.append(thread)
        except BaseException as error:
            self._fail(error)
        for thread in started:
            thread.join()
        if self._failure is not None:
            raise self._failure

    def _connection(self) -> None:
        try:
            with self._open() as channel:
                self._attach(channel)
                self._fetch_chunks(channel)
        except BaseException as error:  # whatever it is, `run` raises it: bytes are missing
            self._fail(error)

    def _open(self) -> Channel:
        timeout = self._reception.timeouts.connect
        channel = connect(self._reception.source, timeout)
        with self._lock:
            self._channels.append(channel)
        return channel

    def _attach(self, channel: Channel) -> None:
        timeout = self._reception.timeouts.connect
        channel.send(Hello(), timeout)
        if not isinstance(channel.receive(Deadline(timeout)), Welcome):
            raise ProtocolError("the source refuses a data connection")
        channel.send(Attach(self._reception.session), timeout)

    def _fetch_chunks(self, channel: Channel) -> None:
        timeout = self._reception.timeouts.stall
        requested: deque[tuple[int, int]] = deque()
        while self._failure is None:
            while len(requested) < _REQUESTED_AHEAD and (chunk := self._next_chunk()):
                channel.send(Fetch(*chunk), timeout)
                requested.append(chunk)
            if not requested:
                return
            offset, length = requested.popleft()
            channel.receive_into_file(self._descriptor, offset, length, timeout, self._reception.progress)

    def _next_chunk(self) -> tuple[int, int] | None:
        try:
            return self._chunks.popleft()
        except IndexError:
            return None

    def _fail(self, error: BaseException) -> None:
        """Keeps the first failure and wakes the other connections, whose own failures then follow from it."""
        with self._lock:
            if self._failure is None:
                self._failure = error
            for channel in self._channels:
                channel.shut_down()
