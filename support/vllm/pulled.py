"""What `netloader pull` has taken from a server, loaded by vLLM: with its own sharded format, or from there again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.vllm.loaders import Loader
from vllm_ascend.model_loader.netloader import cli

CANNOT_BE_WRITTEN = 3
"""The exit status for what the sharded format cannot hold."""
Again = Callable[..., list[Loader]]
"""Starts the loads of an instance: again(directory, extra, load_format=...)."""


def pull(server: Loader, out: Path, *options: str) -> int:
    """The exit status of the command."""
    return cli.main(["pull", server.address, "--out", str(out), *options])


def assert_pulled(servers: list[Loader], directory: Path, again: Again) -> None:
    """The directory that a pull from the last of the ranks `servers` leaves is loaded by vLLM's own sharded format, and
    with the small files only, from the servers: both times every rank has what its server has.
    """
    assert pull(servers[-1], directory / "whole") == 0
    assert pull(servers[-1], directory / "files", "--files-only") == 0
    assert not list((directory / "files").glob("*.safetensors"))

    source: dict[str, Any] = {"SOURCE": [servers[-1].address], "FALLBACK": "error", "TRANSPORT": ["tcp"]}
    for folder, extra, load_format in (("whole", {}, "sharded_state"), ("files", source, "netloader")):
        loads = again(str(directory / folder), extra, load_format=load_format)
        for server, client in zip(servers, loads, strict=True):
            client.finish_loading()
            assert client.digests == server.digests
            assert client.result.get("answers") == server.result.get("answers")
            assert load_format != "netloader" or client.report["outcome"] == "p2p"
            client.end()
