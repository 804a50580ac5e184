"""One examination that every transport passes: the same server, client and sockets, whatever moves the bytes."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence

import pytest
import torch
from netloader.sources import SHORT, SMALL, Tensors, fetch, serving

from vllm_ascend.model_loader.netloader.digests import CHUNK_BYTES
from vllm_ascend.model_loader.netloader.errors import SourcesExhausted
from vllm_ascend.model_loader.netloader.pacing import Pacer
from vllm_ascend.model_loader.netloader.protocol import Fetch, Hello, frame
from vllm_ascend.model_loader.netloader.transport import transports
from vllm_ascend.model_loader.netloader.transport.base import Timeouts, Transport
from vllm_ascend.model_loader.netloader.transport.memory import MemoryTransport

KINDS = {
    "memory": (MemoryTransport(),),
    "shared_memory": transports(["shared_memory"]),
    "tcp": transports(["tcp"]),
    "process_group": transports(["process_group"]),
}


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def kind(request: pytest.FixtureRequest) -> Sequence[Transport]:
    chosen: Sequence[Transport] = request.param
    return chosen


SHAPES = {
    "one element": [(1,)],
    "odd sizes": [(3,), (17, 5), (1, 1, 1), (63,)],
    "empty tensors between others": [(4,), (0, 8), (7,), (0,)],
    "only empty tensors": [(0,)],
    "many small tensors": [(n % 13 + 1,) for n in range(400)],
    "several chunks": [(CHUNK_BYTES // 4 + 5,), (3,), (CHUNK_BYTES // 2,)],
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())
def test_all_bytes_arrive(kind: Sequence[Transport], shapes: list[tuple[int, ...]]) -> None:
    tensors = Tensors.of_shapes(*shapes)
    with serving(tensors, kind) as (_, source):
        client, fetched = fetch(tensors, kind, source)
    tensors.assert_in(fetched.arena)
    assert (fetched.transport, fetched.source) == (kind[0].name, source)
    assert client.attempts == []


def test_a_transposed_tensor_keeps_its_memory_order(kind: Sequence[Transport]) -> None:
    tensors = Tensors({"weight": torch.arange(35.0).reshape(5, 7).t(), "bias": torch.ones(5)})
    with serving(tensors, kind) as (_, source):
        _, fetched = fetch(tensors, kind, source)
    tensors.assert_in(fetched.arena)
    assert fetched.arena.tensor(tensors.manifest.tensors[0]).stride() == (1, 7)


def test_progress_adds_up_to_all_bytes(kind: Sequence[Transport]) -> None:
    tensors = Tensors.of_shapes((CHUNK_BYTES // 4 + 5,), (3,))
    moved: list[int] = []
    with serving(tensors, kind) as (_, source):
        fetch(tensors, kind, source, progress=moved.append)
    assert sum(moved) == tensors.manifest.nbytes


def test_the_received_arena_is_served_in_turn(kind: Sequence[Transport]) -> None:
    with serving(SMALL, kind) as (_, source):
        _, fetched = fetch(SMALL, kind, source)
    if not fetched.arena.servable:
        fetched.arena.seal()
    assert fetched.arena.servable
    SMALL.assert_in(fetched.arena)


def test_sessions_follow_one_another(kind: Sequence[Transport]) -> None:
    with serving(SMALL, kind) as (_, source):
        for _ in range(5):
            _, fetched = fetch(SMALL, kind, source)
            SMALL.assert_in(fetched.arena)


def test_clients_are_served_at_the_same_time(kind: Sequence[Transport]) -> None:
    tensors = Tensors.of_shapes((200_000,), (3,))
    arenas = []
    with serving(tensors, kind) as (_, source):
        threads = [
            threading.Thread(target=lambda: arenas.append(fetch(tensors, kind, source)[1].arena)) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(arenas) == 4
    for arena in arenas:
        tensors.assert_in(arena)


def test_a_server_that_closes_fails_the_source_and_not_the_client(kind: Sequence[Transport]) -> None:
    with serving(SMALL, kind) as (_, source):
        pass
    with pytest.raises(SourcesExhausted, match="no connection"):
        fetch(SMALL, kind, source)


def test_the_sender_closes_twice(kind: Sequence[Transport]) -> None:
    store = SMALL.store()
    sender = kind[0].sender(store, "127.0.0.1", SHORT, Pacer(None))
    sender.close()
    sender.close()
    store.close()


def test_descriptors_return_to_their_start(kind: Sequence[Transport]) -> None:
    def run() -> None:
        with serving(SMALL, kind) as (_, source):
            _, fetched = fetch(SMALL, kind, source)
            fetched.arena.close()

    run()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        run()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_tcp_refuses_a_range_beyond_the_weights() -> None:
    kind = transports(["tcp"])
    with serving(SMALL, kind, timeouts=Timeouts(2, 2)) as (_, source):
        import socket

        with socket.create_connection(source, timeout=5) as connection:
            connection.sendall(frame(Hello()))
            assert connection.recv(4096)
            connection.sendall(frame(Fetch(SMALL.manifest.nbytes, 1)))
            assert connection.recv(4096) == b""  # Fetch before Attach ends the connection
        _, fetched = fetch(SMALL, kind, source)
        SMALL.assert_in(fetched.arena)


def test_groups_that_are_made_at_the_same_time_leave_standard_output_alone() -> None:
    """vLLM points it elsewhere while it makes one; client and server of this test make theirs in one process."""
    kind = transports(["process_group"])
    before = os.readlink("/proc/self/fd/1")
    with serving(SMALL, kind) as (_, source):
        for _ in range(3):
            fetch(SMALL, kind, source)
    assert os.readlink("/proc/self/fd/1") == before
