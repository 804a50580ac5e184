"""A TCP proxy in front of a server, which passes everything on until something goes wrong at a chosen byte.

    with Proxy(server, Fault(Stream.PAYLOAD, at=5000, effect=kill)) as proxy:
        fetch(tensors, transports, proxy.endpoint)

Bytes are counted from 0 in a `Stream`. An effect happens when `at` bytes have passed and the next one has arrived. One
thread runs all connections of a proxy. `close`, or the end of the `with` block, ends it and closes every socket.

A subclass that overrides `passing` sees every piece, and decides what goes on in its place.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import itertools
import socket
import struct
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Self

from support.wait import wait_until
from vllm_ascend.model_loader.netloader.endpoint import Endpoint

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
_RECEIVE_BYTES = 64 << 10
_BEGINNING = 1024
"""Bytes of a connection within which a client has said Attach, if it says it at all."""


class Stream(enum.Enum):
    """Which bytes are counted together: those of one connection in one direction, or the weights on all connections."""

    TO_SERVER = "what a client says"
    TO_CLIENT = "what a server says"
    PAYLOAD = "what a server sends after Attached"


Effect = Callable[["Direction", bytearray], Awaitable[None]]
"""What goes wrong. It is called with the place where it happens and the bytes that come next, which it may change."""


@dataclass(frozen=True, eq=False)
class Fault:
    """Something that goes wrong once, at the byte `at` of `stream`.

    It happens on the connection of the given number, or on the first one that gets there. Connections are numbered as
    they come: 0 is the control connection of the first session, and its data connections follow.
    """

    stream: Stream
    at: int
    effect: Effect
    connection: int | None = None


class Proxy:
    """Passes connections to `endpoint` on to `target`.

    With `others`, the servers take turns: each connection goes to the next one. Every piece waits for `delay` seconds.
    With `source_host`, the server sees connections come from that address. Without `payload_apart`, everything that a
    server sends on a connection counts as TO_CLIENT, as it does under TLS, where weights cannot be told from messages.
    """

    def __init__(
        self,
        target: Endpoint,
        *faults: Fault,
        others: Sequence[Endpoint] = (),
        delay: float = 0.0,
        source_host: str | None = None,
        payload_apart: bool = True,
    ) -> None:
        self.delay = delay
        self.source_host = source_host
        self.payload_apart = payload_apart
        self.connections = 0
        self.silent = False
        """Whether all connections stay open, but nothing passes any more."""
        self.passed: Counter[tuple[Stream, int]] = Counter()
        """Bytes that have been passed on, by stream and connection; PAYLOAD of all of them is under connection 0."""
        self.payload_lock = asyncio.Lock()
        self._targets = itertools.cycle((target, *others))
        self._faults = list(faults)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._listener.setblocking(False)
        self.endpoint = Endpoint("127.0.0.1", self._listener.getsockname()[1])
        self._links: dict[asyncio.Task[None], _Link] = {}
        self._loop = asyncio.new_event_loop()
        self._over = asyncio.Event()
        self._accepting: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self._run, name="faulty proxy")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def payload(self) -> int:
        """Bytes of weights that have been passed on."""
        return self.passed[Stream.PAYLOAD, 0]

    @property
    def struck(self) -> bool:
        """Whether every fault has happened."""
        return not self._faults

    def passing(self, connection: int, stream: Stream, piece: bytes) -> bytes:
        """Is called with every piece, in order, and returns what goes on in its place. For subclasses."""
        return piece

    def wait_for_ends(self) -> None:
        """Returns when both sides of every connection have ended it."""
        wait_until(lambda: not self._links)

    def close(self) -> None:
        """Ends every connection. Idempotent."""
        with contextlib.suppress(RuntimeError):  # the loop is closed already
            self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join()

    def end_all(self) -> None:
        """Resets every connection and closes the port, as the end of a process does. To be called by effects."""
        assert self._accepting is not None
        self._accepting.cancel()
        for task, link in self._links.items():
            link.reset = True
            task.cancel()

    def next_fault(self, stream: Stream, connection: int, begin: int, end: int) -> Fault | None:
        """The first fault between two positions of a stream, which is then struck from the list."""
        due = [
            fault
            for fault in self._faults
            if fault.stream is stream and fault.connection in (None, connection) and begin <= fault.at < end
        ]
        fault = min(due, key=lambda each: each.at, default=None)
        if fault is not None:
            self._faults.remove(fault)
        return fault

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        self._accepting = asyncio.create_task(self._accept())
        await self._over.wait()
        ending = [self._accepting, *self._links]
        for task in ending:
            task.cancel()
        await asyncio.wait(ending)

    async def _accept(self) -> None:
        with self._listener:
            while True:
                client, _ = await self._loop.sock_accept(self._listener)
                link = _Link(self, self.connections, client)
                self.connections += 1
                task = asyncio.create_task(link.run(next(self._targets)))
                self._links[task] = link
                task.add_done_callback(self._links.pop)


@dataclass
class _Link:
    """A client's connection to the proxy, and the proxy's connection to the server that belongs to it."""

    proxy: Proxy
    number: int
    client: socket.socket
    server: socket.socket = field(default_factory=socket.socket)
    reset: bool = False
    """Whether both connections end by a reset."""
    silent: bool = False
    attached: bool = False
    """Whether the client has said Attach and the server has answered, so that weights follow."""
    attaching: bool = False
    rate: float | None = None
    """Bytes per second, if they are limited."""
    ends_at: float | None = None
    """When the connection ends by itself, if it does, on the clock of the event loop."""

    async def run(self, target: Endpoint) -> None:
        for sock in (self.client, self.server):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            if self.proxy.source_host is not None:
                self.server.bind((self.proxy.source_host, 0))
            await asyncio.get_running_loop().sock_connect(self.server, target)
            async with asyncio.TaskGroup() as group:
                group.create_task(Direction(self, self.client, self.server, Stream.TO_SERVER).run())
                group.create_task(Direction(self, self.server, self.client, Stream.TO_CLIENT).run())
        except* _Ended:
            pass
        except* OSError:  # one side has reset its connection: so does the proxy on the other side
            self.reset = True
        finally:
            for sock in (self.client, self.server):
                if self.reset:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
                else:  # closing alone would reset a connection on which bytes lie unread
                    with contextlib.suppress(OSError):
                        sock.shutdown(socket.SHUT_WR)
                sock.close()


class Direction:
    """One direction of one connection. Effects are told where they happen by it."""

    def __init__(self, link: _Link, source: socket.socket, sink: socket.socket, stream: Stream) -> None:
        self.link = link
        self.sink = sink
        self.closed = False
        """Whether everything that arrives is thrown away."""
        self._source = source
        self._stream = stream
        self._beginning = bytearray()
        self._answer = bytearray()

    async def run(self) -> None:
        loop, proxy = asyncio.get_running_loop(), self.link.proxy
        while data := await loop.sock_recv(self._source, _RECEIVE_BYTES):
            data = proxy.passing(self.link.number, self._stream, data)
            if proxy.delay or self.link.rate is not None:
                await asyncio.sleep(proxy.delay + (len(data) / self.link.rate if self.link.rate is not None else 0.0))
            if self.link.ends_at is not None and loop.time() > self.link.ends_at:
                raise _Ended

            if proxy.payload_apart and self._stream is Stream.TO_SERVER and len(self._beginning) < _BEGINNING:
                self._beginning += data
                self.link.attaching = b"Attach" in self._beginning

            try:
                if self._stream is Stream.TO_CLIENT and self.link.attached:
                    async with proxy.payload_lock:  # so that effects come at the very byte
                        await self._pass(bytearray(data), Stream.PAYLOAD, 0)
                else:
                    self._note_answer(data)
                    await self._pass(bytearray(data), self._stream, self.link.number)
            except OSError:  # whoever should get this is gone: the other direction passes on the last that it has said
                return
        if not self._swallows:
            with contextlib.suppress(OSError):
                self.sink.shutdown(socket.SHUT_WR)

    def _note_answer(self, data: bytes) -> None:
        """The client asks for weights only when it has heard the answer to Attach, so nothing of them is in `data`."""
        if self._stream is Stream.TO_CLIENT and self.link.attaching:
            self._answer += data
            self.link.attached = len(self._answer) >= 4 + int.from_bytes(self._answer[:4], "big") > 4

    async def forward(self, data: bytes | bytearray) -> None:
        await asyncio.get_running_loop().sock_sendall(self.sink, data)

    @property
    def _swallows(self) -> bool:
        return self.closed or self.link.silent or self.link.proxy.silent

    async def _pass(self, data: bytearray, stream: Stream, counted_as: int) -> None:
        proxy = self.link.proxy
        while data and not self._swallows:
            begin = proxy.passed[stream, counted_as]
            fault = proxy.next_fault(stream, self.link.number, begin, begin + len(data))
            before = fault.at - begin if fault is not None else len(data)
            proxy.passed[stream, counted_as] += before
            await self.forward(data[:before])
            del data[:before]
            if fault is not None:
                await fault.effect(self, data)


class _Ended(Exception):
    """Raised by an effect: ends both directions of a connection."""


def flip(mask: int) -> Effect:
    """An effect: the bits of `mask` are inverted in the next byte."""

    async def effect(_: Direction, following: bytearray) -> None:
        following[0] ^= mask

    return effect


def insert(content: bytes) -> Effect:
    """An effect: `content` arrives in addition."""

    async def effect(direction: Direction, _: bytearray) -> None:
        await direction.forward(content)

    return effect


async def repeat_a_byte(direction: Direction, following: bytearray) -> None:
    """An effect: the next byte arrives twice."""
    await direction.forward(following[:1])


async def lose_a_byte(_: Direction, following: bytearray) -> None:
    """An effect: the next byte does not arrive."""
    del following[0]


async def close(direction: Direction, _: bytearray) -> None:
    """An effect: this connection ends."""
    raise _Ended


async def reset(direction: Direction, _: bytearray) -> None:
    """An effect: this connection is reset, so that what was on its way is lost."""
    direction.link.reset = True
    raise _Ended


async def half_close(direction: Direction, _: bytearray) -> None:
    """An effect: this direction ends, and the other one goes on."""
    direction.closed = True
    direction.sink.shutdown(socket.SHUT_WR)


async def silence(direction: Direction, _: bytearray) -> None:
    """An effect: nothing arrives any more on this connection, in either direction."""
    direction.link.silent = True


async def silence_all(direction: Direction, _: bytearray) -> None:
    """An effect: nothing arrives on any connection any more, as if the host had died or the network were cut."""
    direction.link.proxy.silent = True


async def kill(direction: Direction, _: bytearray) -> None:
    """An effect: all connections are reset and the port is closed, as if the server's process had ended."""
    direction.link.proxy.end_all()
    raise _Ended


def throttle(rate: float, seconds: float) -> Effect:
    """An effect: this connection passes `rate` bytes per second in each direction, and ends after `seconds`."""

    async def effect(direction: Direction, _: bytearray) -> None:
        direction.link.rate = rate
        direction.link.ends_at = asyncio.get_running_loop().time() + seconds

    return effect


def hold(begun: threading.Event, end: threading.Event) -> Effect:
    """An effect: sets `begun`, and lets nothing pass in this stream until `end` is set."""

    async def effect(_: Direction, __: bytearray) -> None:
        begun.set()
        while not end.is_set():
            await asyncio.sleep(0.005)

    return effect
