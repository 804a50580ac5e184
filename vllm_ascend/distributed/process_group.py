"""Stateless process groups of two, made beside the groups of the running instance.

They leave torch's global state alone, so a group can be made and dropped in a thread while inference goes on. The
backend is Gloo between CPUs, and HCCL between NPUs, through the platform's hook for stateless groups. Both meet in a
store, and the store is a `Rendezvous`: its values travel on a connection that the two ranks have already, so there is
no port for it and no descriptor that two libraries close.

A library may wait for its peer longer than we do (HCCL: HCCL_CONNECT_TIMEOUT), and cannot be interrupted. So a group is
made in a thread of its own, which `meet` leaves behind when its time is up; it holds no weights.

Gloo's group is not made by vLLM's `init_gloo_process_group`: that points the standard output of the whole process to
/dev/null until the peer has come, and lets Gloo listen on whatever address the host's name has. Gloo also reads what
the peer publishes without looking at its lengths, and connects to whatever address it finds there, so
`_require_rank_info` looks first.

An HCCL operation is done by the device: what `wait` of its work waits for is only the stream. So `Pair.finish` watches
the work from the host, with a deadline. A group of HCCL is aborted in the end: shutting down could wait for what never
comes, and whoever leaves has finished what counts. What failed in it is reported by the next synchronisation of the
device, whoever that is; so whoever leaves a group in which something failed takes the report with it.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import ipaddress
import logging
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, Final, Literal, NamedTuple

import torch
from torch.distributed import ProcessGroup, ProcessGroupGloo, Work
from torch.distributed.distributed_c10d import PrefixStore, Store

logger = logging.getLogger(__name__)

SENDER: Final = 0
RECEIVER: Final = 1
BACKENDS: Final = {"cpu": "gloo", "npu": "hccl"}
"""By type of device. No other is here: NCCL's watchdog would end the process when a peer falls silent."""
VALUES_LIMIT: Final = 8
"""Values that the other rank may publish: Gloo has one, HCCL three."""
_POLL_SECONDS: Final = 0.0005
_ABORT_POLL_SECONDS: Final = 0.05
_GLOO_TIMEOUTS_TO_CONNECT: Final = 5
"""For how many of its timeouts Gloo waits for a peer."""
_ADDRESS_BYTES: Final = 136
_RANK_INFO_BYTES: Final = 8 + 8 + _ADDRESS_BYTES + 2 * 8
"""What Gloo publishes, beside the host's name: two lengths, an address, and a number for each rank."""
_HOST_NAME_BYTES: Final = 255
_PATIENCE: Final = 0.2
"""For which part of its time a group waits for another that comes about."""
_coming_about: Final[dict[str, threading.Lock]] = {}
"""By the name of the device."""


class Rendezvous(Store):
    """The store of one group: what one rank sets, the other gets.

    `publish` sends a value to the other rank, and `receive` returns the next one that it has sent, within a time of its
    own. Both are for the thread that makes the group, and only until `close`: what is set later stays here. What they
    raise is kept for `take_failure`, because on its way through a library it becomes a RuntimeError.
    """

    def __init__(self, publish: Callable[[str, bytes], None], receive: Callable[[], tuple[str, bytes]]) -> None:
        super().__init__()
        self._publish = publish
        self._receive = receive
        self._values: dict[str, bytes] = {}
        self._received = 0
        self._open = True
        self._exchanging = threading.Lock()
        self.check_received: Callable[[bytes], None] = lambda _: None
        self._failure: Exception | None = None

    def close(self) -> None:
        """Returns when neither is used any more, which they end by themselves."""
        with self._exchanging:
            self._open = False

    def take_failure(self) -> Exception | None:
        """What went wrong here, if anything did."""
        failure, self._failure = self._failure, None
        return failure

    def set(self, key: str, value: Any) -> None:
        self._values[key] = value
        with self._exchanging, self._failures():
            if self._open:
                self._publish(key, value)

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._values[key]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        for key in keys:
            while key not in self._values:
                with self._exchanging, self._failures():
                    self._take()

    def check(self, keys: list[str]) -> bool:
        return all(key in self._values for key in keys)

    def _take(self) -> None:
        if not self._open:
            raise RuntimeError("the rendezvous is over")
        key, value = self._receive()
        self._received += 1
        if self._received > VALUES_LIMIT or key in self._values:
            raise ValueError(f"the peer published {self._received} values, the last one as {key[:64]!r}")
        self.check_received(value)
        self._values[key] = value

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._failure = error.with_traceback(None)  # whose frames refer to this object
            raise RuntimeError("the rendezvous failed") from None  # and no word of the peer: torch logs it


