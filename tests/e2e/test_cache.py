"""Engines that are gone, and whose weights are not: what real ones leave in the cache of their host, and get back."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.caches import socket_of
from support.vllm.loaders import Load
from support.wait import wait_until
from vllm_ascend.model_loader.netloader.cache.line import connect
from vllm_ascend.model_loader.netloader.cache.messages import Ask, HeldWeights, State

PROMPTS = [[5, 17, 31, 2], list(range(40, 100)), [7]]
BESIDE_THE_WEIGHTS = 100 << 20


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A cache in a process of its own. It ends in an orderly way."""
    command = [sys.executable, "-m", "vllm_ascend.model_loader.netloader.cli", "cache"]
    with (tmp_path / "cache.log").open("wb") as log:
        process = subprocess.Popen([*command, "--socket", str(socket_of(tmp_path))], stderr=log)
    try:
        wait_until(socket_of(tmp_path).is_socket)
        yield process
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait(20)


def verified(tmp_path: Path) -> list[HeldWeights]:
    """What the cache holds for certain."""
    with connect(socket_of(tmp_path), 10) as line:
        line.send(Ask(), 10)
        with line.receive(10) as received:
            assert isinstance(received.message, State)
            return [each for each in received.message.holdings if each.root]


def bytes_beside_the_weights(pid: int) -> int:
    """The memory of a process that is not in an arena."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    kibibytes = {line.split()[0]: int(line.split()[1]) for line in lines if line.startswith("Rss")}
    return (kibibytes["RssAnon:"] + kibibytes["RssFile:"]) << 10


@pytest.mark.timeout(400)
def test_an_engine_that_is_killed_has_its_weights_back_from_the_cache(
    smollm2: str, load: Load, tmp_path: Path, cache: subprocess.Popen[bytes]
) -> None:
    use = {"CACHE": str(socket_of(tmp_path))}
    first = load(smollm2, use, prompts=PROMPTS).finish_loading()
    assert first.report["outcome"] == "disk"
    wait_until(lambda: verified(tmp_path), 60)
    (held,) = verified(tmp_path)
    assert held.nbytes == first.report["bytes"]
    assert bytes_beside_the_weights(cache.pid) < BESIDE_THE_WEIGHTS

    first.process.process.send_signal(signal.SIGKILL)
    first.process.process.wait(20)
    again = load(smollm2, {**use, "FALLBACK": "error"}, prompts=PROMPTS).finish_loading()
    assert (again.report["outcome"], again.report["source"]) == ("cache", str(socket_of(tmp_path)))
    assert (again.report["root"], again.report["verified"]) == (held.root, "blake3")
    assert again.digests == first.digests
    assert again.answers == first.answers

    beside_it = load(smollm2, {"SOURCE": [again.address], "FALLBACK": "error", "CACHE": "off"}).finish_loading()
    assert beside_it.report["outcome"] == "p2p"
    assert beside_it.digests == first.digests
    assert len(verified(tmp_path)) == 1
    assert bytes_beside_the_weights(cache.pid) < BESIDE_THE_WEIGHTS


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_reload_replaces_what_the_cache_holds_and_files_decide_what_it_gives(
    untied: str, fine_tune: str, load: Load, tmp_path: Path, cache: subprocess.Popen[bytes]
) -> None:
    model, use = tmp_path / "model", {"CACHE": str(socket_of(tmp_path))}
    shutil.copytree(untied, model)
    first = load(str(model), use, prompts=PROMPTS).finish_loading()
    wait_until(lambda: verified(tmp_path), 60)
    (before,) = verified(tmp_path)

    for file in Path(fine_tune).glob("*.safetensors"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(model / file.name)
        shutil.copyfile(file, model / file.name)
    first.reload(PROMPTS)
    reloaded = first.finish_loading().answers
    assert first.report["outcome"] == "disk"
    wait_until(lambda: [each.root for each in verified(tmp_path)] not in ([], [before.root]), 60)
    (after,) = verified(tmp_path)
    assert after.identity.fingerprint != before.identity.fingerprint

    of_the_new_files = load(str(model), {**use, "FALLBACK": "error"}, prompts=PROMPTS).finish_loading()
    assert of_the_new_files.report["outcome"] == "cache"
    assert of_the_new_files.answers == reloaded
    of_the_old_files = load(untied, {**use, "MODEL": "other"}).finish_loading()
    assert of_the_old_files.report["outcome"] == "disk"
