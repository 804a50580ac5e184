"""Instances of several ranks: each rank of a client finds its peer, given one address of any rank."""

from __future__ import annotations

import contextlib
import socket
import uuid
from pathlib import Path

import pytest
from loaders import Load, Loader


def start_ranks(load: Load, model: str, rendezvous: Path, extra: dict[str, object], kind: str) -> list[Loader]:
    """The two processes of an instance whose engine argument `kind` is 2, not waited for."""
    # vLLM names shared memory after this file, so its name must not recur.
    init_method = f"file://{rendezvous}-{uuid.uuid4().hex}"
    return [load(model, extra, rank=rank, init_method=init_method, engine={kind: 2}) for rank in range(2)]


def two_free_ports() -> int:
    """The first of two neighbouring ports that were free a moment ago."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as first, contextlib.suppress(OSError, OverflowError):
            port: int = first.getsockname()[1]
            with socket.create_server(("127.0.0.1", port + 1)):
                return port


@pytest.mark.parametrize("kind", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_every_rank_finds_its_peer_from_one_address(untied: str, load: Load, tmp_path: Path, kind: str) -> None:
    port = two_free_ports()
    servers = start_ranks(load, untied, tmp_path / "server", {"LISTEN_PORT": port}, kind)
    addresses = [server.finish_loading().address for server in servers]
    assert addresses == [f"127.0.0.1:{port}", f"127.0.0.1:{port + 1}"]
    assert servers[0].digests != servers[1].digests

    one_address = {"SOURCE": [addresses[1]], "FALLBACK": "error"}
    clients = start_ranks(load, untied, tmp_path / "client", one_address, kind)
    for rank, client in enumerate(clients):
        assert client.finish_loading().digests == servers[rank].digests
        assert client.report["source"] == addresses[rank]
        assert client.report["attempts"] == []

    whole = load(untied, {"SOURCE": addresses}).finish_loading()
    assert whole.report["outcome"] == "disk"
    name = "tp_size" if kind == "tensor_parallel_size" else "pp_size"
    assert f"{name} (here 1, there 2)" in whole.report["attempts"][0]["reason"]