class Route(NamedTuple):
    """The addresses by which the two ranks have reached each other already."""

    local: str
    peer: str


class Pair:
    """Sender and receiver. For one thread, in which a stream of the thread's own is current if the device has streams.

    Whatever fails raises RuntimeError, as everything of torch.distributed does.
    """

    def __init__(self, group: ProcessGroup, store: Store, device: torch.device, timeout: float) -> None:
        self.device = device
        self._group = group
        self._store = store  # must outlive the group's last operation
        self._timeout = timeout
        self._unfinished: list[Work] = []

    def send(self, tensor: torch.Tensor) -> Work:
        """Starts sending `tensor` to the receiver; it must stay unchanged until the work is finished."""
        return self._begin("send", tensor, RECEIVER)

    def receive(self, tensor: torch.Tensor) -> Work:
        """Starts receiving into `tensor`."""
        return self._begin("recv", tensor, SENDER)

    def finish(self, work: Work, aborted: threading.Event | None = None) -> None:
        """Returns when `work` is done, not only queued.

        Raises RuntimeError where it failed, takes longer than the timeout, or, between NPUs, as soon as it is
        `aborted`.
        """
        if self.device.type != "cpu":
            self._wait_for(work, aborted)
            work.wait()
            self._raise_failures()
        else:
            work.wait(timedelta(seconds=self._timeout))
        self._unfinished.remove(work)

    def leave(self) -> None:
        """Nothing of it reads or writes tensors afterwards."""
        if self.device.type == "cpu":
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
                torch.accelerator.synchronize(self.device)
            except RuntimeError as error:
                logger.warning("left a process group in which an operation had failed: %s", error)

    def _begin(self, operation: Literal["send", "recv"], tensor: torch.Tensor, peer: int) -> Work:
        """HCCL's own `send` and `recv` would not keep to the group's timeout and buffer."""
        work: Work
        if self.device.type == "cpu":
            work = getattr(self._group, operation)([tensor], peer, 0)
        else:
            hccl: Any = self._group._get_backend(self.device)
            work = hccl.batch_isend_irecv([f"i{operation}"], [tensor], [peer])
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
        torch.accelerator.current_stream(self.device).synchronize()


def meet(
    rank: int,
    rendezvous: Rendezvous,
    route: Route,
    device: torch.device,
    *,
    scope: Callable[[], AbstractContextManager[None]],
    timeout: float,
    aborted: threading.Event,
) -> Pair:
    """The group of both ranks, through which a byte has passed already. The caller leaves it.

    `scope` makes device and stream current. Raises RuntimeError where no group comes about within `timeout` seconds, or
    as soon as it is `aborted`. Afterwards the rendezvous is over.
    """
    made: Future[Pair] = Future()

    def make(made: Future[Pair]) -> None:
        try:
            with scope():
                pair = _first_byte(rank, _pair(rank, rendezvous, route, device, timeout))
        except Exception as error:
            made.set_exception(RuntimeError(_first_line(error)))  # the error's frames hold what the library opened
        else:
            made.set_result(pair)

    def leave_late(made: Future[Pair]) -> None:
        if made.exception() is None:
            with scope():
                made.result().leave()

    maker = threading.Thread(target=make, args=(made,), name="netloader-gather", daemon=True)
    deadline = time.monotonic() + timeout
    try:
        with _one_at_a_time(device, _PATIENCE * timeout) if rank == SENDER else contextlib.nullcontext():
            maker.start()
            while not concurrent.futures.wait([made], _ABORT_POLL_SECONDS).done:
                if aborted.is_set() or time.monotonic() > deadline:
                    made.add_done_callback(leave_late)
                    raise RuntimeError("it was given up" if aborted.is_set() else f"it took longer than {timeout:g} s")
            maker.join()  # until then it, too, holds what the library opened
        return made.result()
    finally:
        rendezvous.close()
        del made  # it and the exception that it holds refer to each other


