"""Stateless process groups of two, made by vLLM beside the groups of the running instance.

`stateless_init_torch_distributed_process_group` leaves torch's global state alone, so a group can be made and dropped
in a thread while inference goes on. The backend is Gloo between CPUs, and HCCL between NPUs, through the platform's
hook.

An HCCL operation is done by the device: what `wait` of its work waits for is only the stream. So `Pair.finish` watches
the work from the host, with a deadline. A group of HCCL is aborted in the end: shutting down could wait for what never
comes, and whoever leaves has finished what counts. What failed in it is reported by the next synchronisation of the
device, whoever that is; so whoever leaves a group in which something failed takes the report with it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, Final

import torch
from torch.distributed import ProcessGroup, Work

logger = logging.getLogger(__name__)

SENDER: Final = 0
RECEIVER: Final = 1
BACKENDS: Final = {"cpu": "gloo", "npu": "hccl"}
"""By type of device."""
_POLL_SECONDS: Final = 0.0005


def listen(host: str) -> socket.socket:
    """A bound and listening socket on a free port of `host`, for the store of the group. The caller closes it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, 0), family=family)


class Pair:
    """Sender and receiver. For one thread, in which a stream of the thread's own is current if the device has streams.

    Whatever fails raises RuntimeError, as everything of torch.distributed does.
    """

    def __init__(self, group: ProcessGroup, device: torch.device, timeout: float) -> None:
        self._group = group
        self._device = device
        self._timeout = timeout
        self._unfinished: list[Work] = []

    def send(self, tensor: torch.Tensor) -> Work:
        """Starts sending `tensor` to the receiver; it must stay unchanged until the work is finished."""
        return self._begun(self._group.send([tensor], RECEIVER, 0))

    def receive(self, tensor: torch.Tensor) -> Work:
        """Starts receiving into `tensor`."""
        return self._begun(self._group.recv([tensor], SENDER, 0))

    def finish(self, work: Work, aborted: threading.Event | None = None) -> None:
        """Returns when `work` is done, not only queued.

        Raises RuntimeError where it failed, takes longer than the timeout, or, between NPUs, as soon as it is
        `aborted`.
        """
        if self._device.type != "cpu":
            self._wait_for(work, aborted)
        work.wait()
        if self._device.type != "cpu":
            self._raise_failures()
        self._unfinished.remove(work)

    def leave(self) -> None:
        """Nothing of it reads or writes tensors afterwards."""
        if self._device.type == "cpu":
            self._group.shutdown()
            return
        failed = any(not work.is_completed() for work in self._unfinished)
        try:
            for work in [] if failed else self._unfinished:
                work.wait()
            self._raise_failures()
        except RuntimeError:
            failed = True
        self._group.abort()
        if failed:
            try:
                torch.accelerator.synchronize(self._device)
            except RuntimeError as error:
                logger.warning("left a process group in which an operation had failed: %s", error)

    def _begun(self, work: Work) -> Work:
        self._unfinished.append(work)
        return work

    def _wait_for(self, work: Work, aborted: threading.Event | None) -> None:
        deadline = time.monotonic() + self._timeout
        while not work.is_completed():
            if time.monotonic() > deadline:
                raise RuntimeError(f"an operation of the process group is not done after {self._timeout:g} s")
            if aborted is not None and aborted.is_set():
                raise RuntimeError("the operation was given up")
            time.sleep(_POLL_SECONDS)

    def _raise_failures(self) -> None:
        """An operation that has failed is completed, too; the stream that waited for it knows."""
        torch.accelerator.current_stream(self._device).synchronize()


@contextlib.contextmanager
def sender_group(host: str, listener: socket.socket, device: torch.device, timeout: float) -> Iterator[Pair]:
    """The sending rank's group. `listener` comes from `listen` and is taken over; `timeout` in seconds."""
    port = listener.getsockname()[1]
    with _stateless_group((host, port), SENDER, listener, device, timeout) as pair:
        yield pair


@contextlib.contextmanager
def receiver_group(host: str, port: int, device: torch.device, timeout: float) -> Iterator[Pair]:
    """The receiving rank's group, meeting the sender's at `host` and `port`."""
    with _stateless_group((host, port), RECEIVER, None, device, timeout) as pair:
        yield pair


@contextlib.contextmanager
def _stateless_group(
    address: tuple[str, int], rank: int, listener: socket.socket | None, device: torch.device, timeout: float
) -> Iterator[Pair]:
    from vllm.distributed.utils import stateless_init_torch_distributed_process_group

    with _stdout.kept():
        made: Any = stateless_init_torch_distributed_process_group(
            host=address[0],
            port=address[1],
            rank=rank,
            world_size=2,
            backend=BACKENDS[device.type],
            return_store=True,
            listen_socket=listener,
            timeout=timedelta(seconds=timeout),
        )
    group, _store = made  # the store must outlive the group's last operation
    pair = Pair(group, device, timeout)
    try:
        yield pair
    finally:
        pair.leave()


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
