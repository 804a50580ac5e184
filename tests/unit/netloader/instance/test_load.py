"""The policy of a load, without an engine: which way weights come, what is served, and what the report says of it."""

from __future__ import annotations

import gc
import json
import logging
import os
import socket
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import nn

from support.engines import TRANSPORTS
from support.loads import CPU, Checkpoint, Instance, Model
from support.ports import free_port
from support.sources import IDENTITY, fetch
from support.wait import wait_until
from vllm_ascend.model_loader.netloader.checkpoint.opened import Opened
from vllm_ascend.model_loader.netloader.client.inquiry import inquire
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import (
    ConfigError,
    NoRoom,
    ReloadRefused,
    SourceError,
    SourcesExhausted,
    UnsupportedModel,
)
from vllm_ascend.model_loader.netloader.instance import serving
from vllm_ascend.model_loader.netloader.instance.filling import Kept, Loaded
from vllm_ascend.model_loader.netloader.instance.load import require_one_checkpoint
from vllm_ascend.model_loader.netloader.instance.ranks import _Card
from vllm_ascend.model_loader.netloader.instance.serving import LoadedWeights
from vllm_ascend.model_loader.netloader.model import originals
from vllm_ascend.model_loader.netloader.model.weights import ArenaWeights, LiveWeights
from vllm_ascend.model_loader.netloader.transport.store import Request
from vllm_ascend.model_loader.netloader.weights import arena
from vllm_ascend.model_loader.netloader.weights.identity import RankCoordinates
from vllm_ascend.model_loader.netloader.weights.memory_limit import Room

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return Checkpoint(tmp_path / "checkpoint").holding(1.0)


@pytest.fixture
def nothing(tmp_path: Path) -> Checkpoint:
    """The checkpoint of a host that has no files."""
    return Checkpoint(tmp_path / "nothing")


def nowhere() -> Endpoint:
    """A port at which nobody listens."""
    return Endpoint("127.0.0.1", free_port())


def heard(source: Endpoint, **identity: Any) -> str:
    """Why a client gets nothing there, empty where it gets all."""
    wanted = msgspec.structs.replace(IDENTITY, fingerprint="", **identity)
    try:
        _, fetched = fetch(Request(wanted, RankCoordinates(), ArenaWeights(Model()).manifest), TRANSPORTS, source)
    except SourcesExhausted as error:
        return str(error)
    fetched.memory.close()
    return ""


def arenas() -> int:
    """How many descriptors of arenas this process has; each arena has one, and each mapping another one."""
    gc.collect()
    links = (Path("/proc/self/fd", number) for number in os.listdir("/proc/self/fd"))
    return sum("netloader-arena" in os.readlink(link) for link in links if link.is_symlink())


@pytest.fixture
def arenas_before() -> int:
    """How many there are when a test begins: those of other tests may still be there."""
    return arenas()


def is_given_up(loaded: Loaded | None) -> bool:
    """Whether memory that was to be served is only there for the tensors of the model."""
    assert loaded is not None
    assert loaded.kept is not None
    return not loaded.kept.contents.memory.servable


def listener_of(instance: Instance) -> Endpoint:
    """Where an instance listens that was given the port."""
    return Endpoint("127.0.0.1", instance.config["listen_port"])


def test_a_load_from_disk_is_served(checkpoint: Checkpoint) -> None:
    server = Instance(checkpoint).start()
    assert server.model.value == 1.0
    assert (server.summary.outcome, server.summary.source, server.summary.not_served) == ("disk", None, None)
    assert server.summary.bytes == ArenaWeights(Model()).manifest.nbytes
    assert {"join", "disk", "serve"} <= server.summary.seconds.keys()
    assert inquire(server.address, 5).holdings[0].identity.fingerprint == checkpoint.fingerprint()
    assert heard(server.address) == ""


