"""What an operator meets: sources that fail, checkpoints elsewhere, memory, wrong configuration."""

from __future__ import annotations

import shutil
import socket
import threading
from pathlib import Path

import pytest

from support.vllm.loaders import Load


def test_raw_bytes_exist_once(smollm2: str, load: Load) -> None:
    server = load(smollm2).finish_loading()
    assert server.result["private_bytes"] < 0.05 * server.result["parameter_bytes"] + (8 << 20)


class Relay:
    """A TCP proxy in front of a server that cuts every connection once `limit` bytes have come back through it."""

    def __init__(self, target: str, limit: int) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._left = limit
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._target)
            except OSError:
                return
            self._sockets += [client, server]
            threading.Thread(target=self._pump, args=(client, server, False), daemon=True).start()
            threading.Thread(target=self._pump, args=(server, client, True), daemon=True).start()

    def _pump(self, source: socket.socket, destination: socket.socket, counted: bool) -> None:
        try:
            while data := source.recv(1 << 16):
                destination.sendall(data)
                self._left -= len(data) if counted else 0
                if self._left < 0:
                    self.close()
        except OSError:
            self.close()

    def close(self) -> None:
        self._listener.close()
        for each in self._sockets:
            try:
                each.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue


def test_whatever_fails_the_instance_starts_from_disk(untied: str, fine_tune: str, load: Load, tmp_path: Path) -> None:
    """Each of these sources fails in its own way; one start tries them all and loads from disk in the end."""
    server, other = load(untied), load(fine_tune)
    server.finish_loading()
    cut = Relay(server.address, limit=server.result["parameter_bytes"] // 2)
    with socket.create_server(("127.0.0.1", 0)) as unbound, socket.create_server(("127.0.0.1", 0)) as mute:
        closed = f"127.0.0.1:{unbound.getsockname()[1]}"
        unbound.close()
        silent = f"127.0.0.1:{mute.getsockname()[1]}"
        other.finish_loading()
        extra = {"SOURCE": [closed, silent, other.address, cut.address], "CONNECT_TIMEOUT": 5, "TRANSPORT": ["tcp"]}
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
    assert cut.address in reasons
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
