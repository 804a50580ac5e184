"""One examination that every transport passes: the same server, client and sockets, whatever moves the bytes."""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from support.sources import PATIENT, SHORT, SMALL, Tensors, fetch, serving
from vllm_ascend.distributed.process_group import BACKENDS
from vllm_ascend.model_loader.netloader.errors import SourcesExhausted
from vllm_ascend.model_loader.netloader.model.device_memory import tensor_in
from vllm_ascend.model_loader.netloader.transport.base import Timeouts, Transport
from vllm_ascend.model_loader.netloader.transport.digests import CHUNK_BYTES
from vllm_ascend.model_loader.netloader.transport.in_process import InProcessTransport
from vllm_ascend.model_loader.netloader.transport.registry import transports
from vllm_ascend.model_loader.netloader.weights.memory import Memory
from vllm_ascend.model_loader.netloader.wire.conversation import frame
from vllm_ascend.model_loader.netloader.wire.messages import Fetch, Hello
from vllm_ascend.model_loader.netloader.wire.pacing import Pacer

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Setting:
    """Where weights are served and wanted, by which transports; None for an arena.

    `client_kind` is for transports that differ by device.
    """

    kind: Sequence[Transport]
    served_on: torch.device | None = None
    wanted_on: torch.device | None = None
    client_kind: Sequence[Transport] | None = None

    @property
    def wanting(self) -> Sequence[Transport]:
        return self.client_kind or self.kind

    def tensors(self, by_name: dict[str, torch.Tensor]) -> Tensors:
        return Tensors(by_name, self.served_on, self.wanted_on)

    def of_shapes(self, *shapes: tuple[int, ...]) -> Tensors:
        return self.tensors(Tensors.of_shapes(*shapes).by_name)

    @property
    def small(self) -> Tensors:
        return self.tensors(SMALL.by_name)


SETTINGS = {
    "in_process": Setting((InProcessTransport(),)),
    "shared_memory": Setting(transports(["shared_memory"])),
    "tcp": Setting(transports(["tcp"])),
    "process_group": Setting(transports(["process_group"])),
    "in_process, live": Setting((InProcessTransport(),), CPU, CPU),
    "tcp, live": Setting(transports(["tcp"]), CPU, CPU),
    "tcp, from live to an arena": Setting(transports(["tcp"]), CPU, None),
    "tcp, from an arena to live": Setting(transports(["tcp"]), None, CPU),
    "process_group, live": Setting(transports(["process_group"]), CPU, CPU),
}


def settings_between(first: torch.device, second: torch.device) -> dict[str, Setting]:
    """With weights on an accelerator."""
    tcp, kind = transports(["tcp"]), first.type.upper()
    by_tcp = {
        f"tcp, {kind} to {kind}": Setting(tcp, first, second),
        f"tcp, {kind} to arena": Setting(tcp, first, None),
        f"tcp, arena to {kind}": Setting(tcp, None, second),
    }
    if first.type not in BACKENDS:
        return by_tcp
    sends, receives = transports(["process_group"], str(first)), transports(["process_group"], str(second))
    library = BACKENDS[first.type].upper()
    return by_tcp | {
        library: Setting(sends, first, second, receives),
        f"{library}, from a reloaded arena": Setting(sends, None, second, receives),
    }


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Those between the first two devices of the type that is asked for, or of NPUs where there are any."""
    if "setting" not in metafunc.fixturenames:
        return
    chosen: dict[str, Any] = dict(SETTINGS)
    has_npus = importlib.util.find_spec("torch_npu") and torch.accelerator.is_available()
    device = metafunc.config.getoption("--device", default=None) or ("npu" if has_npus else None)
    if device is not None:
        count = getattr(torch, device).device_count() if hasattr(torch, device) else 0
        missing = pytest.mark.skipif(not count, reason=f"torch sees no {device} device here")
        devices = [torch.device(device, index) for index in (0, int(count > 1))] if count else [CPU, CPU]
        chosen = settings_between(*devices) if count else {device: pytest.param(None, marks=missing)}
    metafunc.parametrize("setting", chosen.values(), ids=chosen.keys())


_acquainted: list[Setting] = []


@pytest.fixture(autouse=True)
def acquainted(request: pytest.FixtureRequest) -> None:
    """The first group of an accelerator loads libraries for seconds; the tests' timeouts are for what comes after."""
    setting = request.getfixturevalue("setting") if "setting" in request.fixturenames else None
    if setting is None or setting.wanted_on in {None, CPU} or setting in _acquainted:
        return
    _acquainted.append(setting)
    with serving(setting.small, setting.kind, timeouts=PATIENT) as (_, source):
        fetch(setting.small, setting.wanting, source, timeouts=PATIENT)


