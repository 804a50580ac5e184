"""Between accelerators, or wherever a collective library knows the best way: send and receive in a process group.

When the client sends Gather, both sides begin to make a group of two. What their libraries have to tell each other
travels in Publish messages on the control connection, whose peer is known and authenticated; only then does the library
open connections of its own. Each side sends Gathered once a byte has passed at its end, and the transfer begins.

Each Fetch is answered by one send of a chunk, which small tensors share and large ones span. Several chunks are in
flight at once, so that neither side waits for the other after each of them.

Between NPUs the bytes never touch host memory, except to be digested. A session takes IN_FLIGHT buckets of one chunk on
each side, and what HCCL itself takes for a group.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import deque
from collections.abc import Mapping
from typing import Final, NamedTuple

import torch
from torch.distributed import Work

from vllm_ascend.distributed import process_group
from vllm_ascend.model_loader.netloader.errors import ConnectionLost, PeerError, ProtocolError, TransportError, one_line
from vllm_ascend.model_loader.netloader.model.device_memory import chunk_in, landing_tensor
from vllm_ascend.model_loader.netloader.model.streams import own_stream
from vllm_ascend.model_loader.netloader.traits import traits_of
from vllm_ascend.model_loader.netloader.transport.base import CopyingTransport, Reception, Timeouts
from vllm_ascend.model_loader.netloader.transport.chunks.arrival import Arrival
from vllm_ascend.model_loader.netloader.transport.chunks.delivery import Delivery
from vllm_ascend.model_loader.netloader.transport.chunks.inventory import Chunk
from vllm_ascend.model_loader.netloader.transport.sender import Sender
from vllm_ascend.model_loader.netloader.transport.store import WeightStore
from vllm_ascend.model_loader.netloader.wire.channel import Channel, Deadline
from vllm_ascend.model_loader.netloader.wire.messages import (
    KEY_LIMIT,
    PUBLISH_LIMIT,
    End,
    Fetch,
    Gather,
    Gathered,
    Leave,
    Message,
    Offer,
    Publish,
)
from vllm_ascend.model_loader.netloader.wire.pacing import Pacer

IN_FLIGHT: Final = 4
"""Chunks that are asked for or on their way at any moment."""


class ProcessGroupTransport(CopyingTransport):
    """Sends and receives chunks in a process group of two, which is made for each session."""

    def __init__(self, device: str) -> None:
        """`device`, named as torch does, computes with the weights; the library is the one that reaches it."""
        self._device = torch.device(device)
        self.traits = traits_of("process_group", self._device.type)

    def offer(self) -> Offer:
        return Offer(self.name, process_group.BACKENDS[self._device.type])

    def sender(self, store: WeightStore, timeouts: Timeouts, pacer: Pacer) -> Sender:
        return _GroupSender(store, self._device, timeouts, pacer)

    def receive(self, reception: Reception, delivery: Delivery) -> None:
        if not delivery.remaining:
            return  # a group is dear, and nothing would go through it
        with own_stream(self._device):
            _Receiver(reception, delivery, self._device).run()


class _Exchange:
    """The messages of both ends on the control connection, from Gather to the moment when their group works."""

    def __init__(self, control: Channel, timeout: float) -> None:
        self._control = control
        self._timeout = timeout
        self._deadline = Deadline(timeout)

    def meet(self, rank: int, device: torch.device, aborted: threading.Event) -> process_group.Pair:
        """The group of both ends, which the caller leaves.

        Raises TransportError where no group comes about, PeerError or OSError where the peer failed.
        """
        rendezvous = process_group.Rendezvous(self._publish, self._published)
        route = process_group.Route(self._control.local_host, self._control.peer_host)
        scope = functools.partial(own_stream, device)
        try:
            return process_group.meet(
                rank, rendezvous, route, device, scope=scope, timeout=self._timeout, aborted=aborted
            )
        except RuntimeError as error:
            raise _explained(rendezvous, error, route.peer) from error

    def finish(self) -> None:
        """Returns when the peer says that the group works. Raises PeerError, OSError or TransportError."""
        # Values that came too late to be asked for may stand before Gathered.
        for _ in range(process_group.VALUES_LIMIT + 1):
            if isinstance(self._receive(), Gathered):
                return
        raise ProtocolError("the peer publishes without end")

    def _publish(self, key: str, value: bytes) -> None:
        if len(key) > KEY_LIMIT or len(value) > PUBLISH_LIMIT:
            raise TransportError(f"the value {key[:KEY_LIMIT]!r} of its library has {len(value)} bytes: too many")
        self._control.send(Publish(key, bytes(value)), self._deadline.remaining())

    def _published(self) -> tuple[str, bytes]:
        message = self._receive()
        if not isinstance(message, Publish):
            raise ProtocolError(f"the peer sent {type(message).__name__} before the process group had come about")
        return message.key, message.value

    def _receive(self) -> Message:
        match message := self._control.receive(self._deadline):
            case End(reason):
                raise TransportError(f"it ended the session: {one_line(reason)}")
            case Leave(reason):
                raise PeerError(f"it gave up the process group: {one_line(reason)}")
        return message


class _Incoming(NamedTuple):
    """A chunk on its way into `buffer`: where it is to land, or a tensor beside it where that is on another device."""

    arrival: Arrival
    buffer: torch.Tensor
    work: Work


class _Receiver:
    """The client's half of one session: makes the group, and takes chunks through it until none is left."""

    def __init__(self, reception: Reception, delivery: Delivery, device: torch.device) -> None:
        self._reception = reception
        self._delivery = delivery
        self._device = device
        self._timeout = reception.timeouts.stall
        self._requested: deque[Chunk] = deque()
        self._receiving: deque[_Incoming] = deque()

    def run(self) -> None:
        with contextlib.ExitStack() as group_scope:
            # Callbacks run in reverse: the group is left first, since until then an operation of it could still write
            # into a buffer.
            group_scope.callback(self._receiving.clear)
            pair = self._gather()
            group_scope.callback(pair.leave)

            try:
                self._receive_chunks(pair)
            except RuntimeError as error:
                raise ConnectionLost(f"the process group failed: {_first_line(error)}") from error

    def _gather(self) -> process_group.Pair:
        control = self._reception.control
        control.send(Gather(), self._timeout)
        exchange = _Exchange(control, self._timeout)
        pair = exchange.meet(process_group.RECEIVER, self._device, threading.Event())
        try:
            control.send(Gathered(), self._timeout)
            exchange.finish()
        except BaseException:
            pair.leave()
            raise
        self._reception.follow()
        return pair

    def _request_ahead(self) -> None:
        while len(self._requested) + len(self._receiving) < IN_FLIGHT and (chunk := self._delivery.take()):
            self._request(chunk)

    def _request(self, chunk: Chunk) -> None:
        self._reception.control.send(Fetch(chunk.offset, chunk.length), self._timeout)
        self._requested.append(chunk)

    def _await_chunk(self) -> bool:
        """Asks for another chunk as soon as there is one. Whether there is; otherwise none will come any more."""
        chunk = self._reception.next_chunk(self._delivery)
        if chunk is not None:
            self._request(chunk)
            self._request_ahead()
        return chunk is not None

    def _receive_chunks(self, pair: process_group.Pair) -> None:
        while self._requested or self._receiving or self._await_chunk():
            while self._requested:
                self._receiving.append(self._begin(pair, self._delivery.begin(self._requested.popleft())))

            # The server sends chunks in the order in which they were asked for.
            arrival, buffer, work = self._receiving.popleft()
            pair.finish(work)

            landing = landing_tensor(arrival.landing)
            if buffer.device != landing.device:
                landing.copy_(buffer)
            arrival.advance(arrival.chunk.length)
            self._delivery.finish(arrival)

            self._reception.hear()
            self._request_ahead()

    def _begin(self, pair: process_group.Pair, arrival: Arrival) -> _Incoming:
        buffer = landing_tensor(arrival.landing)
        if buffer.device != self._device:
            buffer = torch.empty_like(buffer, device=self._device)
        return _Incoming(arrival, buffer, pair.receive(buffer))


