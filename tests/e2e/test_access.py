"""Real instances behind a token and TLS: those of the deployment exchange weights, strangers learn nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.certificates import Authority
from support.vllm.loaders import Load
from vllm_ascend.model_loader.netloader import cli


def test_only_instances_of_the_deployment_exchange_weights(
    untied: str, load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    token, other_token = tmp_path / "token", tmp_path / "other-token"
    token.write_text("0123456789abcdef0123456789abcdef\n")
    other_token.write_text("fedcba9876543210fedcba9876543210\n")
    ours = Authority(tmp_path, "ours").identify("instance")
    tls = {"TLS_CERT": ours.cert, "TLS_KEY": ours.key, "TLS_CA": ours.ca}
    both = {"TOKEN_FILE": str(token), **tls}

    server = load(untied, both).finish_loading()
    asking = {"SOURCE": [server.address], "TRANSPORT": ["tcp"]}
    client = load(untied, {**asking, **both, "FALLBACK": "error"})
    stranger = load(untied, asking)
    assert client.finish_loading().digests == server.digests
    assert client.report["verified"] == "blake3"
    assert client.report["received"] == {server.address: client.report["bytes"]}

    assert stranger.finish_loading().report["outcome"] == "disk"
    assert "it did not greet" in stranger.report["attempts"][0]["reason"]
    other = load(untied, {**asking, **tls, "TOKEN_FILE": str(other_token)}).finish_loading()
    assert other.report["outcome"] == "disk"
    assert "it refused: the token is not the one of this server" in other.report["attempts"][0]["reason"]

    warning = "whoever can reach the listener on 127.0.0.1 can read the weights"
    assert warning not in server.log_text()
    assert "turned away 127.0.0.1" in server.log_text()
    assert str(token.read_text().strip()) not in server.log_text() + client.log_text()

    files = ["--token-file", str(token), "--tls-cert", ours.cert, "--tls-key", ours.key, "--tls-ca", ours.ca]
    assert cli.main(["status", server.address, *files]) == 0
    assert "generation 1" in capsys.readouterr().out
    assert cli.main(["status", server.address]) == 1
    assert "generation" not in capsys.readouterr().out


def test_a_wrong_file_stops_the_start(untied: str, load: Load, tmp_path: Path) -> None:
    short = tmp_path / "short"
    short.write_text("secret")
    assert "expected at least 16" in load(untied, {"TOKEN_FILE": str(short)}).fails_with()
