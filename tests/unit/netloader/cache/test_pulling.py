"""A cache that is filled from sources before engines need it."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from support.caches import PLENTY, given, handed, request_for, running, socket_of
from support.ports import free_port
from support.sources import IDENTITY, SHORT, SMALL, Tensors, fetch, serving
from support.wait import wait_until
from vllm_ascend.model_loader.netloader.cache.contents import Contents
from vllm_ascend.model_loader.netloader.cache.pulling import Chosen, Puller
from vllm_ascend.model_loader.netloader.cache.shelf import Shelf
from vllm_ascend.model_loader.netloader.client.inquiry import inquire
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.server.publications import Publication
from vllm_ascend.model_loader.netloader.server.requests import Settings
from vllm_ascend.model_loader.netloader.server.server import WeightServer
from vllm_ascend.model_loader.netloader.transport import digests
from vllm_ascend.model_loader.netloader.transport.registry import transports
from vllm_ascend.model_loader.netloader.weights.identity import RankCoordinates
from vllm_ascend.model_loader.netloader.wire.access import Access

pytestmark = pytest.mark.timeout(60)
TCP = transports(["tcp"])
TOKEN = Access(b"a token of thirty-two bytes long")
OTHER = Tensors({name: tensor + 1 for name, tensor in SMALL.by_name.items()})


def puller(shelf: Shelf, *sources: Endpoint, chosen: Chosen | None = None, access: Access | None = None) -> Puller:
    return Puller(shelf, sources, access or Access(), chosen, timeouts=SHORT, wait=lambda _: True)


def roots(shelf: Shelf) -> list[str]:
    return [item.contents.root for item in shelf.items() if item.is_whole]


def root_of(tensors: Tensors) -> str:
    store = tensors.store()
    root = store.root()
    store.close()
    return root


def republish(server: WeightServer, tensors: Tensors, fingerprint: str = IDENTITY.fingerprint) -> None:
    store = dataclasses.replace(tensors.store(), generation=server.next_generation("target"))
    store.root()
    server.publish(Publication(msgspec.structs.replace(IDENTITY, fingerprint=fingerprint), RankCoordinates(), store))


@pytest.mark.parametrize("transport", ["tcp", "shared_memory"])
def test_what_a_source_holds_comes_without_a_model(transport: str) -> None:
    shelf = Shelf(PLENTY)
    with serving(SMALL, transports([transport])) as (_, source):
        puller(shelf, source).look()
    assert roots(shelf) == [root_of(SMALL)]
    (item,) = shelf.items()
    assert item.pages is not None
    SMALL.assert_in(item.pages)
    assert item.contents.request.identity == IDENTITY


def test_an_engine_gets_it_by_the_socket(tmp_path: Path) -> None:
    with serving(SMALL, TCP) as (_, source), running(tmp_path, sources=(source,)) as cache:
        wait_until(lambda: roots(cache.shelf))
        found = given(socket_of(tmp_path))
        assert found is not None
        SMALL.assert_in(found.pages)


def test_what_is_there_already_is_not_fetched_again() -> None:
    shelf = Shelf(PLENTY)
    with serving(SMALL, TCP) as (server, source):
        republish(server, SMALL)
        pulling = puller(shelf, source)
        pulling.look()
        (first,) = shelf.items()
        pulling.look()
        puller(shelf, source).look()
        assert shelf.items() == [first]
        probe = shelf.reserve(Contents(request_for(name="org/probe")))
        assert probe.number == first.number + 1, "nothing was fetched in between"
        shelf.drop("")
        pulling.look()
        assert shelf.items() == []


def test_what_a_source_has_replaced_is_given_up_and_fetched_anew() -> None:
    shelf = Shelf(PLENTY)
    with serving(SMALL, TCP) as (server, source):
        pulling = puller(shelf, source)
        pulling.look()
        republish(server, OTHER, fingerprint="another")
        pulling.look()
        assert roots(shelf) == [root_of(OTHER)]
        republish(server, SMALL, fingerprint="another")
        pulling.look()
        assert roots(shelf) == [root_of(SMALL)]


def test_a_source_that_is_gone_takes_nothing_away(caplog: pytest.LogCaptureFixture) -> None:
    shelf = Shelf(PLENTY)
    with serving(SMALL, TCP) as (_, source):
        pulling = puller(shelf, source)
        pulling.look()
    pulling.look()
    assert roots(shelf) == [root_of(SMALL)]
    assert f"{source} does not tell what it holds" in caplog.text


def test_a_source_that_comes_later_is_found() -> None:
    shelf, waits, port = Shelf(PLENTY), [0], free_port()
    looked = threading.Event()

    def wait(_: float) -> bool:
        waits[0] += 1
        looked.set()
        return bool(roots(shelf)) or waits[0] > 400

    pulling = Puller(shelf, [Endpoint("127.0.0.1", port)], Access(), timeouts=SHORT, wait=wait)
    pulling.start()
    looked.wait(20)
    with WeightServer("127.0.0.1", port, Settings(TCP, SHORT)) as server:
        republish(server, SMALL)
        wait_until(lambda: roots(shelf))


@contextlib.contextmanager
def two_ranks_with_a_draft() -> Iterator[Endpoint]:
    with serving(SMALL, TCP, coordinates=RankCoordinates(tp_size=2)) as (server, source):
        draft = msgspec.structs.replace(IDENTITY, role="draft")
        server.publish(Publication(draft, RankCoordinates(tp_size=2), SMALL.store(2)))
        yield source


@pytest.mark.parametrize(
    ("chosen", "found"),
    [
        ({}, {"target", "draft"}),
        ({"role": frozenset({"draft"})}, {"draft"}),
        ({"tp_rank": frozenset({"0", "3"}), "name": frozenset({IDENTITY.name})}, {"target", "draft"}),
        ({"tp_rank": frozenset({"1"})}, set()),
    ],
    ids=["all", "role", "rank and name", "no such rank"],
)
def test_only_what_is_chosen_is_fetched(chosen: dict[str, frozenset[str]], found: set[str]) -> None:
    shelf = Shelf(PLENTY)
    with two_ranks_with_a_draft() as source:
        puller(shelf, source, chosen=Chosen(chosen)).look()
    assert {item.contents.request.identity.role for item in shelf.items() if item.is_whole} == found


def test_what_does_not_fit_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    shelf = Shelf(SMALL.manifest.nbytes - 1)
    with serving(SMALL, TCP) as (server, source):
        republish(server, SMALL)
        pulling = puller(shelf, source)
        pulling.look()
        pulling.look()
    assert caplog.text.count("start it with a higher --max-bytes") == 1
    assert shelf.items() == []


def test_a_source_that_refuses_leaves_nothing_behind(caplog: pytest.LogCaptureFixture) -> None:
    shelf = Shelf(PLENTY)
    with serving(SMALL, TCP, verify=False) as (_, source):
        puller(shelf, source).look()
    assert shelf.items() == []
    assert "cannot be fetched" in caplog.text


def test_the_token_is_that_of_the_cache_and_goes_with_the_weights() -> None:
    shelf = Shelf(PLENTY)
    with serving(SMALL, TCP, access=TOKEN) as (_, source):
        puller(shelf, source).look()
        assert shelf.items() == []
        puller(shelf, source, access=TOKEN).look()
    assert [item.contents.guards for item in shelf.items()] == [{"token"}]


def test_while_it_fills_it_serves_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that joins the cache while that still fetches takes chunks there, and its session is not ended."""
    monkeypatch.setattr(digests, "CHUNK_BYTES", 4096)
    tensors = Tensors.of_shapes((512, 1024))
    slow = 1 << 20
    with serving(tensors, TCP, max_bandwidth=slow) as (_, source):
        with running(tmp_path, host="127.0.0.1", port=0, sources=(source,)) as cache:
            address = Endpoint("127.0.0.1", cache.port)
            wait_until(lambda: (found := inquire(address, 5).holdings) and 0 < found[0].held < found[0].nbytes)
            client, fetched = fetch(tensors, TCP, address)
            assert client.attempts == []
            assert str(fetched.source) == str(address)
            tensors.assert_in(fetched.memory)
            fetched.memory.close()
            assert roots(cache.shelf) == [root_of(tensors)]
            assert [each.root for each in inquire(address, 5).holdings] == [root_of(tensors)]


