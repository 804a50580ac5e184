"""Between accelerators, and wherever a collective library knows the best way: send and receive in a process group.

For each session the server binds a port for the group's store before it tells the client (no port race). With its first
Fetch on the control connection the client begins to make a group of two, and so does the server. Each Fetch is answered
by one send of a chunk, which small tensors share and large ones span; several are in flight at once, so that neither
side waits for the other after each tensor.

Between NPUs the bytes never touch host memory, except to be digested. What a session takes there is IN_FLIGHT buckets
of a chunk on each side, and what HCCL itself takes for a group.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
import threading
from collections import deque
from collections.abc import Mapping
from typing import Final, NamedTuple

import torch
from torch.distributed import Work

from vllm_ascend.distributed import process_group
from vllm_ascend.model_loader.netloader.channel import ConnectionLost
from vllm_ascend.model_loader.netloader.delivery import Arrival, Chunk, Delivery
from vllm_ascend.model_loader.netloader.errors import ProtocolError, TransportError
from vllm_ascend.model_loader.netloader.memory import Memory, own_stream
from vllm_ascend.model_loader.netloader.pacing import Pacer
from vllm_ascend.model_loader.netloader.protocol import Fetch, Offer
from vllm_ascend.model_loader.netloader.transport.base import Reception, Sender, Timeouts, Transport
from vllm_ascend.model_loader.netloader.weights import WeightStore

IN_FLIGHT: Final = 4


class ProcessGroupTransport(Transport):
    """`device` is where the weights are computed with, so that the backend is the one that reaches it."""

    name = "process_group"

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def offer(self) -> Offer:
        return Offer(self.name, process_group.BACKENDS[self._device.type])

    def sender(self, store: WeightStore, server_host: str, timeouts: Timeouts, pacer: Pacer) -> Sender:
        return _GroupSender(store, self._device, server_host, timeouts, pacer)

    def receive(self, reception: Reception) -> Memory:
        delivery = reception.deliver()
        if delivery.remaining:
            with own_stream(self._device):
                _Receiver(reception, delivery, self._device).run()
        return delivery.memory


class _Incoming(NamedTuple):
    """A chunk on its way into `buffer`, which is where it lands unless that is on another device."""

    arrival: Arrival
    buffer: torch.Tensor
    work: Work


class _Receiver:
    """The client's half of one session."""

    def __init__(self, reception: Reception, delivery: Delivery, device: torch.device) -> None:
        self._reception = reception
        self._delivery = delivery
        self._device = device
        self._timeout = reception.timeouts.stall
        self._requested: deque[Chunk] = deque()
        self._receiving: deque[_Incoming] = deque()

    def run(self) -> None:
        host, port = self._meeting_place()
        self._request_ahead()
        with contextlib.ExitStack() as group_scope:
            # The last: until the group is left, an operation could still write into its buffer.
            group_scope.callback(self._receiving.clear)
            try:
                pair = group_scope.enter_context(process_group.receiver_group(host, port, self._device, self._timeout))
            except RuntimeError as error:
                raise TransportError(f"no process group with {host}, port {port}: {_first_line(error)}") from error
            try:
                self._receive_chunks(pair)
            except RuntimeError as error:
                raise ConnectionLost(f"the process group failed: {_first_line(error)}") from error

    def _meeting_place(self) -> tuple[str, int]:
        """Where the server waits: torch makes a URL of it, so it must be an address and a port and nothing else."""
        host, port = self._reception.text("host"), self._reception.number("port")
        try:
            scope = getattr(ipaddress.ip_address(host), "scope_id", None) or ""
        except ValueError as error:
            raise ProtocolError(f"the transport parameter 'host' is {host!r}: expected an IP address") from error
        if not 1 <= port <= 65535 or not re.fullmatch(r"[\w.-]*", scope, re.ASCII):
            raise ProtocolError(f"the source waits at {host!r}, port {port}, which cannot be")
        return host, port

    def _request_ahead(self) -> None:
        while len(self._requested) + len(self._receiving) < IN_FLIGHT and (chunk := self._delivery.take()):
            self._reception.control.send(Fetch(chunk.offset, chunk.length), self._timeout)
            self._requested.append(chunk)

    def _receive_chunks(self, pair: process_group.Pair) -> None:
        while self._requested or self._receiving:
            while self._requested:
                self._receiving.append(self._begin(pair, self._delivery.begin(self._requested.popleft())))
            arrival, buffer, work = self._receiving.popleft()
            pair.finish(work)
            if buffer.device != arrival.landing.tensor.device:
                arrival.landing.tensor.copy_(buffer)
            arrival.advance(arrival.chunk.length)
            self._delivery.finish(arrival)
            self._request_ahead()

    def _begin(self, pair: process_group.Pair, arrival: Arrival) -> _Incoming:
        buffer = arrival.landing.tensor
        if buffer.device != self._device:
            buffer = torch.empty_like(buffer, device=self._device)
        return _Incoming(arrival, buffer, pair.receive(buffer))


class _Outgoing(NamedTuple):
    content: torch.Tensor
    work: Work


class _GroupSender(Sender):
    def __init__(
        self, store: WeightStore, device: torch.device, server_host: str, timeouts: Timeouts, pacer: Pacer
    ) -> None:
        super().__init__(store.manifest.nbytes)
        self._host = server_host
        self._device = device
        self._timeout = timeouts.stall
        self._pacer = pacer
        self._listener = process_group.listen(server_host)
        self._port = self._listener.getsockname()[1]
        self._memory = store.memory
        self._group_scope = contextlib.ExitStack()
        self._pair: process_group.Pair | None = None
        self._sending: deque[_Outgoing] = deque()
        self._aborted = threading.Event()

    @property
    def parameters(self) -> Mapping[str, str | int]:
        return {"host": self._host, "port": self._port}

    def push(self, fetch: Fetch) -> None:
        self.check(fetch)
        try:
            if self._pair is None:
                group = process_group.sender_group(self._host, self._listener, self._device, self._timeout)
                self._pair = self._group_scope.enter_context(group)
            self._pacer.wait_for(fetch.length)
            if self._aborted.is_set():
                raise RuntimeError("the session has ended")
            with own_stream(self._device):
                content = self._memory.chunk(fetch.offset, fetch.length).to(self._device)
                self._sending.append(_Outgoing(content, self._pair.send(content)))
                self.note_delivered(fetch.offset, fetch.length)
                if len(self._sending) >= IN_FLIGHT:
                    content, work = self._sending.popleft()
                    self._pair.finish(work, self._aborted)
                    self.note_progress(content.nbytes)
        except RuntimeError as error:
            raise ConnectionLost(f"the process group failed: {_first_line(error)}") from error

    def abort(self) -> None:
        self._aborted.set()

    def close(self) -> None:
        self._pair = None
        with own_stream(self._device):
            self._group_scope.close()
        self._sending.clear()  # not before: the device reads the content for as long as there is a group
        self._listener.close()


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
