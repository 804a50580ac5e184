"""Stateless process groups of two, made by vLLM beside the groups of the running instance.

`stateless_init_torch_distributed_process_group` leaves torch's global state alone, so a group can be made and dropped
in a thread while inference goes on. The backend is Gloo between CPUs, and HCCL between NPUs, through the platform's
hook.

An HCCL operation is done by the device: what `wait` of its work waits for is only the stream. So `finish` watches the
work from the host, with a deadline, and a group of HCCL is aborted: shutting down could wait for what never comes, and
whoever leaves has finished what counts.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, Final

import torch
from torch.distributed import ProcessGroup

SENDER: Final = 0
RECEIVER: Final = 1
BACKENDS: Final = {"cpu": "gloo", "npu": "hccl"}
"""By type of device."""
_POLL_SECONDS: Final = 0.0005


def listen(host: str) -> socket.socket:
    """A bound and listening socket on a free port of `host`, for the store of the group. The caller closes it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, 0), family=family)


@contextlib.contextmanager
def sender_group(host: str, listener: socket.socket, device: torch.device, timeout: float) -> Iterator[ProcessGroup]:
    """The sending rank's group. `listener` comes from `listen` and is taken over; `timeout` in seconds."""
    port = listener.getsockname()[1]
    with _stateless_group((host, port), SENDER, listener, device, timeout) as group:
        yield group


@contextlib.contextmanager
def receiver_group(host: str, port: int, device: torch.device, timeout: float) -> Iterator[ProcessGroup]:
    """The receiving rank's group, meeting the sender's at `host` and `port`."""
    with _stateless_group((host, port), RECEIVER, None, device, timeout) as group:
        yield group


@contextlib.contextmanager
def _stateless_group(
    address: tuple[str, int], rank: int, listener: socket.socket | None, device: torch.device, timeout: float
) -> Iterator[ProcessGroup]:
    """Raises RuntimeError, as torch.distributed does for every failure of a group."""
    from vllm.distributed.utils import stateless_init_torch_distributed_process_group

    with _stdout.kept():
        pair: Any = stateless_init_torch_distributed_process_group(
            host=address[0],
            port=address[1],
            rank=rank,
            world_size=2,
            backend=BACKENDS[device.type],
            return_store=True,
            listen_socket=listener,
            timeout=timedelta(seconds=timeout),
        )
    group, _store = pair  # the store must outlive the group's last operation
    try:
        yield group
    finally:
        if device.type == "cpu":
            group.shutdown()
        else:
            group.abort()


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
    """Starts sending `tensor` to the receiver; it must stay unchanged until the work is finished."""
    return group.send([tensor], RECEIVER, 0)


def receive(group: ProcessGroup, tensor: torch.Tensor) -> torch.distributed.Work:
    """Starts receiving into `tensor`."""
    return group.recv([tensor], SENDER, 0)


def finish(
    work: torch.distributed.Work, device: torch.device, timeout: float, aborted: threading.Event | None = None
) -> None:
    """Returns when `work` is done, not only queued.

    Raises RuntimeError where it failed, takes longer than `timeout`, or, between NPUs, as soon as it is `aborted`.
    """
    if device.type == "cpu":
        work.wait()
        return
    deadline = time.monotonic() + timeout
    while not work.is_completed():
        if time.monotonic() > deadline:
            raise RuntimeError(f"an operation of the process group is not done after {timeout:g} s")
        if aborted is not None and aborted.is_set():
            raise RuntimeError("the operation was given up")
        time.sleep(_POLL_SECONDS)
    work.wait()
    torch.accelerator.current_stream(device).synchronize()  # an operation that failed is completed, too