@contextlib.contextmanager
def _one_at_a_time(device: torch.device, patience: float) -> Iterator[None]:
    """Lets one group come about on `device` at a time, unless the one before takes longer than `patience` seconds.

    torch-npu notes every communicator in a list, without a lock. Two threads that do so at the same moment damage the
    memory of the process, which ends it then or later. A peer that does not come, though, holds up nobody: then the
    two are far enough apart. Only senders take turns: they have many receivers, and if both ends did, two processes
    could wait for each other.
    """
    if device.type == "cpu":
        yield
        return
    lock = _coming_about.setdefault(str(device), threading.Lock())
    has_turn = lock.acquire(timeout=patience)
    try:
        yield
    finally:
        if has_turn:
            lock.release()


def _pair(rank: int, rendezvous: Rendezvous, route: Route, device: torch.device, timeout: float) -> Pair:
    if BACKENDS[device.type] == "gloo":
        rendezvous.check_received = functools.partial(_require_rank_info, peer=route.peer)
        group = _gloo_group(rank, rendezvous, route.local, timeout)
    else:
        from vllm.platforms import current_platform

        group = current_platform.stateless_init_device_torch_dist_pg(
            backend=BACKENDS[device.type],
            prefix_store=PrefixStore("group", rendezvous),
            group_rank=rank,
            group_size=2,
            timeout=timedelta(seconds=timeout),
        )
    return Pair(group, rendezvous, device, timeout)


def _gloo_group(rank: int, store: Store, host: str, timeout: float) -> ProcessGroup:
    gloo: Any = ProcessGroupGloo
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname=host, lazy_init=False)]
    options._timeout = timedelta(seconds=timeout / _GLOO_TIMEOUTS_TO_CONNECT)
    options._threads = 1
    try:
        backend = gloo(store, rank, 2, options)
    finally:
        options._devices = []  # the listener ends with the group, and at once where there is none
    backend._set_sequence_number_for_group()
    group = ProcessGroup(store, rank, 2)
    group._set_default_backend(ProcessGroup.BackendType.GLOO)
    group._register_backend(torch.device("cpu"), ProcessGroup.BackendType.GLOO, backend)
    return group


def _require_rank_info(value: bytes, peer: str) -> None:
    """Raises ValueError unless it says, as Gloo does, that a rank listens on the address `peer`."""
    address_at = 8 + int.from_bytes(value[:8], sys.byteorder)
    address = value[address_at + 8 : address_at + 8 + _ADDRESS_BYTES]
    is_whole = len(value) == address_at - 8 + _RANK_INFO_BYTES and address_at - 8 <= _HOST_NAME_BYTES
    if not is_whole or int.from_bytes(value[address_at : address_at + 8], sys.byteorder) != _ADDRESS_BYTES:
        raise ValueError(f"the peer published {len(value)} bytes that are not what Gloo publishes")
    listens_on: dict[int, bytes] = {socket.AF_INET: address[4:8], socket.AF_INET6: address[8:24]}
    family = int.from_bytes(address[:2], sys.byteorder)
    if listens_on.get(family) != ipaddress.ip_address(peer).packed:
        raise ValueError(f"the peer's Gloo does not listen on {peer}, where the peer is: process_group needs no NAT")


def _first_byte(rank: int, pair: Pair) -> Pair:
    """What libraries put off until the first operation is done afterwards."""
    byte = torch.zeros(1, dtype=torch.uint8, device=pair.device)
    try:
        pair.finish(pair.send(byte) if rank == SENDER else pair.receive(byte))
    except BaseException:
        pair.leave()
        raise
    return pair


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