def test_sources_come_before_the_disk(checkpoint: Checkpoint) -> None:
    server = Instance(checkpoint).start()
    client = Instance(checkpoint).start(server.address)
    assert (client.model.value, checkpoint.times_read) == (1.0, 1)
    assert (client.summary.outcome, client.summary.transport) == ("p2p", "in_process")
    assert client.summary.source == str(server.address)
    assert client.summary.verified == "blake3"
    assert sum(client.summary.received.values()) == client.summary.bytes == server.summary.bytes
    assert client.summary.attempts == []


def test_what_came_from_a_source_is_served_by_the_fingerprint_of_the_source(
    checkpoint: Checkpoint, nothing: Checkpoint
) -> None:
    server = Instance(checkpoint).start()
    client = Instance(nothing).start(server.address)
    (holding,) = inquire(client.address, 5).holdings
    assert holding.identity.fingerprint == checkpoint.fingerprint() != ""
    third = Instance(nothing).start(client.address)
    assert third.model.value == 1.0


def test_what_loading_sets_beside_the_weights_comes_with_them(checkpoint: Checkpoint, nothing: Checkpoint) -> None:
    def note(model: Model) -> None:
        model.has_own_embedding = True

    checkpoint.meanwhile = note
    server = Instance(checkpoint).start()
    client = Instance(nothing).start(server.address)
    assert client.model.has_own_embedding