SHAPES = {
    "one element": [(1,)],
    "odd sizes": [(3,), (17, 5), (1, 1, 1), (63,)],
    "empty tensors between others": [(4,), (0, 8), (7,), (0,)],
    "only empty tensors": [(0,)],
    "many small tensors": [(n % 13 + 1,) for n in range(400)],
    "several chunks": [(CHUNK_BYTES // 4 + 5,), (3,), (CHUNK_BYTES // 2,)],
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())
def test_all_bytes_arrive(setting: Setting, shapes: list[tuple[int, ...]]) -> None:
    tensors = setting.of_shapes(*shapes)
    with serving(tensors, setting.kind) as (_, source):
        client, fetched = fetch(tensors, setting.wanting, source)
    tensors.assert_in(fetched.memory)
    assert (fetched.transport, fetched.source) == (setting.kind[0].name, source)
    assert client.attempts == []


def test_a_transposed_tensor_keeps_its_memory_order(setting: Setting) -> None:
    tensors = setting.tensors({"weight": torch.arange(35.0).reshape(5, 7).t(), "bias": torch.ones(5)})
    with serving(tensors, setting.kind) as (_, source):
        _, fetched = fetch(tensors, setting.wanting, source)
    tensors.assert_in(fetched.memory)
    assert tensor_in(fetched.memory, tensors.manifest.tensors[0]).stride() == (1, 7)


def test_progress_adds_up_to_all_bytes(setting: Setting) -> None:
    tensors = setting.of_shapes((CHUNK_BYTES // 4 + 5,), (3,))
    moved: list[int] = []
    with serving(tensors, setting.kind) as (_, source):
        fetch(tensors, setting.wanting, source, progress=moved.append)
    assert sum(moved) == tensors.manifest.nbytes


def test_what_was_received_is_served_in_turn(setting: Setting) -> None:
    with serving(setting.small, setting.kind) as (_, source):
        _, fetched = fetch(setting.small, setting.wanting, source)
    if not fetched.memory.servable:
        fetched.memory.seal()
    assert fetched.memory.servable
    setting.small.assert_in(fetched.memory)


def test_sessions_follow_one_another(setting: Setting) -> None:
    with serving(setting.small, setting.kind) as (_, source):
        for _ in range(5):
            _, fetched = fetch(setting.small, setting.wanting, source)
            setting.small.assert_in(fetched.memory)


def test_clients_are_served_at_the_same_time(setting: Setting) -> None:
    tensors = setting.of_shapes((200_000,), (3,))
    memories: list[Memory] = []
    with serving(tensors, setting.kind) as (_, source):

        def run() -> None:
            memories.append(fetch(tensors, setting.wanting, source)[1].memory)

        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(memories) == 4
    for memory in memories:
        tensors.assert_in(memory)


def test_a_server_that_closes_fails_the_source_and_not_the_client(setting: Setting) -> None:
    with serving(setting.small, setting.kind) as (_, source):
        pass
    with pytest.raises(SourcesExhausted, match="no connection"):
        fetch(setting.small, setting.wanting, source)


def test_the_sender_closes_twice(setting: Setting) -> None:
    store = setting.small.store()
    sender = setting.kind[0].sender(store, SHORT, Pacer(None))
    sender.close()
    sender.close()
    store.close()


def test_descriptors_return_to_their_start(setting: Setting) -> None:
    def run() -> None:
        with serving(setting.small, setting.kind) as (_, source):
            _, fetched = fetch(setting.small, setting.wanting, source)
            fetched.memory.close()

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
        SMALL.assert_in(fetched.memory)


def test_a_process_group_needs_a_library_for_its_device() -> None:
    elsewhere = torch.device("cuda", 0)
    by_tcp = transports(["tcp"], str(elsewhere))
    assert [transport.offer().transport for transport in by_tcp] == ["tcp"]
