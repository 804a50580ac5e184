"""What is wrong with an instance's surroundings shows before anything is loaded."""

from __future__ import annotations

import importlib.metadata
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from loaders import Load

OF_VLLM_TOO = {"msgspec", "numpy", "tqdm"}
"""Requirements without which vLLM does not start either."""


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


@pytest.mark.parametrize("reuse_port", [0, 1], ids=["one API server", "several"])
def test_the_port_of_vllm_itself_is_left_to_it(untied: str, load: Load, reuse_port: int) -> None:
    """vLLM binds its HTTP port with these options when it starts, and listens when all is loaded."""
    with socket.socket() as vllms_own:
        vllms_own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        vllms_own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, reuse_port)
        vllms_own.bind(("", 0))
        port = vllms_own.getsockname()[1]
        unserved = load(untied, {"LISTEN_PORT": port}).finish_loading()
        vllms_own.listen()
    assert unserved.report["outcome"] == "disk"
    assert f"127.0.0.1:{port} is bound by another socket" in unserved.report["not_served"]
    log = unserved.log_text()
    assert log.index("cannot be served") < log.index("Loading safetensors")


def test_a_broken_installation_hinders_nobody_but_those_who_ask_for_netloader() -> None:
    requirements = [re.split(r"[^\w.-]", text)[0] for text in importlib.metadata.requires("vllm-ascend") or []]
    program = f"""
import sys
broken = {set(requirements) - OF_VLLM_TOO}
sys.modules.update(dict.fromkeys(broken))
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader import get_model_loader
print("others load by", type(get_model_loader(LoadConfig(load_format="auto"))).__name__)
print("imported:", *(name for name in sys.modules if name.startswith("vllm_ascend.model_loader.netloader.")))
get_model_loader(LoadConfig(load_format="netloader"))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200, check=False)
    assert "others load by DefaultModelLoader" in done.stdout, done.stderr
    assert "imported: vllm_ascend.model_loader.netloader.registration\n" in done.stdout
    assert done.returncode == 1
    assert re.search(
        r"BrokenInstallation: .* because \w+ cannot be imported .* -m pip install --force-rei", done.stderr
    )