class _Outgoing(NamedTuple):
    """A chunk that is being sent from `content`, which must stay as it is until `work` is finished."""

    content: torch.Tensor
    work: Work


class _GroupSender(Sender):
    """The server's half of one session. Every chunk is sent in the session's own thread."""

    def __init__(self, store: WeightStore, device: torch.device, timeouts: Timeouts, pacer: Pacer) -> None:
        super().__init__(store)
        self._memory, self._served = store.memory, store.bytes
        self._device = device
        self._timeout = timeouts.stall
        self._pacer = pacer
        self._pair: process_group.Pair | None = None
        self._sending: deque[_Outgoing] = deque()
        self._aborted = threading.Event()

    @property
    def parameters(self) -> Mapping[str, str | int]:
        return {}

    def gather(self, control: Channel) -> None:
        if self._pair is not None:
            raise ProtocolError("the client asks for a second process group")
        exchange = _Exchange(control, self._timeout)
        self._pair = exchange.meet(process_group.SENDER, self._device, self._aborted)
        exchange.finish()
        control.send(Gathered(), self._timeout)

    def push(self, fetch: Fetch) -> None:
        with self.sending(fetch):
            if self._pair is None:
                raise ProtocolError("the client fetches before there is a process group")
            try:
                self._send(self._pair, fetch)
            except RuntimeError as error:
                raise ConnectionLost(f"the process group failed: {_first_line(error)}") from error

    def _send(self, pair: process_group.Pair, fetch: Fetch) -> None:
        self._pacer.wait_for(fetch.length, self._aborted)
        if self._aborted.is_set():
            raise RuntimeError("the session has ended")

        with own_stream(self._device):
            chunk = chunk_in(self._memory, self._served, fetch.offset, fetch.length)
            content = chunk.to(self._device)
            self._sending.append(_Outgoing(content, pair.send(content)))

            if len(self._sending) >= IN_FLIGHT:
                content, work = self._sending.popleft()
                pair.finish(work, self._aborted)
                self.note_progress(content.nbytes)

    def abort(self) -> None:
        self._aborted.set()

    def close(self) -> None:
        pair, self._pair = self._pair, None
        if pair is not None:
            with own_stream(self._device):
                pair.leave()

        # The device may read what is being sent for as long as there is a group.
        self._sending.clear()


def _explained(rendezvous: process_group.Rendezvous, error: RuntimeError, peer: str) -> Exception:
    """The error to raise where no group came about: the failure of the rendezvous, if that was the reason."""
    failure = rendezvous.take_failure()
    if isinstance(failure, PeerError | OSError | TransportError):
        return failure
    return TransportError(f"no process group with {peer} came about: {one_line(_first_line(failure or error))}")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
