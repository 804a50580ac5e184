"""What an operator meets: memory that exists once, and configuration that is wrong."""

from __future__ import annotations

import pytest

from support.vllm.loaders import Load


def test_raw_bytes_exist_once(smollm2: str, load: Load) -> None:
    server = load(smollm2).finish_loading()
    assert server.result["private_bytes"] < 0.05 * server.result["parameter_bytes"] + (8 << 20)


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
