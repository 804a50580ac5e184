"""Between accelerators, and wherever a collective library knows the best way: send and receive in a process group.

For each session the server binds a port for the group's store before it tells the client (no port race). With its first
Fetch on the control connection the client begins to make a group of two, and so does the server. Each Fetch is answered
by one send of a chunk, which small tensors share and large ones span; several are in flight at once, so that neither
side waits for the other after each tensor.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
import warnings
from collections import deque
from collections.abc import Mapping
from typing import Final

import torch
from torch.distributed import ProcessGroup, Work

from vllm_ascend.distributed import process_group
from vllm_ascend.model_loader.netloader.arena import Arena
from vllm_ascend.model_loader.netloader.channel import ConnectionLost
from vllm_ascend.model_loader.netloader.delivery import Chunk, Delivery
from vllm_ascend.model_loader.netloader.errors import ProtocolError, TransportError
from vllm_ascend.model_loader.netloader.pacing import Pacer
from vllm_ascend.model_loader.netloader.protocol import Fetch
from vllm_ascend.model_loader.netloader.transport.base import Reception, Sender, Timeouts, Transport
from vllm_ascend.model_loader.netloader.weights import WeightStore

IN_FLIGHT: Final = 4


class ProcessGroupTransport(Transport):
    name = "process_group"

    def sender(self, store: WeightStore, server_host: str, timeouts: Timeouts, pacer: Pacer) -> Sender:
        return _GroupSender(store, server_host, timeouts, pacer)

    def receive(self, reception: Reception) -> Arena:
        delivery = reception.deliver()
        if delivery.remaining:
            _Receiver(reception, delivery).run()
        return delivery.arena


class _Receiver:
    """The client's half of one session."""

    def __init__(self, reception: Reception, delivery: Delivery) -> None:
        self._reception = reception
        self._delivery = delivery
        self._timeout = reception.timeouts.stall
        self._requested: deque[Chunk] = deque()
        self._receiving: deque[tuple[Chunk, Work]] = deque()

    def run(self) -> None:
        host, port = self._meeting_place()
        self._request_ahead()
        with contextlib.ExitStack() as group_scope:
            try:  # torch.distributed raises RuntimeError for every failure of a group
                group = group_scope.enter_context(process_group.receiver_group(host, port, self._timeout))
            except RuntimeError as error:
                raise TransportError(f"no process group with {host}, port {port}: {_first_line(error)}") from error
            try:
                self._receive_chunks(group)
            except RuntimeError as error:
                raise ConnectionLost(f"the process group failed: {_first_line(error)}") from error
            finally:
                self._receiving.clear()  # an operation that lives on in a traceback could still write into its buffer

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

    def _receive_chunks(self, group: ProcessGroup) -> None:
        destination = _as_tensor(self._delivery.arena.writable())
        while self._requested or self._receiving:
            while self._requested:
                chunk = self._requested.popleft()
                target = destination[chunk.offset : chunk.offset + chunk.length]
                self._receiving.append((chunk, process_group.receive(group, target)))
            chunk, work = self._receiving.popleft()
            work.wait()
            arrival = self._delivery.begin(chunk)
            arrival.advance(chunk.length)
            self._delivery.finish(arrival)
            self._request_ahead()


class _GroupSender(Sender):
    def __init__(self, store: WeightStore, server_host: str, timeouts: Timeouts, pacer: Pacer) -> None:
        super().__init__()
        self._host = server_host
        self._timeout = timeouts.stall
        self._pacer = pacer
        self._listener = process_group.listen(server_host)
        self._port = self._listener.getsockname()[1]
        self._bytes = _as_tensor(store.bytes)
        self._group_scope = contextlib.ExitStack()
        self._group: ProcessGroup | None = None
        self._sending: deque[tuple[int, Work]] = deque()

    @property
    def parameters(self) -> Mapping[str, str | int]:
        return {"host": self._host, "port": self._port}

    def push(self, fetch: Fetch) -> None:
        self.check(fetch, self._bytes.nbytes)
        try:
            if self._group is None:
                group = process_group.sender_group(self._host, self._listener, self._timeout)
                self._group = self._group_scope.enter_context(group)
            self._pacer.wait_for(fetch.length)
            content = self._bytes[fetch.offset : fetch.offset + fetch.length]
            self._sending.append((fetch.length, process_group.send(self._group, content)))
            if len(self._sending) >= IN_FLIGHT:
                length, work = self._sending.popleft()
                work.wait()
                self.note_progress(length)
        except RuntimeError as error:
            raise ConnectionLost(f"the process group failed: {_first_line(error)}") from error

    def close(self) -> None:
        self._sending.clear()
        self._group = None
        self._group_scope.close()
        self._listener.close()


def _as_tensor(memory: memoryview) -> torch.Tensor:
    if not memory.nbytes:
        return torch.empty(0, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch has no read-only tensors; what is read-only is only sent
        return torch.frombuffer(memory, dtype=torch.uint8)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
