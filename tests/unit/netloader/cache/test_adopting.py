"""What engines hand over, and what other engines get of it."""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from pathlib import Path

import pytest
import torch

from support.caches import await_held, await_name, given, handed, held, request_for, running, same_pages, socket_of
from support.sources import SHORT, SMALL, Tensors
from support.wait import wait_until
from vllm_ascend.model_loader.netloader.cache import asking, keeper
from vllm_ascend.model_loader.netloader.cache.contents import Contents, verified
from vllm_ascend.model_loader.netloader.errors import TransportError
from vllm_ascend.model_loader.netloader.transport.base import Timeouts
from vllm_ascend.model_loader.netloader.weights.arena import Arena
from vllm_ascend.model_loader.netloader.weights.identity import RankCoordinates

pytestmark = pytest.mark.timeout(60)


def test_the_very_pages_of_an_engine_are_given_to_the_next_one(tmp_path: Path) -> None:
    store = SMALL.store()
    assert store.digests is not None
    contents = Contents(request_for(), {"flag": True, "scale": 0.5}, store.digests.all())
    with running(tmp_path) as cache:
        assert store.memory.descriptor is not None
        assert asking.hand(socket_of(tmp_path), contents, store.memory.descriptor, SHORT)
        await_held(cache)
        found = given(socket_of(tmp_path))
        assert found is not None
        assert same_pages(store.memory, found.pages)
        assert found.evidence.digests == contents.digests
        assert found.evidence.root == contents.root == cache.shelf.items()[0].contents.root
        assert found.evidence.attributes == {"flag": True, "scale": 0.5}
        assert found.fingerprint == request_for().identity.fingerprint
        store.close()
    SMALL.assert_in(found.pages)  # also when cache and engine are gone


def test_digests_that_the_engine_does_not_know_are_made(tmp_path: Path) -> None:
    with running(tmp_path) as cache:
        assert handed(socket_of(tmp_path))
        await_held(cache)
        store = SMALL.store()
        found = given(socket_of(tmp_path))
        assert found is not None
        assert store.digests is not None
        assert found.evidence.digests == store.digests.all()


def test_pages_that_are_not_those_of_their_digests_are_never_given(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = Tensors({name: tensor + 1 for name, tensor in SMALL.by_name.items()}).store()
    assert other.digests is not None
    with running(tmp_path) as cache, caplog.at_level(logging.ERROR):
        assert handed(socket_of(tmp_path), digests=other.digests.all())
        wait_until(lambda: not cache.shelf.items())
        assert given(socket_of(tmp_path)) is None
    assert "is given up: chunk 0 of the pages is not the one of its digest" in caplog.text


@pytest.mark.parametrize("kind", ["not sealed", "shorter", "longer", "no memory"])
def test_pages_that_could_change_or_have_another_size_are_not_taken(tmp_path: Path, kind: str) -> None:
    tensors = Tensors.of_shapes((3, 4096))
    size = tensors.manifest.nbytes + {"shorter": -4096, "longer": 4096}.get(kind, 0)
    arena = Arena.create(size)
    if kind != "not sealed":
        arena.seal()
    reader, writer = os.pipe()
    with running(tmp_path) as cache:
        descriptor = reader if kind == "no memory" else arena.descriptor
        assert not asking.hand(socket_of(tmp_path), Contents(request_for(tensors)), descriptor, SHORT)
        assert cache.shelf.items() == []
    os.close(reader)
    os.close(writer)


def test_what_an_engine_writes_into_its_tensors_is_not_seen_by_others(tmp_path: Path) -> None:
    store = SMALL.store()
    assert isinstance(store.memory, Arena)
    assert store.memory.descriptor is not None
    with running(tmp_path) as cache:
        assert asking.hand(socket_of(tmp_path), Contents(request_for()), store.memory.descriptor, SHORT)
        ctypes.memset(store.memory.block(0, 64), 0xFF, 64)
        await_held(cache)
        found = given(socket_of(tmp_path))
        assert found is not None
        SMALL.assert_in(found.pages)


def test_who_asks_while_pages_are_verified_gets_them_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    monkeypatch.setattr(keeper, "verified", lambda *each: verified(*each) if go_on.wait(30) else None)
    with running(tmp_path) as cache:
        assert handed(socket_of(tmp_path))
        found: list[object] = []
        asking_thread = threading.Thread(target=lambda: found.append(given(socket_of(tmp_path))))
        asking_thread.start()
        wait_until(lambda: cache.shelf.items()[0].used_at > 0)
        assert not found
        go_on.set()
        asking_thread.join(30)
        assert isinstance(found[0], asking.Given)


def test_nobody_waits_for_ever_for_what_does_not_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    go_on = threading.Event()
    monkeypatch.setattr(keeper, "verified", lambda *each: verified(*each) if go_on.wait(30) else None)
    with running(tmp_path):
        assert handed(socket_of(tmp_path))
        assert asking.ask(socket_of(tmp_path), request_for(), Timeouts(5.0, 0.5)) is None
        go_on.set()
    assert "is not used: it has got no more of these weights for 0.5 s" in caplog.text


def test_others_than_what_is_held_are_told_why(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with running(tmp_path) as cache:
        assert given(socket_of(tmp_path)) is None
        assert handed(socket_of(tmp_path))
        await_held(cache)
        assert given(socket_of(tmp_path), request_for(fingerprint="other")) is None
        assert given(socket_of(tmp_path), request_for(coordinates=RankCoordinates(tp_size=2))) is None
        assert given(socket_of(tmp_path), request_for(Tensors.of_shapes((3, 3)))) is None
    for reason in ("the cache holds nothing", "fingerprint (here", "tp_size (here 1, there 2)", "the tensors differ"):
        assert reason in caplog.text


def test_what_is_too_large_is_refused_with_the_limit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with running(tmp_path, SMALL.manifest.nbytes - 1) as cache:
        assert not handed(socket_of(tmp_path))
        assert held(cache) == []
    assert "start it with a higher --max-bytes" in caplog.text


def test_weights_that_are_dropped_stay_with_the_engines_that_use_them(tmp_path: Path) -> None:
    with running(tmp_path) as cache:
        assert handed(socket_of(tmp_path))
        await_held(cache)
        found = given(socket_of(tmp_path))
        assert found is not None
        assert len(cache.shelf.drop("")) == 1
        assert given(socket_of(tmp_path)) is None
        SMALL.assert_in(found.pages)


def test_descriptors_do_not_pile_up(tmp_path: Path) -> None:
    with running(tmp_path, 3 * SMALL.manifest.nbytes) as cache:
        counts = []
        for number in range(6):
            assert handed(socket_of(tmp_path), request=request_for(name=f"org/{number}"))
            await_name(cache, f"org/{number}")
            assert given(socket_of(tmp_path), request_for(name=f"org/{number}")) is not None
            counts.append(len(os.listdir("/proc/self/fd")))
        assert held(cache) == ["org/3", "org/4", "org/5"]
        wait_until(lambda: len(os.listdir("/proc/self/fd")) <= counts[2])


def test_a_tensor_without_bytes_is_held_too(tmp_path: Path) -> None:
    empty = Tensors({"w0": torch.zeros(0)})
    with running(tmp_path) as cache:
        assert handed(socket_of(tmp_path), empty)
        await_held(cache)
        assert given(socket_of(tmp_path), request_for(empty)) is not None


def test_an_arena_is_not_adopted_unsealed() -> None:
    arena = Arena.create(4096)
    with pytest.raises(TransportError, match="not sealed"):
        Arena.adopt(os.dup(arena.descriptor), 4096)
