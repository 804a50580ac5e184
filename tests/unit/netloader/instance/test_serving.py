"""Engines of one process and their listeners, from before a load to the end of its model."""

from __future__ import annotations

import gc
import socket
import weakref
from dataclasses import replace

import pytest
from torch import nn

from support.engines import TRANSPORTS, Engine, StuckTransport, identity
from support.peers.strangers import Intruder
from support.ports import free_port
from support.sources import SMALL, Tensors, fetch
from support.wait import wait_until
from vllm_ascend.model_loader.netloader.client.inquiry import inquire
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import ConfigError, SourceError, SourcesExhausted
from vllm_ascend.model_loader.netloader.instance import serving
from vllm_ascend.model_loader.netloader.traits import traits_of
from vllm_ascend.model_loader.netloader.transport.in_process import InProcessTransport
from vllm_ascend.model_loader.netloader.weights.identity import RankCoordinates
from vllm_ascend.model_loader.netloader.wire.access import Access
from vllm_ascend.model_loader.netloader.wire.messages import Join

pytestmark = pytest.mark.timeout(60)

OTHER = Tensors.of_shapes((16, 8), (5,), (33, 7), seed=1)
"""The layout of SMALL, other weights."""


def taken(tensors: Tensors, source: Endpoint, name: str = "org/model", role: str = "target") -> None:
    """Fails the test unless `source` delivers these very tensors under that name."""
    _, fetched = fetch(tensors.request(identity(name, role)), TRANSPORTS, source)
    tensors.assert_in(fetched.memory)


def why_not(source: Endpoint, name: str = "org/model", role: str = "target") -> str:
    with pytest.raises(SourcesExhausted) as caught:
        fetch(SMALL.request(identity(name, role)), TRANSPORTS, source)
    return str(caught.value)


def test_the_port_is_open_before_anything_is_loaded_and_clients_are_told() -> None:
    engine = Engine(listen_port=free_port())
    engine.begins()
    source = Endpoint("127.0.0.1", engine.options.config.listen_port or 0)
    assert inquire(source, 5).holdings == ()
    assert "it refused: this server does not hold target weights: it holds no weights yet" in why_not(source)
    assert engine.loads(SMALL) == source
    taken(SMALL, source)


def test_a_port_that_somebody_has_bound_is_known_before_anything_is_loaded() -> None:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", 0))
        engine = Engine(listen_port=sock.getsockname()[1])
        with pytest.raises(OSError, match=r"vLLM's own port \(--port\), another rank or instance"):
            engine.begins()
        sock.listen()
    assert serving.servers_of(engine) == []


def test_a_load_that_fails_gives_its_port_back() -> None:
    port = free_port()
    engine = Engine(listen_port=port)
    engine.begins()
    serving.abandon(engine.options)
    with pytest.raises(SourceError, match="Connection refused"):
        inquire(Endpoint("127.0.0.1", port), 5)


def test_a_reload_that_fails_leaves_what_is_served() -> None:
    engine = Engine(listen_port=free_port())
    source = engine.loads(SMALL)
    engine.begins()
    serving.abandon(engine.options)
    taken(SMALL, source)


def test_a_reload_that_fails_gives_up_only_the_address_that_it_wanted() -> None:
    engine = Engine(listen_port=free_port())
    source = engine.loads(SMALL)
    elsewhere = free_port()
    engine.begins(listen_port=elsewhere)
    assert "no weights yet" in why_not(Endpoint("127.0.0.1", elsewhere))
    serving.abandon(engine.options)
    assert "Connection refused" in why_not(Endpoint("127.0.0.1", elsewhere))
    taken(SMALL, source)


def test_a_reload_replaces_what_its_engine_served() -> None:
    engine = Engine()
    source = engine.loads(SMALL)
    assert engine.loads(OTHER) == source
    taken(OTHER, source)
    assert [holding.generation for holding in inquire(source, 5).holdings] == [2]


def test_a_reload_at_another_address_is_served_there_and_no_longer_at_the_old_one() -> None:
    engine = Engine()
    before = engine.loads(SMALL)
    now = engine.loads(OTHER, listen_port=free_port())
    assert before != now
    taken(OTHER, now)
    assert "does not hold target weights" in why_not(before)


def test_a_draft_is_served_beside_its_target() -> None:
    engine = Engine()
    source = engine.loads(SMALL)
    assert engine.loads(OTHER, "draft") == source
    taken(SMALL, source)
    taken(OTHER, source, role="draft")


def test_a_draft_is_not_served_to_others_than_its_target() -> None:
    engine = Engine()
    engine.loads(SMALL)
    engine.options = replace(engine.options, access=Access(b"0123456789abcdef"))
    with pytest.raises(ConfigError, match="of the draft model are not those under which the target model is served"):
        engine.begins("draft")


@pytest.mark.parametrize("name", ["org/model", "org/other"], ids=["the same model", "another model"])
def test_two_engines_of_one_process_are_both_served(name: str) -> None:
    """Two with VLLM_ENABLE_V1_MULTIPROCESSING=0: the second load must not end serving the first."""
    first, second = Engine(), Engine(name)
    one, two = first.loads(SMALL), second.loads(OTHER)
    taken(SMALL, one)
    taken(OTHER, two, name)
    second.loads(SMALL)
    taken(SMALL, one)


