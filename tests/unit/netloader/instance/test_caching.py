"""A load and the cache of its host: what is taken from there, what is not, and what is handed over."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from support.caches import await_held, handed, held, request_for, running, socket_of
from support.loads import Checkpoint, Instance, Model
from support.ports import free_port
from support.sources import IDENTITY, SHORT, Tensors
from support.wait import wait_until
from vllm_ascend.model_loader.netloader.cache import asking, place
from vllm_ascend.model_loader.netloader.cache.contents import Contents
from vllm_ascend.model_loader.netloader.cache.process import Cache, CacheOptions
from vllm_ascend.model_loader.netloader.config import NetLoaderConfig
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.instance.load import ModelLoad
from vllm_ascend.model_loader.netloader.model.weights import ArenaWeights, LiveWeights
from vllm_ascend.model_loader.netloader.weights.arena import Arena

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    with running(tmp_path) as cache:
        yield cache


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return Checkpoint(tmp_path / "checkpoint").holding(1.0)


@pytest.fixture
def nothing(tmp_path: Path) -> Checkpoint:
    """The checkpoint of a host that has no files."""
    return Checkpoint(tmp_path / "nothing")


def instance(checkpoint: Checkpoint, tmp_path: Path, **config: Any) -> Instance:
    return Instance(checkpoint, {"cache": str(socket_of(tmp_path)), **config})


def test_an_engine_has_its_weights_back_without_files_and_sources(
    cache: Cache, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    first = instance(checkpoint, tmp_path).start()
    await_held(cache)
    root = cache.shelf.items()[0].contents.root
    again = instance(checkpoint, tmp_path, fallback="error").start()
    assert (again.model.value, checkpoint.times_read) == (1.0, 1)
    assert (again.summary.outcome, again.summary.source) == ("cache", str(socket_of(tmp_path)))
    assert (again.summary.root, again.summary.verified) == (root, "blake3")
    assert again.summary.bytes == first.summary.bytes
    assert again.summary.listening is not None
    assert f"from {socket_of(tmp_path)} by shared_memory" in again.summary.line()
    assert len(cache.shelf.items()) == 1


def test_it_is_asked_before_all_sources(cache: Cache, checkpoint: Checkpoint, tmp_path: Path) -> None:
    server = instance(checkpoint, tmp_path).start()
    await_held(cache)
    client = instance(checkpoint, tmp_path).start(server.address)
    assert client.summary.outcome == "cache"


def test_what_comes_from_a_source_is_handed_over_with_its_digests(
    cache: Cache, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    server = Instance(checkpoint, {"cache": "off"}).start()
    client = instance(checkpoint, tmp_path).start(server.address)
    assert client.summary.outcome == "p2p"
    await_held(cache)
    assert cache.shelf.items()[0].contents.root == client.summary.root


@pytest.mark.parametrize("config", [{"cache": "off"}, {"serve": False}], ids=["off", "not served"])
def test_who_does_not_want_it_hands_nothing_over(
    cache: Cache, checkpoint: Checkpoint, tmp_path: Path, config: dict[str, Any]
) -> None:
    instance(checkpoint, tmp_path, **config).start()
    assert handed(socket_of(tmp_path))
    await_held(cache)
    assert held(cache) == [IDENTITY.name]
    assert cache.shelf.items()[0].nbytes == request_for().manifest.nbytes


def test_who_does_not_serve_takes_from_it_all_the_same(cache: Cache, checkpoint: Checkpoint, tmp_path: Path) -> None:
    instance(checkpoint, tmp_path).start()
    await_held(cache)
    other = instance(checkpoint, tmp_path, serve=False).start()
    assert (other.model.value, other.summary.outcome, other.summary.listening) == (1.0, "cache", None)


def test_weights_of_files_that_were_replaced_are_not_taken(
    cache: Cache, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    instance(checkpoint, tmp_path).start()
    await_held(cache)
    checkpoint.holding(2.25)
    after = instance(checkpoint, tmp_path).start()
    assert (after.model.value, after.summary.outcome) == (2.25, "disk")
    wait_until(lambda: [item.contents.root for item in cache.shelf.items() if item.is_whole] != [])
    wait_until(lambda: cache.shelf.items()[0].contents.request.identity.fingerprint == checkpoint.fingerprint())


def test_with_files_nothing_is_taken_of_which_nobody_knows_the_files(
    cache: Cache, checkpoint: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = ArenaWeights(Model()).manifest
    request = dataclasses.replace(request_for(fingerprint=""), manifest=manifest)
    arena = Arena.create(manifest.nbytes)
    arena.seal()

    assert asking.hand(socket_of(tmp_path), Contents(request), arena.descriptor, SHORT)
    await_held(cache)
    after = instance(checkpoint, tmp_path).start()
    assert (after.model.value, after.summary.outcome) == (1.0, "disk")
    assert "nobody knows whether it is from such files as there are here" in caplog.text


def test_without_files_the_sources_say_whether_the_weights_are_the_latest(
    cache: Cache, checkpoint: Checkpoint, nothing: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = instance(checkpoint, tmp_path).start()
    await_held(cache)
    same = instance(nothing, tmp_path, fallback="error").start(server.address)
    assert (same.summary.outcome, same.model.value) == ("cache", 1.0)

    checkpoint.holding(2.25)
    newer = Instance(checkpoint, {"cache": "off"}).start()
    taken = instance(nothing, tmp_path, fallback="error").start(newer.address)
    assert (taken.summary.outcome, taken.model.value) == ("p2p", 2.25)
    assert "sources have other weights under that name by now" in caplog.text


def test_without_files_and_with_no_source_left_the_cache_is_all_there_is(
    cache: Cache, checkpoint: Checkpoint, nothing: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:

    instance(checkpoint, tmp_path).start()
    await_held(cache)
    after = instance(nothing, tmp_path, fallback="error").start(Endpoint("127.0.0.1", free_port()))
    assert (after.summary.outcome, after.model.value) == ("cache", 1.0)
    assert "no source tells whether the weights in the cache" in caplog.text


def test_a_reload_does_not_ask_it_and_replaces_what_it_holds(
    cache: Cache, checkpoint: Checkpoint, tmp_path: Path
) -> None:

    started = instance(checkpoint, tmp_path).start()
    await_held(cache)
    before = cache.shelf.items()[0]
    config = NetLoaderConfig(listen_host="127.0.0.1", cache=str(socket_of(tmp_path)))
    load, scratch = ModelLoad(config, started.rank, started.transports, reloads=True), Model()
    loaded = load.fill(scratch)
    assert (load.summary.outcome, checkpoint.times_read) == ("disk", 2)
    load.publish(started.model, loaded)
    assert not before.is_gone  # they are the same weights

    checkpoint.holding(2.25)
    load = ModelLoad(config, started.rank, started.transports, reloads=True)
    load.publish(started.model, load.fill(scratch))
    wait_until(lambda: before.is_gone)
    await_held(cache)


def test_a_cache_that_is_named_and_not_there_is_worth_a_warning(
    checkpoint: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    started = instance(checkpoint, tmp_path).start()
    assert started.summary.outcome == "disk"
    assert f"there is no cache where CACHE says: {socket_of(tmp_path)}: No such file or directory" in caplog.text


def test_by_default_it_is_found_where_caches_are(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:

    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    Instance(checkpoint).start()
    with Cache(CacheOptions(place.prepare(None), 1 << 30)) as cache:
        Instance(checkpoint).start()
        await_held(cache)
        assert Instance(checkpoint).start().summary.outcome == "cache"
    assert "where CACHE says" not in caplog.text


def test_guards_of_an_engine_go_with_its_weights(cache: Cache, checkpoint: Checkpoint, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("a token of thirty-two bytes long")
    token.chmod(0o600)
    instance(checkpoint, tmp_path, token_file=str(token)).start()
    await_held(cache)
    assert cache.shelf.items()[0].contents.guards == {"token"}


def test_what_loading_sets_on_the_model_comes_with_the_weights(
    cache: Cache, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    def set_flag(model: Model) -> None:
        model.has_own_embedding = True

    flagged = Checkpoint(checkpoint.folder, set_flag)
    first = instance(flagged, tmp_path).start()
    assert first.model.has_own_embedding
    await_held(cache)
    again = instance(flagged, tmp_path).start()
    assert (again.summary.outcome, again.model.has_own_embedding) == ("cache", True)


def test_pages_go_to_a_device_in_one_copy() -> None:
    tensors = Tensors.of_shapes((3 << 20,), (5, 3), (1,))
    store = tensors.store()
    model = nn.Module()
    for name, tensor in tensors.by_name.items():
        model.register_parameter(name, nn.Parameter(torch.zeros_like(tensor), requires_grad=False))
    assert store.memory.descriptor is not None
    weights = LiveWeights(model, torch.device("cpu"))
    pages = Arena.adopt(os.dup(store.memory.descriptor), store.manifest.nbytes)
    memory = weights.memory_from(pages)
    weights.bind(memory)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, tensors.by_name[name]), name
    assert not pages.servable
