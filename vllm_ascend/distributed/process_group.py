"""Stateless process groups of two, made by vLLM beside the groups of the running instance.

`stateless_init_torch_distributed_process_group` leaves torch's global state alone, so a group can be made and dropped
in a thread while inference goes on. The backend is Gloo on the CPU platform; the same call carries HCCL on NPUs through
the platform's hook.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import ProcessGroup

SENDER = 0
RECEIVER = 1


def listen(host: str) -> socket.socket:
    """A bound and listening socket on a free port of `host`, for the store of the group. The caller closes it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, 0), family=family)


@contextlib.contextmanager
def sender_group(host: str, listener: socket.socket, timeout: float) -> Iterator[ProcessGroup]:
    """The sending rank's group. `listener` comes from `listen` and is taken over; `timeout` in seconds."""
    port = listener.getsockname()[1]
    with _stateless_group(host, port, SENDER, listener, timeout) as group:
        yield group


@contextlib.contextmanager
def receiver_group(host: str, port: int, timeout: float) -> Iterator[ProcessGroup]:
    """The receiving rank's group, meeting the sender's at `host` and `port`."""
    with _stateless_group(host, port, RECEIVER, None, timeout) as group:
        yield group


@contextlib.contextmanager
def _stateless_group(
    host: str, port: int, rank: int, listener: socket.socket | None, timeout: float
) -> Iterator[ProcessGroup]:
    from vllm.distributed.utils import stateless_init_torch_distributed_process_group

    with _stdout.kept():
        pair: Any = stateless_init_torch_distributed_process_group(
            host=host,
            port=port,
            rank=rank,
            world_size=2,
            backend="gloo",
            return_store=True,
            listen_socket=listener,
            timeout=timedelta(seconds=timeout),
        )
    group, _store = pair  # the store must outlive the group's last operation
    try:
        yield group
    finally:
        group.shutdown()


class _Stdout:
    """Standard output, which vLLM sends to /dev/null while it makes a Gloo group, and then back where it was.

    When two threads make groups, the second would take /dev/null for where it was, and nothing would ever be printed
    again. So whoever leaves last puts back what was there before the first came.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._original = -1

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        with self._lock:
            if not self._users:
                self._original = os.dup(1)
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    os.dup2(self._original, 1)
                    os.close(self._original)


_stdout = _Stdout()


def send(group: ProcessGroup, tensor: torch.Tensor) -> torch.distributed.Work:
    """Starts sending `tensor` to the receiver; it must stay unchanged until the work is waited for."""
    return group.send([tensor], RECEIVER, 0)


def receive(group: ProcessGroup, tensor: torch.Tensor) -> torch.distributed.Work:
    """Starts receiving into `tensor`."""
    return group.recv([tensor], SENDER, 0)