def test_the_disk_comes_when_every_source_has_failed_and_the_report_has_the_attempts(
    checkpoint: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = Instance(Checkpoint(tmp_path / "other").holding(2.0)).start()
    absent = nowhere()
    client = Instance(checkpoint).start(absent, other.address)
    assert (client.model.value, client.summary.outcome, client.summary.not_served) == (1.0, "disk", None)
    assert [attempt.source for attempt in client.summary.attempts] == [str(absent), str(other.address)]
    assert "Connection refused" in client.summary.attempts[0].reason
    assert "fingerprint" in client.summary.attempts[1].reason
    assert "no source delivered the weights, loading from disk" in caplog.text


def test_attempts_are_in_the_report_of_a_success_too(checkpoint: Checkpoint) -> None:
    server = Instance(checkpoint).start()
    absent = nowhere()
    client = Instance(checkpoint).start(absent, server.address)
    assert client.summary.outcome == "p2p"
    assert [attempt.source for attempt in client.summary.attempts] == [str(absent)]


def test_without_sources_nobody_is_warned(checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture) -> None:
    Instance(checkpoint).start()
    assert "no source delivered" not in caplog.text


def test_the_disk_may_be_forbidden(checkpoint: Checkpoint, tmp_path: Path) -> None:
    absent = nowhere()
    client = Instance(checkpoint, {"fallback": "error", "report_prefix": f"{tmp_path}/report-"})
    with pytest.raises(SourcesExhausted, match="Connection refused"):
        client.start(absent)
    assert checkpoint.times_read == 0
    report = json.loads((tmp_path / "report-0.json").read_text())
    assert report["outcome"] == "failed"
    assert [attempt["source"] for attempt in report["attempts"]] == [str(absent)]


class Unsupported(Model):
    """Keeps a weight where no manifest can describe it."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Parameter(torch.zeros(8, 8)[:, ::2], requires_grad=False)


def test_a_model_that_is_not_supported_loads_from_disk_and_says_why_it_is_not_served(checkpoint: Checkpoint) -> None:
    server = Instance(checkpoint).start()
    client = Instance(checkpoint, model=Unsupported()).start(server.address)
    assert (client.model.value, client.summary.outcome, client.summary.listening) == (1.0, "disk", None)
    assert "second is not dense in memory" in client.summary.not_served
    assert client.summary.attempts == []


def test_its_clients_hear_why(checkpoint: Checkpoint) -> None:
    port = nowhere().port
    client = Instance(checkpoint, {"listen_port": port}, model=Unsupported()).start()
    assert "second is not dense in memory" in heard(listener_of(client))


def test_the_reason_is_in_the_report_of_a_load_that_fails_on_the_disk_too(tmp_path: Path) -> None:
    client = Instance(Checkpoint(tmp_path / "absent"), model=Unsupported())
    with pytest.raises(FileNotFoundError):
        client.start()
    assert client.summary.outcome == "failed"
    assert "second is not dense in memory" in client.summary.not_served


def test_it_does_not_load_where_the_disk_is_forbidden(checkpoint: Checkpoint) -> None:
    client = Instance(checkpoint, {"fallback": "error"}, model=Unsupported())
    with pytest.raises(UnsupportedModel, match="second is not dense"):
        client.start()
    assert checkpoint.times_read == 0
    assert "second is not dense in memory" in client.summary.not_served


def test_a_host_without_memory_for_an_arena_loads_from_disk(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "memfd_create", refuse)
    instance = Instance(checkpoint).start()
    assert (instance.model.value, instance.summary.outcome) == (1.0, "disk")
    assert "this process may not make or map memory files" in instance.summary.not_served


def test_a_process_that_would_be_killed_does_not_load(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena, "room", lambda: Room(1000, Path("/sys/fs/cgroup/memory.max")))
    instance = Instance(checkpoint)
    with pytest.raises(NoRoom, match="leaves 1000"):
        instance.start()
    assert checkpoint.times_read == 0
    assert instance.summary.outcome == "failed"


def test_a_loader_that_replaces_a_weight_makes_a_model_that_is_not_served(
    checkpoint: Checkpoint, arenas_before: int
) -> None:
    def replace(model: Model) -> None:
        model.first = nn.Parameter(model.first.data.clone(), requires_grad=False)

    checkpoint.meanwhile = replace
    instance = Instance(checkpoint).start()
    assert (instance.model.value, instance.summary.outcome) == (1.0, "disk")
    assert instance.summary.not_served == "loading replaced, added or removed first"
    instance.model = Model()
    wait_until(lambda: arenas() <= arenas_before)  # only the model has kept the memory


def test_a_mixture_of_checkpoints_is_loaded_and_not_served(checkpoint: Checkpoint, arenas_before: int) -> None:
    checkpoint.meanwhile = lambda _: checkpoint.holding(20.0)
    instance = Instance(checkpoint).start()
    assert (instance.model.value, instance.summary.outcome, instance.summary.listening) == (1.0, "disk", None)
    assert "the checkpoint changed while it was read: model.safetensors" in instance.summary.not_served
    assert instance.loaded is not None
    assert instance.loaded.fingerprint == ""
    with pytest.raises(ReloadRefused, match="nothing was changed, reload again when nobody writes to it"):
        require_one_checkpoint(instance.loaded)
    instance.model = Model()
    wait_until(lambda: arenas() <= arenas_before)  # only the model has kept the memory


def test_a_mixture_shows_in_the_log_where_nobody_serves(
    checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint.meanwhile = lambda _: checkpoint.holding(20.0)
    Instance(checkpoint, {"serve": False}).start()
    assert "the target weights of rank 0 may be a mixture: the checkpoint changed while it was read" in caplog.text


def test_weights_that_come_from_beside_the_checkpoint_are_not_served(checkpoint: Checkpoint) -> None:
    class Beside(Checkpoint):
        def load(self, model: nn.Module) -> Any:
            record = super().load(model)
            record.note([Opened("/elsewhere/adapter.safetensors", "/elsewhere/adapter.safetensors")])
            return record

    instance = Instance(Beside(checkpoint.folder)).start()
    assert instance.model.value == 1.0
    assert "loading read /elsewhere/adapter.safetensors" in instance.summary.not_served
    assert instance.loaded is not None
    assert instance.loaded.fingerprint == checkpoint.fingerprint()
    require_one_checkpoint(instance.loaded)


def test_an_instance_that_does_not_serve_listens_nowhere_and_keeps_no_memory(checkpoint: Checkpoint) -> None:
    port = nowhere().port
    server = Instance(checkpoint).start()
    assert heard(server.address) == "", "the server has mapped what it sends"
    before = arenas()
    for sources in ((), (server.address,)):
        instance = Instance(checkpoint, {"serve": False, "listen_port": port}).start(*sources)
        assert instance.model.value == 1.0
        assert (instance.summary.not_served, instance.summary.listening) == ("SERVE is false", None)
        assert instance.loaded is not None
        assert instance.loaded.kept is None
        with pytest.raises(SourceError):
            inquire(Endpoint("127.0.0.1", port), 5)
        instance.model, instance.loaded = Model(), None
        wait_until(lambda: arenas() <= before)  # only the model has kept the memory


def test_what_was_served_before_is_withdrawn_by_a_load_that_does_not_serve(checkpoint: Checkpoint) -> None:
    instance = Instance(checkpoint).start()
    address = instance.address
    assert heard(address) == ""
    instance.config["serve"] = False
    instance.start()
    assert "it holds no weights" in heard(address)


def test_a_port_that_somebody_else_has_is_reported_and_the_load_goes_on(
    checkpoint: Checkpoint, arenas_before: int
) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        instance = Instance(checkpoint, {"listen_port": sock.getsockname()[1]}).start()
    assert (instance.model.value, instance.summary.outcome) == (1.0, "disk")
    assert "is bound by another socket" in instance.summary.not_served
    wait_until(lambda: arenas() <= arenas_before)


def test_publishing_that_fails_is_reported_and_does_not_stop_the_load(
    checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    def unknown() -> str:
        raise OSError("this host has no network")

    instance = Instance(checkpoint, {"listen_host": "0.0.0.0", "serve": True}, {"own_address": unknown})
    load = instance.begin()
    loaded = load.fill(instance.model)
    load.publish(instance.model, loaded)
    load.report()
    assert instance.model.value == 1.0
    assert (load.summary.outcome, load.summary.not_served) == ("disk", "this host has no network")
    assert "the target weights of rank 0 cannot be served: this host has no network" in caplog.text
    assert is_given_up(loaded)


def test_an_address_that_cannot_be_written_does_not_stop_the_load(
    checkpoint: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    instance = Instance(checkpoint, {"output_prefix": f"{tmp_path}/address-"})
    load = instance.begin()
    (tmp_path / "address-0.txt").mkdir()
    loaded = load.fill(instance.model)
    load.publish(instance.model, loaded)
    assert load.summary.listening is not None
    assert f"the address {load.summary.listening} cannot be written to OUTPUT_PREFIX" in caplog.text


def test_the_address_and_the_report_are_written(checkpoint: Checkpoint, tmp_path: Path) -> None:
    config = {"output_prefix": f"{tmp_path}/new/address-", "report_prefix": f"{tmp_path}/report-"}
    instance = Instance(checkpoint, config).start()
    assert (tmp_path / "new" / "address-0.txt").read_text() == f"{instance.address}\n"
    assert json.loads((tmp_path / "report-0.json").read_text())["listening"] == str(instance.address)


def test_a_draft_has_a_report_of_its_own(checkpoint: Checkpoint, tmp_path: Path) -> None:
    Instance(checkpoint, {"report_prefix": f"{tmp_path}/report-"}, {"role": "draft", "number": 3}).start()
    assert json.loads((tmp_path / "report-3-draft.json").read_text())["role"] == "draft"


def test_a_file_that_cannot_be_written_stops_the_start_before_anything_is_loaded(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    (tmp_path / "report-0.json").mkdir()
    with pytest.raises(ConfigError, match="REPORT_PREFIX"):
        Instance(checkpoint, {"report_prefix": f"{tmp_path}/report-"}).start()
    assert checkpoint.times_read == 0


def test_a_load_that_fails_on_the_disk_gives_back_memory_and_port(
    nothing: Checkpoint, tmp_path: Path, arenas_before: int
) -> None:
    port = nowhere().port
    config = {"listen_port": port, "report_prefix": f"{tmp_path}/report-"}
    with pytest.raises(FileNotFoundError):
        Instance(nothing, config).start()
    assert json.loads((tmp_path / "report-0.json").read_text())["outcome"] == "failed"
    wait_until(lambda: arenas() <= arenas_before)
    with pytest.raises(SourceError):
        inquire(Endpoint("127.0.0.1", port), 5)


def test_post_processing_that_fails_gives_back_memory_and_port(checkpoint: Checkpoint) -> None:
    def process(_: Model) -> None:
        raise RuntimeError("no such kernel")

    instance = Instance(checkpoint, {"listen_port": nowhere().port})
    with pytest.raises(RuntimeError, match="no such kernel"):
        instance.start(process=process)
    assert is_given_up(instance.loaded)
    assert instance.summary.outcome == "failed"
    with pytest.raises(SourceError):
        inquire(listener_of(instance), 5)


def test_what_post_processing_changes_is_served_as_it_was_loaded(
    checkpoint: Checkpoint, nothing: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    server = Instance(checkpoint, {"int8_cache": "dram"}).start(process=lambda model: model.first.data.add_(1))
    assert server.summary.changed == ["first"]
    assert "post-processing changed 1 tensors of the target weights" in caplog.text
    assert Instance(nothing).start(server.address).model.value == 1.0


def test_changes_are_looked_for_only_if_somebody_wants_to_know(checkpoint: Checkpoint) -> None:
    instance = Instance(checkpoint).start(process=lambda model: model.first.data.add_(1))
    assert instance.summary.changed is None


def loaded_in_place(model: Model) -> Loaded:
    """What a load on an accelerator returns, where parameters are served from where they are."""
    weights = LiveWeights(model, CPU)
    memory = weights.allocate()
    memory.seal()
    weights.note_originals(memory)
    request = Request(IDENTITY, RankCoordinates(), weights.manifest)
    return Loaded(kept=Kept(weights, LoadedWeights(request, memory, {})))


def test_what_post_processing_leaves_alone_is_served_from_where_it_is(checkpoint: Checkpoint) -> None:
    instance = Instance(checkpoint)
    load, loaded = instance.begin(), loaded_in_place(instance.model)
    load.publish(instance.model, loaded)
    assert load.summary.changed == []
    assert heard(Endpoint.parse(load.summary.listening or "")) == ""


def test_what_post_processing_has_lost_is_declined_with_the_setting_that_keeps_it(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(originals, "KEPT_BYTES", 0)
    monkeypatch.setattr(originals, "KEPT_SHARE", 0.0)
    instance = Instance(checkpoint, {"listen_port": nowhere().port})
    load, loaded = instance.begin(), loaded_in_place(instance.model)
    instance.model.first.data.add_(1)
    load.publish(instance.model, loaded)
    assert load.summary.listening is None
    for reason in (load.summary.not_served or "", heard(listener_of(instance))):
        assert "post-processing changed 1 tensors (first) in a way that no known inverse undoes" in reason
        assert 'nothing keeps their originals: set INT8_CACHE to "hbm" or "dram"' in reason
    assert is_given_up(loaded)


def test_a_draft_model_makes_no_ranks_meet(checkpoint: Checkpoint) -> None:
    met: list[bytes] = []

    def gather(payload: bytes) -> list[bytes]:
        met.append(payload)
        return [payload]

    Instance(checkpoint, rank_values={"gather": gather, "role": "draft"}).start()
    assert met == []
    Instance(checkpoint, rank_values={"gather": gather}).start()
    assert len(met) == 1


def other_rank(fingerprint: str, port: int | None = 7) -> Any:
    """What `gather` gives where there is a second rank."""
    card = _Card(RankCoordinates(tp_rank=1, tp_size=2), "10.0.0.2", port, fingerprint)
    return lambda payload: [payload, msgspec.msgpack.encode(card)]


def test_a_rank_refers_clients_to_the_others(checkpoint: Checkpoint) -> None:
    here = RankCoordinates(tp_rank=0, tp_size=2)
    values = {"coordinates": here, "gather": other_rank(checkpoint.fingerprint())}
    instance = Instance(checkpoint, rank_values=values).start()
    identity = msgspec.structs.replace(IDENTITY, fingerprint="")
    wanted = Request(identity, RankCoordinates(tp_rank=1, tp_size=2), ArenaWeights(Model()).manifest)
    with pytest.raises(SourcesExhausted) as caught:
        fetch(wanted, TRANSPORTS, instance.address)
    assert "10.0.0.2:7" in str(caught.value)


@pytest.mark.parametrize(("fingerprint", "complains"), [("another", True), ("", False)])
def test_ranks_of_different_checkpoints_show_in_the_log(
    checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture, fingerprint: str, complains: bool
) -> None:
    Instance(checkpoint, rank_values={"gather": other_rank(fingerprint)}).start()
    assert ("the ranks of this instance have weights of different checkpoints" in caplog.text) == complains


ACCELERATOR = {"computes_on": torch.device("xpu", 0)}
"""A rank whose parameters are served from where they are; what is loaded here lies in host memory, as in a reload."""


def test_weights_in_use_are_not_served_while_they_change(checkpoint: Checkpoint) -> None:
    instance = Instance(checkpoint, rank_values=ACCELERATOR).start()
    address, used = instance.address, instance.model
    checkpoint.holding(2.0)
    load, scratch = instance.begin(), Model()
    loaded = load.fill(scratch)
    assert heard(address) == "", "getting new weights disturbs nobody"
    load.suspend()
    assert "its weights are being replaced" in heard(address)
    load.publish(used, loaded)
    assert heard(address) == ""
    assert inquire(address, 5).holdings[0].identity.fingerprint == checkpoint.fingerprint()


def test_a_model_that_does_not_change_after_all_is_served_as_before(checkpoint: Checkpoint) -> None:
    instance = Instance(checkpoint, rank_values=ACCELERATOR).start()
    address, load = instance.address, instance.begin()
    loaded = load.fill(Model())
    load.suspend()
    load.abandon()
    assert heard(address) == ""
    assert is_given_up(loaded)


def test_a_model_on_the_cpu_is_served_while_it_changes(checkpoint: Checkpoint) -> None:
    instance = Instance(checkpoint).start()
    address, load = instance.address, instance.begin()
    load.fill(Model())
    load.suspend()
    assert heard(address) == ""


def test_what_was_served_does_not_come_back_when_new_weights_cannot_be_published(checkpoint: Checkpoint) -> None:
    """The model has other weights by then, in the very memory that was served."""

    def unknown() -> str:
        raise OSError("this host has no network")

    instance = Instance(checkpoint, {"listen_host": "0.0.0.0"}, dict(ACCELERATOR)).start()
    address = Endpoint("127.0.0.1", instance.address.port)
    instance.config["listen_port"] = None
    instance.rank_values["own_address"] = unknown
    load = instance.begin()
    loaded = load.fill(Model())
    load.suspend()
    load.publish(instance.model, loaded)
    load.abandon()
    serving.resume(instance.engine)  # as a worker does when it wakes up
    assert "this host has no network" in heard(address)


def test_what_was_served_does_not_come_back_when_a_reload_fails_halfway(checkpoint: Checkpoint) -> None:
    instance = Instance(checkpoint, rank_values=dict(ACCELERATOR)).start()
    address, load = instance.address, instance.begin()
    loaded = load.fill(Model())
    load.suspend()
    with pytest.raises(RuntimeError, match="no kernel"), load.failure_reported(), load.replacing():
        raise RuntimeError("no kernel for the second layer")
    serving.resume(instance.engine)  # as a worker does when it wakes up
    assert "a reload failed halfway" in heard(address)
    assert load.summary.outcome == "failed"
    assert is_given_up(loaded)
