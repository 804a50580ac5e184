"""What a cache serves to other hosts, and to whom."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.caches import await_held, handed, request_for, running, socket_of
from support.sources import SMALL, fetch
from support.wait import wait_until
from vllm_ascend.model_loader.netloader.cache.process import Cache
from vllm_ascend.model_loader.netloader.client.inquiry import inquire
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import SourceError, SourcesExhausted
from vllm_ascend.model_loader.netloader.transport.registry import transports
from vllm_ascend.model_loader.netloader.weights.identity import RankCoordinates
from vllm_ascend.model_loader.netloader.wire.access import Access

pytestmark = pytest.mark.timeout(60)
TOKEN = Access(b"a token of thirty-two bytes long")


def address(cache: Cache) -> Endpoint:
    return Endpoint("127.0.0.1", cache.port)


def roots(cache: Cache, access: Access | None = None) -> set[str]:
    return {holding.root for holding in inquire(address(cache), 5, access).holdings}


@pytest.mark.parametrize("transport", ["tcp", "shared_memory"])
def test_it_serves_what_it_holds_like_an_engine(tmp_path: Path, transport: str) -> None:
    with running(tmp_path, host="127.0.0.1", port=0) as cache:
        names = ["org/a", "org/b"]
        for name in names:
            assert handed(socket_of(tmp_path), request=request_for(name=name))
        assert handed(socket_of(tmp_path), request=request_for(coordinates=RankCoordinates(tp_size=2), name="org/b"))
        await_held(cache, 3)
        for name in names:
            _, fetched = fetch(request_for(name=name), transports([transport]), address(cache))
            SMALL.assert_in(fetched.memory)
            fetched.memory.close()
        with pytest.raises(SourcesExhausted, match=r"name \(here org/c, there org/"):
            fetch(request_for(name="org/c", fingerprint=""), transports([transport]), address(cache))
        assert len(inquire(address(cache), 5).holdings) == 3


def test_without_a_port_it_serves_nobody_else(tmp_path: Path) -> None:
    with running(tmp_path) as cache:
        assert cache.port == 0
        assert cache.server is None


def test_what_is_given_up_is_served_no_more(tmp_path: Path) -> None:
    with running(tmp_path, host="127.0.0.1", port=0) as cache:
        assert handed(socket_of(tmp_path))
        await_held(cache)
        assert roots(cache) == {cache.shelf.items()[0].contents.root}
        cache.shelf.drop("")
        assert roots(cache) == set()


def test_weights_that_were_replaced_are_served_no_more(tmp_path: Path) -> None:
    with running(tmp_path, host="127.0.0.1", port=0) as cache:
        for fingerprint in ("one", "two"):
            assert handed(socket_of(tmp_path), request=request_for(fingerprint=fingerprint))
        wait_until(
            lambda: (
                [each.identity.fingerprint for each in inquire(address(cache), 5).holdings] == ["two"]
                and cache.shelf.items()[0].is_whole
            )
        )


def test_weights_of_an_engine_with_a_token_are_not_served_without_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with running(tmp_path, host="127.0.0.1", port=0) as cache:
        assert handed(socket_of(tmp_path), guards=frozenset({"token"}))
        assert handed(socket_of(tmp_path), request=request_for(name="org/open"))
        await_held(cache, 2)
        held_open = [holding.identity.name for holding in inquire(address(cache), 5).holdings]
    assert held_open == ["org/open"]
    assert "are not served to other hosts: they come from an engine with token" in caplog.text


def test_a_cache_with_a_token_of_its_own_serves_those_who_know_it(tmp_path: Path) -> None:
    with running(tmp_path, host="127.0.0.1", port=0, access=TOKEN) as cache:
        for guards, name in ((frozenset({"token"}), "org/a"), (frozenset[str](), "org/b")):
            assert handed(socket_of(tmp_path), guards=guards, request=request_for(name=name))
        assert handed(socket_of(tmp_path), guards=frozenset({"tls", "token"}), request=request_for(name="org/c"))
        await_held(cache, 3)
        assert {each.identity.name for each in inquire(address(cache), 5, TOKEN).holdings} == {"org/a", "org/b"}
        with pytest.raises(SourceError):
            inquire(address(cache), 5)