def test_two_engines_with_one_port_are_told_apart_from_a_reload() -> None:
    port = free_port()
    first, second = Engine(listen_port=port), Engine(listen_port=port)
    source = first.loads(SMALL)
    with pytest.raises(OSError, match=f"port {port} is that on which another engine of this process is served"):
        second.begins()
    taken(SMALL, source)


@pytest.mark.parametrize("port", [None, 1], ids=["any port", "a port of its own"])
def test_an_engine_that_is_gone_leaves_its_port_to_the_next(port: int | None) -> None:
    port = port and free_port()
    first = Engine(listen_port=port)
    first.models["target"] = nn.Module()
    first.models["target"].itself = first.models["target"]  # dies only when collected
    first.loads(SMALL)
    serving.decline(first.models["target"], "draft", "the first has a reason", first.options)
    [before] = map(weakref.ref, serving.servers_of(first))
    del first
    second = Engine(listen_port=port)
    second.begins()
    [server] = serving.servers_of(second)
    assert port is None or server.port == port
    assert inquire(Endpoint("127.0.0.1", server.port), 5).declined == {}
    taken(OTHER, second.loads(OTHER))
    gc.collect()
    assert before() is None


def test_an_engine_that_sleeps_does_not_end_serving_another() -> None:
    first, second = Engine(), Engine()
    one, two = first.loads(SMALL), second.loads(OTHER)
    serving.suspend(first, "it sleeps")
    assert "it sleeps" in why_not(one)
    taken(OTHER, two)
    second.loads(SMALL)
    serving.resume(second)
    assert "it sleeps" in why_not(one)
    serving.resume(first)
    taken(SMALL, one)
    serving.give_up(second, "its weights were dropped")
    assert "its weights were dropped" in why_not(two)
    taken(SMALL, one)


def test_where_one_listener_cannot_be_suspended_none_is() -> None:
    stuck, engine = StuckTransport(), Engine(stall_timeout=0.2)
    source = engine.loads(SMALL)
    engine.options = replace(engine.options, transports=(stuck,))
    other = engine.loads(OTHER, "draft", listen_port=free_port())
    first, second = serving.servers_of(engine)

    draft = Join(identity(role="draft"), RankCoordinates(), OTHER.manifest.digest, (stuck.offer(),))
    with Intruder(other).greet() as line:
        line.say(draft)
        wait_until(lambda: len(second.state().sessions) == 1)
        for change in (serving.suspend, serving.give_up):
            with pytest.raises(TimeoutError):
                change(engine, "it sleeps")
        taken(SMALL, source)
        stuck.go.set()

    wait_until(lambda: not first.state().sessions and not second.state().sessions)
    resume = serving.suspend(engine, "it sleeps")
    assert "it sleeps" in why_not(source)
    resume()
    taken(SMALL, source)


def test_a_model_that_ends_ends_what_is_served_of_it_alone() -> None:
    first, second = Engine(), Engine()
    one, two = first.loads(SMALL), second.loads(OTHER)
    first.models.clear()
    gc.collect()
    assert "does not hold target weights" in why_not(one)
    taken(OTHER, two)


@pytest.mark.parametrize(
    ("name", "differs"),
    [("org/model", "fingerprint"), ("org/other", "name")],
    ids=["a fine-tune", "another model"],
)
def test_an_instance_of_another_fleet_on_a_port_that_ours_had_is_left(name: str, differs: str) -> None:
    """A client with an old address, as in sglang #36042: where the other fleet answers, nothing of it is taken."""
    port = free_port()
    ours = Engine(listen_port=port)
    source = ours.loads(SMALL)
    taken(SMALL, source)
    del ours
    gc.collect()
    theirs = Engine(name, listen_port=port)
    assert theirs.loads(OTHER, fingerprint="another") == source
    assert f"the model or its partitioning differs: {differs}" in why_not(source)


class Grouped(InProcessTransport):
    """It has the traits of process groups, and makes none."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.traits = traits_of("process_group", device)


GLOO = "whoever can reach it can read the weights, without token and TLS, and can end this process"
HCCL = "opens ports of hccl's, which know neither token nor TLS: its bytes travel unencrypted"
TOKEN = Access(token=b"t" * 32)


@pytest.mark.parametrize(
    ("device", "access", "warning"),
    [("cpu", Access(), GLOO), ("cpu", TOKEN, GLOO), ("npu", Access(), ""), ("npu", TOKEN, HCCL)],
    ids=["gloo", "gloo and a token", "hccl", "hccl and a token"],
)
def test_ports_of_a_library_are_warned_of(
    device: str, access: Access, warning: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine()
    engine.options = replace(engine.options, transports=(Grouped(device),), access=access)
    engine.begins()
    warnings = [message for message in caplog.messages if "process_group" in message]
    assert len(warnings) == bool(warning)
    assert warning in "".join(warnings)
