"""What this process lacks: told as that, without asking a source again for it, and without holding what is not used."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import os
import resource
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from support.peers.impostor import Impostor
from support.peers.strangers import Line
from support.sources import SMALL, Tensors, client_for, fetch, serving
from vllm_ascend.model_loader.netloader.errors import SourcesExhausted, UnsupportedModel
from vllm_ascend.model_loader.netloader.transport.base import Timeouts
from vllm_ascend.model_loader.netloader.transport.in_process import InProcessTransport
from vllm_ascend.model_loader.netloader.transport.registry import transports
from vllm_ascend.model_loader.netloader.weights.arena import Arena, allocate
from vllm_ascend.model_loader.netloader.weights.manifest import Manifest
from vllm_ascend.model_loader.netloader.weights.memory import Memory
from vllm_ascend.model_loader.netloader.wire import greeting
from vllm_ascend.model_loader.netloader.wire.channel import connect

MEGABYTE = 1 << 20
TCP = transports(["tcp"])
SHARED_THEN_TCP = transports(["shared_memory", "tcp"])

pytestmark = pytest.mark.timeout(60)


@contextlib.contextmanager
def private_memory_limited_to(spare: int) -> Iterator[None]:
    """No more than `spare` bytes beside what this process has: of private writable mappings, as RLIMIT_DATA counts."""
    status = Path("/proc/self/status").read_text()
    used = next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmData"))
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (used + spare, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def test_shared_memory_that_this_process_may_not_map_leads_to_tcp_from_the_same_source() -> None:
    large = Tensors({"w": torch.zeros(192 * MEGABYTE, dtype=torch.uint8)})
    with serving(large, SHARED_THEN_TCP) as (_, source), private_memory_limited_to(128 * MEGABYTE):
        client, fetched = fetch(large, SHARED_THEN_TCP, source)
    assert (fetched.source, fetched.transport) == (source, "tcp")
    (attempt,) = client.attempts
    assert attempt.transport == "shared_memory"
    assert attempt.reason.startswith(f"this process cannot map {large.manifest.nbytes} bytes of shared memory: ")
    assert "RLIMIT_DATA" in attempt.reason
    fetched.memory.close()


FORBIDDEN = {
    errno.EPERM: "this process may not make or map memory files",
    errno.ENOSYS: "this process may not make or map memory files",
    errno.ENOMEM: "this process may have no more memory",
    errno.EMFILE: "this process has no file descriptor left",
}


@pytest.mark.parametrize(("number", "reason"), FORBIDDEN.items(), ids=errno.errorcode.get)
def test_what_keeps_this_process_from_having_an_arena_is_named(
    number: int, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "memfd_create", refuse)
    with pytest.raises(UnsupportedModel, match=f"no arena for {SMALL.manifest.nbytes} bytes of weights: {reason}"):
        allocate(SMALL.manifest)


def test_a_process_without_descriptors_does_not_blame_its_source(monkeypatch: pytest.MonkeyPatch) -> None:

    def run_out(endpoint: Any, timeout: float) -> Any:
        if next(calls) > 0:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return connect(endpoint, timeout)

    calls = iter(range(100))
    monkeypatch.setattr(greeting, "connect", run_out)
    with serving(SMALL, TCP) as (_, source), pytest.raises(SourcesExhausted) as error:
        fetch(SMALL, TCP, source)
    assert error.value.reasons == (f"{source} by tcp: this process cannot connect: Too many open files",)


def test_a_process_without_threads_does_not_blame_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith("netloader-tcp"):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with serving(SMALL, [*TCP, InProcessTransport()]) as (_, source):
        client, fetched = fetch(SMALL, [*TCP, InProcessTransport()], source)
    assert fetched.transport == "in_process"
    assert [attempt.reason for attempt in client.attempts] == [
        "this process cannot start threads: can't start new thread"
    ]


def test_pages_are_made_at_first_touch_where_no_thread_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with contextlib.closing(allocate(SMALL.manifest)) as memory:
        memory.writable()[:] = bytes(range(256)) * (SMALL.manifest.nbytes // 256) + bytes(SMALL.manifest.nbytes % 256)
        memory.stop_making_pages()


HALF = Tensors({"w": torch.zeros(24 * MEGABYTE, dtype=torch.uint8)})


def half_and_no_more(line: Line, heard: dict[str, Any]) -> None:
    """Sends the first chunks and hangs up in the middle of another."""
    line.send(bytes(heard["length"] // 2))
    line.reset()


@pytest.fixture
def without_cycle_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("without_cycle_collector")
def test_what_a_failed_load_has_filled_is_free_at_once() -> None:
    made: list[tuple[weakref.ref[Memory], int]] = []

    def allocate_and_watch(manifest: Manifest) -> Memory:
        memory = Arena.create(manifest.nbytes)
        made.append((weakref.ref(memory), os.dup(memory.descriptor)))
        return memory

    with Impostor({"Fetch": half_and_no_more}, HALF) as impostor:
        client = client_for(HALF, TCP, allocate=allocate_and_watch)
        with pytest.raises(SourcesExhausted):
            client.fetch([impostor.endpoint])
        del client
    ((memory, descriptor),) = made
    assert os.fstat(descriptor).st_blocks == 0
    os.close(descriptor)
    assert memory() is None


def test_what_is_held_elsewhere_is_not_discarded() -> None:
    with contextlib.closing(SMALL.store().memory) as memory:
        assert isinstance(memory, Arena)
        adopted = Arena.adopt(os.dup(memory.descriptor), memory.nbytes)
        adopted.discard()
        adopted.discard()
        SMALL.assert_in(memory)


def test_the_memory_that_was_handed_over_is_not_inherited_by_children() -> None:
    kind = transports(["shared_memory"])
    with serving(SMALL, kind) as (_, source):
        _, fetched = fetch(SMALL, kind, source)
    assert fetched.memory.descriptor is not None
    assert fcntl.fcntl(fetched.memory.descriptor, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    fetched.memory.close()


def dripping(pieces: int, pause: float) -> Any:
    def drip(line: Line, heard: dict[str, Any]) -> None:
        """All that is asked for, in so many pieces."""
        content = line_bytes[heard["offset"] : heard["offset"] + heard["length"]]
        step = -(-len(content) // pieces)
        for begin in range(0, len(content), step):
            line.send(content[begin : begin + step])
            time.sleep(pause)

    line_bytes = bytes(SMALL.store().bytes[:])
    return drip


def test_a_source_that_drips_is_left_for_one_that_does_not() -> None:
    with Impostor({"Fetch": dripping(300, 0.02)}) as source, serving(SMALL, TCP) as (_, healthy):
        client, fetched = fetch(
            SMALL, TCP, source.endpoint, healthy, timeouts=Timeouts(5.0, 0.3), min_bandwidth=64 << 10
        )
    SMALL.assert_in(fetched.memory)
    assert fetched.source == healthy
    (attempt,) = client.attempts
    assert "less than MIN_BANDWIDTH, 65536 bytes per second, while there is another way" in attempt.reason


def test_a_source_that_drips_is_left_for_the_disk() -> None:
    with Impostor({"Fetch": dripping(300, 0.02)}) as source, pytest.raises(SourcesExhausted) as error:
        fetch(SMALL, TCP, source.endpoint, timeouts=Timeouts(5.0, 0.3), min_bandwidth=64 << 10)
    assert len(error.value.reasons) == 1  # and not asked again


def test_a_source_that_drips_is_kept_where_there_is_no_other_way() -> None:
    with Impostor({"Fetch": dripping(40, 0.02)}) as source:
        client, fetched = fetch(
            SMALL, TCP, source.endpoint, timeouts=Timeouts(5.0, 0.3), min_bandwidth=64 << 10, disk_remains=False
        )
    SMALL.assert_in(fetched.memory)
    assert client.attempts == []


def test_a_source_that_drips_is_asked_again_when_the_others_have_failed_and_there_is_no_disk() -> None:
    with serving(SMALL, TCP) as (_, gone):
        pass
    with Impostor({"Fetch": dripping(40, 0.02)}) as source:
        client, fetched = fetch(
            SMALL, TCP, source.endpoint, gone, timeouts=Timeouts(5.0, 0.3), min_bandwidth=64 << 10, disk_remains=False
        )
    SMALL.assert_in(fetched.memory)
    assert fetched.source == source.endpoint
    assert [attempt.source for attempt in client.attempts] == [str(source.endpoint), str(gone)]