def test_an_engine_waits_for_what_is_being_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "CHUNK_BYTES", 4096)
    tensors = Tensors.of_shapes((512, 512))
    with serving(tensors, TCP, max_bandwidth=1 << 20) as (_, source):
        with running(tmp_path, sources=(source,)) as cache:
            wait_until(lambda: cache.shelf.items() and cache.shelf.items()[0].held > 0)
            assert not roots(cache.shelf)
            found = given(socket_of(tmp_path), request_for(tensors))
            assert found is not None
            tensors.assert_in(found.pages)


def test_several_models_come_from_several_sources_and_are_relayed_apart(tmp_path: Path) -> None:
    other = msgspec.structs.replace(IDENTITY, name="org/other")
    with serving(SMALL, TCP) as (_, one), serving(OTHER, TCP, identity=other) as (_, two):
        with running(tmp_path, host="127.0.0.1", port=0, sources=(one, two)) as cache:
            wait_until(lambda: len(roots(cache.shelf)) == 2)
            address = Endpoint("127.0.0.1", cache.port)
            for tensors, name in ((SMALL, IDENTITY.name), (OTHER, "org/other")):
                _, fetched = fetch(request_for(name=name), TCP, address)
                tensors.assert_in(fetched.memory)
                fetched.memory.close()


def test_what_an_engine_hands_over_meanwhile_counts(tmp_path: Path) -> None:
    with serving(SMALL, TCP) as (_, source), running(tmp_path, sources=(source,)) as cache:
        assert handed(socket_of(tmp_path))
        wait_until(lambda: len(cache.shelf.items()) == 1 and roots(cache.shelf))
        assert given(socket_of(tmp_path)) is not None


def test_one_cache_fills_another_with_all_that_it_holds(tmp_path: Path) -> None:
    with running(tmp_path / "one", host="127.0.0.1", port=0) as one:
        for name, rank in (("org/a", 0), ("org/a", 1), ("org/b", 0)):
            request = request_for(name=name, coordinates=RankCoordinates(tp_rank=rank, tp_size=2))
            assert handed(socket_of(tmp_path / "one"), request=request)
        wait_until(lambda: len(roots(one.shelf)) == 3)
        with running(tmp_path / "two", sources=(Endpoint("127.0.0.1", one.port),)) as two:
            wait_until(lambda: len(roots(two.shelf)) == 3)
            found = {
                (item.contents.request.identity.name, item.contents.request.coordinates.tp_rank)
                for item in two.shelf.items()
            }
    assert found == {("org/a", 0), ("org/a", 1), ("org/b", 0)}
