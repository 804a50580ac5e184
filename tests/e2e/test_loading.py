"""What an operator meets: sources that fail, checkpoints elsewhere, memory, wrong configuration."""

from __future__ import annotations

import contextlib
import shutil
import socket
from pathlib import Path

import pytest

from support.proxy import Fault, Proxy, Stream, kill
from support.vllm.loaders import Load
from vllm_ascend.model_loader.netloader.endpoint import Endpoint


def test_raw_bytes_exist_once(smollm2: str, load: Load) -> None:
    server = load(smollm2).finish_loading()
    assert server.result["private_bytes"] < 0.05 * server.result["parameter_bytes"] + (8 << 20)


def test_whatever_fails_the_instance_starts_from_disk(untied: str, fine_tune: str, load: Load, tmp_path: Path) -> None:
    """Each of these sources fails in its own way; one start tries them all and loads from disk in the end."""
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
        extra = {
            "SOURCE": [closed, silent, other.address, str(cut.endpoint)],
            "CONNECT_TIMEOUT": 5,
            "TRANSPORT": ["tcp"],
        }
        fallen_back, stopped = load(untied, extra), load(untied, {**extra, "FALLBACK": "error"})
        digests = fallen_back.finish_loading().digests
        error = stopped.fails_with()
    assert digests == server.digests
    report = fallen_back.report
    assert report["outcome"] == "disk"
    reasons = {attempt["source"]: attempt["reason"] for attempt in report["attempts"]}
    assert "no connection" in reasons[closed]
    assert "it did not greet: the peer was silent" in reasons[silent]
    assert "fingerprint" in reasons[other.address]
    assert str(cut.endpoint) in reasons
    assert fallen_back.log_text().count("no source delivered the weights, loading from disk") == 1
    assert error.startswith("SourcesExhausted")
    assert "fingerprint" in error
    assert stopped.report["outcome"] == "failed"

    # What fell back serves in turn, and to a client that has the checkpoint elsewhere, or no weights at all.
    moved, bare = tmp_path / "moved", tmp_path / "bare"
    shutil.copytree(untied, moved)
    shutil.copytree(untied, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    elsewhere = load(str(moved), {"SOURCE": [fallen_back.address], "FALLBACK": "error"})
    named = load(untied, {"SOURCE": [elsewhere.finish_loading().address], "FALLBACK": "error", "MODEL": "org/m"})
    assert elsewhere.digests == server.digests
    assert named.finish_loading().digests == server.digests
    without_weights = load(str(bare), {"SOURCE": [named.address], "FALLBACK": "error", "MODEL": "org/m"})
    assert without_weights.finish_loading().digests == server.digests

    # Weights that came by name are still known by their checkpoint.
    mistaken = load(fine_tune, {"SOURCE": [without_weights.address], "MODEL": "org/m"}).finish_loading()
    assert mistaken.report["outcome"] == "disk"
    assert "fingerprint" in mistaken.report["attempts"][0]["reason"]


def test_serve_false_opens_no_listener_and_frees_the_raw_bytes(untied: str, load: Load) -> None:
    server = load(untied).finish_loading()
    quiet = load(untied, {"SOURCE": [server.address], "TRANSPORT": ["tcp"], "SERVE": False})
    from_disk = load(untied, {"SERVE": False})
    for loader in (quiet, from_disk):
        assert loader.finish_loading().digests == server.digests
        assert loader.report["listening"] is None
        assert loader.report["not_served"] == "SERVE is false"
    assert 0 < quiet.arena_bytes() < 0.5 * server.result["parameter_bytes"]
    assert from_disk.arena_bytes() == 0


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"SOURCES": ["127.0.0.1:1"]}, "unknown Netloader key 'SOURCES' (value ['127.0.0.1:1']): did you mean SOURCE?"),
        ({"LISTEN_PORT": 70000}, "Netloader key LISTEN_PORT has the value 70000: expected a port number"),
    ],
    ids=["unknown key", "wrong value"],
)
def test_wrong_configuration_stops_the_start(untied: str, load: Load, extra: dict[str, object], message: str) -> None:
    assert message in load(untied, extra).fails_with()
