"""Sources that fail, each in its own way: the instance starts from disk, says why, and serves like any other.

All tests look at the same few loads, because each takes seconds.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.peers.proxy import Fault, Proxy, Stream, kill
from support.vllm.loaders import Load, Loader, Pool, loading
from vllm_ascend.model_loader.netloader.endpoint import Endpoint


@pytest.fixture(scope="module")
def load(pool: Pool) -> Iterator[Load]:
    with loading(pool) as load:
        yield load


@dataclass(frozen=True)
class Fallback:
    """A model that `server` loaded from disk, and two loads of it that met the same failing sources, given by address.

    `from_disk` might use the disk, and `stopped` might not: it ended with `error`.
    """

    server: Loader
    from_disk: Loader
    stopped: Loader
    error: str
    closed: str
    silent: str
    of_a_fine_tune: str
    cut: str


@pytest.fixture(scope="module")
def fallback(untied: str, fine_tune: str, load: Load) -> Fallback:
    server, other = load(untied), load(fine_tune)
    server.finish_loading()
    half = Fault(Stream.PAYLOAD, server.result["parameter_bytes"] // 2, kill)
    with contextlib.ExitStack() as scope:
        cut = scope.enter_context(Proxy(Endpoint.parse(server.address), half))
        unbound = scope.enter_context(socket.create_server(("127.0.0.1", 0)))
        mute = scope.enter_context(socket.create_server(("127.0.0.1", 0)))
        closed = f"127.0.0.1:{unbound.getsockname()[1]}"
        unbound.close()
        silent = f"127.0.0.1:{mute.getsockname()[1]}"
        other.finish_loading()

        sources = [closed, silent, other.address, str(cut.endpoint)]
        extra = {"SOURCE": sources, "CONNECT_TIMEOUT": 5, "TRANSPORT": ["tcp"]}
        from_disk, stopped = load(untied, extra), load(untied, {**extra, "FALLBACK": "error"})
        from_disk.finish_loading()
        error = stopped.fails_with()
    return Fallback(server, from_disk, stopped, error, *sources)


def test_an_instance_whose_sources_all_fail_starts_from_disk(fallback: Fallback) -> None:
    assert fallback.from_disk.digests == fallback.server.digests
    assert fallback.from_disk.report["outcome"] == "disk"
    assert fallback.from_disk.log_text().count("no source delivered the weights, loading from disk") == 1


def test_the_report_says_why_each_source_failed(fallback: Fallback) -> None:
    reasons = {attempt["source"]: attempt["reason"] for attempt in fallback.from_disk.report["attempts"]}
    assert "no connection" in reasons[fallback.closed]
    assert "it did not greet: the peer was silent" in reasons[fallback.silent]
    assert "fingerprint" in reasons[fallback.of_a_fine_tune]
    assert fallback.cut in reasons


def test_an_instance_that_may_not_use_the_disk_stops_and_says_why(fallback: Fallback) -> None:
    assert fallback.error.startswith("SourcesExhausted")
    assert "fingerprint" in fallback.error
    assert fallback.stopped.report["outcome"] == "failed"


@dataclass(frozen=True)
class Descendants:
    """Loads that took their weights from one another, beginning with one that fell back to its disk.

    `elsewhere` has the same checkpoint at another path. `named` is known by the name MODEL, and `without_weights` has a
    configuration and no weights at all.
    """

    elsewhere: Loader
    named: Loader
    without_weights: Loader


@pytest.fixture(scope="module")
def descendants(untied: str, fallback: Fallback, load: Load, tmp_path_factory: pytest.TempPathFactory) -> Descendants:
    directory: Path = tmp_path_factory.mktemp("checkpoints-elsewhere")
    moved, bare = directory / "moved", directory / "bare"
    shutil.copytree(untied, moved)
    shutil.copytree(untied, bare, ignore=shutil.ignore_patterns("*.safetensors"))

    def taken_from(source: Loader, model: object, **extra: str) -> Loader:
        return load(str(model), {"SOURCE": [source.address], "FALLBACK": "error", **extra}).finish_loading()

    elsewhere = taken_from(fallback.from_disk, moved)
    named = taken_from(elsewhere, untied, MODEL="org/m")
    return Descendants(elsewhere, named, taken_from(named, bare, MODEL="org/m"))


def test_what_fell_back_to_disk_serves_instances_with_the_checkpoint_elsewhere_or_without_one(
    fallback: Fallback, descendants: Descendants
) -> None:
    for loader in (descendants.elsewhere, descendants.named, descendants.without_weights):
        assert loader.digests == fallback.server.digests


def test_weights_that_came_by_name_are_still_known_by_their_checkpoint(
    fine_tune: str, descendants: Descendants, load: Load
) -> None:
    source = descendants.without_weights.address
    mistaken = load(fine_tune, {"SOURCE": [source], "MODEL": "org/m"}).finish_loading()
    assert mistaken.report["outcome"] == "disk"
    assert "fingerprint" in mistaken.report["attempts"][0]["reason"]
