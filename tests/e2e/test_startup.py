"""What is wrong with an instance's surroundings shows before anything is loaded."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.vllm.loaders import Load, Pool
from support.wait import wait_until
from vllm_ascend.model_loader.netloader.client.inquiry import inquire
from vllm_ascend.model_loader.netloader.endpoint import Endpoint

NETLOADERS_OWN = ("blake3", "cryptography", "xxhash")
"""Packages without which vLLM starts, and Netloader does not."""


def test_a_wrong_value_stops_the_start_before_anything_is_loaded(untied: str, load: Load, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    wrong = {
        "LISTEN_HOST": ".svc.cluster.local",
        "OUTPUT_PREFIX": f"{tmp_path}/file/rank-",
        "REPORT_PREFIX": f"{tmp_path}/file/rank-",
    }
    for key, value in wrong.items():
        loader = load(untied, {key: value})
        assert loader.fails_with().startswith("ConfigError: ")
        assert "Loading safetensors" not in loader.log_text()
        loader.end()
    elsewhere = load(untied, {"LISTEN_HOST": "192.0.2.1"})
    assert "is not at an address of this machine" in elsewhere.fails_with()
    assert "Loading safetensors" not in elsewhere.log_text()


def test_the_port_of_vllm_itself_is_left_to_it(untied: str, load: Load) -> None:
    """vLLM binds its HTTP port with this option when it starts, and listens when all is loaded."""
    with socket.socket() as vllms_own:
        vllms_own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        vllms_own.bind(("", 0))
        port = vllms_own.getsockname()[1]
        unserved = load(untied, {"LISTEN_PORT": port}).finish_loading()
        vllms_own.listen()
    assert unserved.report["outcome"] == "disk"
    assert f"127.0.0.1:{port} is bound by another socket" in unserved.report["not_served"]
    log = unserved.log_text()
    assert log.index("cannot be served") < log.index("Loading safetensors")


def test_a_broken_installation_hinders_nobody_but_those_who_ask_for_netloader() -> None:
    program = f"""
import sys
sys.modules.update(dict.fromkeys({NETLOADERS_OWN}))
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader import get_model_loader
print("others load by", type(get_model_loader(LoadConfig(load_format="auto"))).__name__)
print("imported:", *(name for name in sys.modules if name.startswith("vllm_ascend.model_loader.netloader.")))
get_model_loader(LoadConfig(load_format="netloader"))
"""
    chosen = {**os.environ, "VLLM_PLUGINS": "ascend,ascend_model_loader"}  # as upstream's documentation has it
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=200, check=False, env=chosen
    )
    assert "others load by DefaultModelLoader" in done.stdout, done.stderr
    assert "imported: vllm_ascend.model_loader.netloader.registration\n" in done.stdout
    assert done.returncode == 1
    assert re.search(r"BrokenInstallation: .* because \w+ cannot be imported", done.stderr)


@pytest.mark.timeout(200)
def test_sigterm_while_loading_ends_it_at_once_and_leaves_nothing(untied: str, load: Load) -> None:
    server = load(untied, {"MAX_BANDWIDTH": 1 << 20}).finish_loading()
    source = Endpoint.parse(server.address)
    client = load(untied, {"SOURCE": [server.address], "TRANSPORT": ["tcp"], "FALLBACK": "error"})
    wait_until(lambda: inquire(source, 10).sessions, 100, interval=0.1)
    process, directory = client.process.process, client.log.parent
    files = set(directory.iterdir())
    process.terminate()
    assert process.wait(30) == -signal.SIGTERM
    wait_until(lambda: not inquire(source, 10).sessions, 100, interval=0.1)
    assert "went away" in server.log_text()
    assert set(directory.iterdir()) == files
    assert f"/proc/{process.pid}" not in map(str, Path("/proc").iterdir())


@pytest.fixture
def of_nobody(tmp_path: Path) -> Iterator[Pool]:
    """Processes of a user without rights, but to read what root reads: where the interpreter lies is not the matter."""
    setpriv = shutil.which("setpriv")
    if os.geteuid() != 0 or setpriv is None:
        pytest.skip("only root can start processes of another user, and does it by setpriv")
    home = tmp_path / "home"
    home.mkdir()
    os.chown(home, 65534, 65534)
    python = tmp_path / "python"
    reading = "--inh-caps=+dac_read_search --ambient-caps=+dac_read_search"
    python.write_text(
        f'#!/bin/sh\nexec {setpriv} --reuid=65534 --regid=65534 --clear-groups {reading} {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    pool = Pool(home, str(python), {"HOME": str(home), "TMPDIR": str(home), "PYTHONDONTWRITEBYTECODE": "1"})
    yield pool
    pool.end()


def test_a_user_without_rights_takes_weights_and_serves_them(untied: str, load: Load, of_nobody: Pool) -> None:
    server = load(untied).finish_loading()
    from_disk = of_nobody.load(untied).finish_loading()
    assert from_disk.digests == server.digests
    assert from_disk.report["not_served"] is None
    from_disk.end()
    nobodys = of_nobody.load(untied, {"SOURCE": [server.address], "FALLBACK": "error"}).finish_loading()
    assert nobodys.digests == server.digests
    assert nobodys.report["transport"] == "tcp"
    assert [attempt["transport"] for attempt in nobodys.report["attempts"]] == ["shared_memory"]
    server.end()
    after_it = load(untied, {"SOURCE": [nobodys.address], "FALLBACK": "error"}).finish_loading()
    assert after_it.digests == server.digests


def test_two_engines_in_one_process_are_both_served(untied: str, fine_tune: str, load: Load, tmp_path: Path) -> None:
    first = load(untied, prompts=[[1, 2, 3]]).finish_loading()
    second = {
        "model": fine_tune,
        "beside": True,
        "digests": True,
        "prompts": [[1, 2, 3]],
        "engine": {"skip_tokenizer_init": True},
        "extra": {"LISTEN_HOST": "127.0.0.1", "OUTPUT_PREFIX": f"{tmp_path}/second-"},
    }
    first.process.ask(second)
    reply = first.process.reply()
    assert "result" in reply, first.log_text()[-4000:]
    other = (tmp_path / "second-0.txt").read_text().strip()
    assert other != first.address
    asking = {"TRANSPORT": ["shared_memory"], "FALLBACK": "error"}
    assert load(untied, {"SOURCE": [first.address], **asking}).finish_loading().digests == first.digests
    assert load(fine_tune, {"SOURCE": [other], **asking}).finish_loading().digests == reply["result"]["digests"]
