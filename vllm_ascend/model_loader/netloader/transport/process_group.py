"""Between accelerators, and wherever a collective library knows the best way: send and receive in a process group.

For each session the server binds a port for the group's store before it tells the client (no port race) and both make
a group of two. The address space is sent in order in buckets: small tensors share one, large ones are cut, and several
are in flight at once, so that neither side waits for the other after each tensor.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch.distributed import Work

from vllm_ascend.distributed import process_group
from vllm_ascend.model_loader.netloader.arena import Arena
from vllm_ascend.model_loader.netloader.channel import ConnectionLost
from vllm_ascend.model_loader.netloader.errors import TransportError
from vllm_ascend.model_loader.netloader.manifest import chunks
from vllm_ascend.model_loader.netloader.transport.base import CHUNK_BYTES, Reception, Sender, Timeouts, Transport
from vllm_ascend.model_loader.netloader.weights import WeightStore

IN_FLIGHT: Final = 4


class ProcessGroupTransport(Transport):
    name = "process_group"

    def sender(self, store: WeightStore, server_host: str, timeouts: Timeouts) -> Sender:
        return _GroupSender(store, server_host, timeouts)

    def receive(self, reception: Reception) -> Arena:
        arena = reception.allocate(mapped=True)
        host, port = reception.text("host"), reception.number("port")
        with contextlib.ExitStack() as group_scope:
            try:  # torch.distributed raises RuntimeError for every failure of a group
                group = group_scope.enter_context(process_group.receiver_group(host, port, reception.timeouts.stall))
            except RuntimeError as error:
                raise TransportError(f"no process group with {host}, port {port}: {_first_line(error)}") from error
            destination = _as_tensor(arena.writable())
            try:
                _in_flight(
                    reception.nbytes,
                    lambda offset, length: process_group.receive(group, destination[offset : offset + length]),
                    reception.progress,
                )
            except RuntimeError as error:
                raise ConnectionLost(f"the process group failed: {_first_line(error)}") from error
        return arena


class _GroupSender(Sender):
    def __init__(self, store: WeightStore, server_host: str, timeouts: Timeouts) -> None:
        super().__init__()
        self._host = server_host
        self._timeout = timeouts.stall
        self._listener = process_group.listen(server_host)
        self._port = self._listener.getsockname()[1]
        self._bytes = _as_tensor(store.bytes)

    @property
    def parameters(self) -> Mapping[str, str | int]:
        return {"host": self._host, "port": self._port}

    def run(self) -> None:
        try:
            with process_group.sender_group(self._host, self._listener, self._timeout) as group:
                _in_flight(
                    self._bytes.nbytes,
                    lambda offset, length: process_group.send(group, self._bytes[offset : offset + length]),
                    lambda _: self.note_progress(),
                )
        except RuntimeError as error:
            raise ConnectionLost(f"the process group failed: {_first_line(error)}") from error

    def close(self) -> None:
        self._listener.close()


def _as_tensor(memory: memoryview) -> torch.Tensor:
    if not memory.nbytes:
        return torch.empty(0, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch has no read-only tensors; what is read-only is only sent
        return torch.frombuffer(memory, dtype=torch.uint8)


def _in_flight(nbytes: int, start: Callable[[int, int], Work], progress: Callable[[int], None]) -> None:
    """Starts one operation per bucket, at most IN_FLIGHT at a time, and waits for all."""
    pending: deque[tuple[int, Work]] = deque()
    try:
        for offset, length in chunks(nbytes, CHUNK_BYTES):
            pending.append((length, start(offset, length)))
            if len(pending) >= IN_FLIGHT:
                _finish(pending, progress)
        while pending:
            _finish(pending, progress)
    finally:
        pending.clear()  # an operation that lives on in a traceback could still write into its buffer


def _finish(pending: deque[tuple[int, Work]], progress: Callable[[int], None]) -> None:
    length, work = pending.popleft()
    work.wait()
    progress(length)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
