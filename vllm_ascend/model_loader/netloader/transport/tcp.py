"""Between hosts: the client pulls chunks over several connections, straight into the pages of its arena.

On an accelerator the chunks land in a bucket in host memory, from which they are copied to the device.

All connections go to the port of the server's listener, so one open port is enough. They share the queue of missing
chunks, so a slow connection takes fewer of them. Each asks for its next chunk before the current one has arrived, so
that the line is never idle for a round trip.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Mapping
from typing import Final

from vllm_ascend.model_loader.netloader.errors import (
    ConnectionLost,
    PeerError,
    SessionEnded,
    Stalled,
    TransportError,
    one_line,
)
from vllm_ascend.model_loader.netloader.traits import TCP
from vllm_ascend.model_loader.netloader.transport.base import CopyingTransport, Reception, Timeouts
from vllm_ascend.model_loader.netloader.transport.chunks.delivery import Delivery
from vllm_ascend.model_loader.netloader.transport.chunks.inventory import Chunk
from vllm_ascend.model_loader.netloader.transport.sender import Sender
from vllm_ascend.model_loader.netloader.transport.store import WeightStore
from vllm_ascend.model_loader.netloader.wire.bulk import FileRange, receive_into, send_range
from vllm_ascend.model_loader.netloader.wire.channel import Channel, Deadline
from vllm_ascend.model_loader.netloader.wire.messages import Attach, Fetch, Message, Refuse
from vllm_ascend.model_loader.netloader.wire.pacing import Pacer
from vllm_ascend.model_loader.netloader.wire.wakeup import Wakeup

CONNECTIONS: Final = min(4, os.cpu_count() or 1)
"""Data connections that a client opens: each takes a thread, and much of a processor to receive and digest."""
MAX_DATA_CONNECTIONS: Final = 32
"""Data connections that a server serves at once for one session."""
_REQUESTED_AHEAD: Final = 2
"""Chunks that a connection has asked for at any moment, the one that arrives included."""


class TcpTransport(CopyingTransport):
    """Pulls chunks over TCP connections to the server's listener, by way of host memory."""

    traits = TCP

    def sender(self, store: WeightStore, timeouts: Timeouts, pacer: Pacer) -> Sender:
        return _ChunkSender(store, timeouts, pacer)

    def receive(self, reception: Reception, delivery: Delivery) -> None:
        _Pull(reception, delivery).run()


class _ChunkSender(Sender):
    """Serves the data connections of one session, each in a thread of its own.

    Where the store has a file, the kernel sends from a duplicate of its descriptor. The connections may still use it
    when the session is over, so whoever is the last closes it.
    """

    def __init__(self, store: WeightStore, timeouts: Timeouts, pacer: Pacer) -> None:
        super().__init__(store)
        self._bytes = store.bytes
        self._memory = store.memory
        descriptor = store.memory.descriptor
        self._descriptor = None if descriptor is None else os.dup(descriptor)
        self._timeout = timeouts.stall
        self._pacer = pacer
        self._lock = threading.Lock()
        self._channel_over = threading.Condition(self._lock)
        self._channels: set[Channel] = set()
        self._aborted = threading.Event()

    @property
    def parameters(self) -> Mapping[str, str | int]:
        return {}

    def attach(self, channel: Channel) -> None:
        with self._lock:
            if self._aborted.is_set() or len(self._channels) >= MAX_DATA_CONNECTIONS:
                raise PeerError(f"the session is over or has {MAX_DATA_CONNECTIONS} data connections already")
            self._channels.add(channel)

        try:
            self._serve(channel)
        finally:
            with self._lock:
                self._channels.discard(channel)
                self._channel_over.notify_all()
                self._close_unused_descriptor()

    def abort(self) -> None:
        with self._lock:
            self._aborted.set()
            for channel in self._channels:
                channel.shut_down()

    def close(self) -> None:
        # This comes first: a connection ends by itself only when the session is over.
        self.abort()

        with self._lock:
            # Memory without a file is read where inference uses it, and its owner may free it when this returns.
            if self._descriptor is None:
                self._channel_over.wait_for(lambda: not self._channels)

            # A file stays as long as its descriptor, so nobody waits for the connections that still send from it.
            self._close_unused_descriptor()

    def _close_unused_descriptor(self) -> None:
        """Closes the descriptor once the session is over and no connection is left, so that its number is not reused
        while a connection still sends from it.
        """
        if self._aborted.is_set() and not self._channels and self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _serve(self, channel: Channel) -> None:
        while not self._aborted.is_set():
            match self._next_message(channel):
                case Fetch(offset, length) as fetch:
                    with self.sending(fetch):
                        # The kernel would hold the pages until the client has read them, and memory with pages that
                        # are held cannot be sealed.
                        descriptor = self._descriptor if self._memory.servable else None
                        content = FileRange(descriptor, self._bytes, offset, length)
                        send_range(
                            channel.socket,
                            content,
                            timeout=self._timeout,
                            pacer=self._pacer,
                            progress=self.note_progress,
                            given_up=self._aborted,
                        )

    def _next_message(self, channel: Channel) -> Message:
        """The client may leave one connection idle while it goes on by others, or waits for news."""
        while True:
            try:
                return channel.receive(Deadline(self._timeout))
            except Stalled:
                if self.idle_seconds() >= self._timeout or self._aborted.is_set():
                    raise


class _Pull:
    """One transfer: a thread for each connection, all of which take chunks of one delivery."""

    def __init__(self, reception: Reception, delivery: Delivery) -> None:
        self._reception = reception
        self._delivery = delivery
        self._lock = threading.Lock()
        self._channels: dict[threading.Thread, Channel] = {}
        self._failure: BaseException | None = None
        self._running = 0
        self._is_over = False

    def run(self) -> None:
        count = min(self._reception.connections or CONNECTIONS, self._delivery.remaining)
        if count:
            self._reception.follow()
            with contextlib.closing(Wakeup()) as wakeup:
                self._delivery.requests.listen(wakeup.set, only_the_end=True)
                self._run(count, wakeup)
                self._delivery.requests.forget(wakeup.set)

        failure, self._failure = self._failure, None
        if failure is not None:
            try:
                raise failure
            finally:
                del failure  # its traceback would hold this frame, and this frame the failure

    def _run(self, count: int, wakeup: Wakeup) -> None:
        threads = [
            threading.Thread(target=self._connection, args=(wakeup,), name=f"netloader-tcp-{number}", daemon=True)
            for number in range(count)
        ]
        started: list[threading.Thread] = []
        try:
            for thread in threads:
                with self._lock:
                    self._running += 1
                thread.start()
                started.append(thread)
        except RuntimeError as error:
            self._fail(TransportError(f"this process cannot start threads: {error}"))
        else:
            self._attend(wakeup)

        # Whatever has failed, no thread may write into the memory when this returns. Those that are still connecting
        # see that it is over before they do.
        with self._lock:
            self._is_over = True
            left = started if self._failure is not None else list(self._channels)
        for thread in left:
            thread.join()

    def _attend(self, wakeup: Wakeup) -> None:
        """Returns when all connections are over. What they still wait for when all chunks are here, nobody needs."""
        try:
            while self._running and not self._delivery.is_complete:
                self._reception.attend(wakeup)
                wakeup.clear()
        except BaseException as error:
            self._fail(error, counts=True)
        self._cut()

    def _cut(self) -> None:
        with self._lock:
            for channel in self._channels.values():
                channel.shut_down()

    def _connection(self, wakeup: Wakeup) -> None:
        try:
            with self._reception.connect() as channel:
                with self._lock:
                    if self._is_over:
                        return
                    self._channels[threading.current_thread()] = channel
                self._attach(channel)
                self._fetch_chunks(channel)
        except BaseException as error:  # whatever it is, `run` raises it: bytes are missing
            self._fail(error)
        finally:
            with self._lock:
                self._running -= 1
                is_last = not self._running
            if is_last:
                wakeup.set()

    def _attach(self, channel: Channel) -> None:
        timeout = self._reception.timeouts.connect
        channel.send(Attach(self._reception.session), timeout)
        answer = channel.receive(Deadline(timeout))
        if isinstance(answer, Refuse):
            raise ConnectionLost(f"it refused a data connection: {one_line(answer.reason)}")

    def _fetch_chunks(self, channel: Channel) -> None:
        timeout = self._reception.timeouts.stall
        requested: deque[Chunk] = deque()
        while self._failure is None:
            while len(requested) < _REQUESTED_AHEAD and (chunk := self._delivery.take(wait=not requested)):
                channel.send(Fetch(chunk.offset, chunk.length), timeout)
                requested.append(chunk)
            if not requested:
                return

            # Chunks arrive in the order in which this connection has asked for them.
            chunk = requested.popleft()
            arrival = self._delivery.begin(chunk)
            receive_into(channel.socket, arrival.landing.host, timeout, arrival.advance)
            self._delivery.finish(arrival)

    def _fail(self, error: BaseException, *, counts: bool = False) -> None:
        """Keeps the first failure, or what the source says about it, and ends the other connections, which may wait for
        bytes or for a chunk to take.

        When all chunks are here, whoever brought them, a failure means nothing, unless it `counts` because the source
        can confirm nothing any more.
        """
        if self._delivery.is_complete and not counts:
            return
        self._delivery.break_off()
        with self._lock:
            if self._failure is None or isinstance(error, SessionEnded):
                self._failure = error
        self._cut()
