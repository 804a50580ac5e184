"""Whether vLLM gets the NPU platform: on this machine torch_npu is what a test writes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

MISSING_LIBRARY = "raise ImportError('libhccl.so: cannot open shared object file')"


TWO_DEVICES, NO_DEVICE = (f"class npu:\n    device_count = lambda: {count}" for count in (2, 0))


def registering(directory: Path, torch_npu: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """`register` in a fresh interpreter, where torch_npu has this text."""
    (directory / "torch_npu.py").write_text(torch_npu)
    script = "import sys, vllm_ascend\nprint(vllm_ascend.register())\nassert 'torch' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": str(directory), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", **variables}
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=100, env=environment
    )


@pytest.mark.parametrize(
    ("torch_npu", "platform"),
    [
        (TWO_DEVICES, "vllm_ascend.platform.NPUPlatform"),
        (NO_DEVICE, "None"),
        (MISSING_LIBRARY, "None"),
    ],
    ids=["two devices", "no device", "without CANN"],
)
def test_the_platform_is_for_machines_with_an_npu(torch_npu: str, platform: str, tmp_path: Path) -> None:
    assert registering(tmp_path, torch_npu).stdout.split() == [platform]


def test_a_torch_npu_that_cannot_be_imported_is_told(tmp_path: Path) -> None:
    told = registering(tmp_path, MISSING_LIBRARY).stderr
    assert "torch_npu is installed but cannot be imported (libhccl.so: cannot open shared object file)" in told
    assert "set_env.sh" in told


@pytest.mark.parametrize(
    ("torch_npu", "plugins", "is_told"),
    [
        (NO_DEVICE, "ascend", True),
        (NO_DEVICE, "ascend,ascend_model_loader", False),
        (TWO_DEVICES, "ascend", False),
    ],
    ids=["the platform alone", "the platform and the loader", "the platform alone where it is used"],
)
def test_a_choice_of_plugins_that_chooses_nothing_is_told(
    torch_npu: str, plugins: str, is_told: bool, tmp_path: Path
) -> None:
    """On NPUs, the configuration refuses a load format that is not there, and says this too."""
    told = registering(tmp_path, torch_npu, VLLM_PLUGINS=plugins).stderr
    expected = f"VLLM_PLUGINS={plugins!r} leaves out 'ascend_model_loader', so there is no load format netloader\n"
    assert told == (expected if is_told else "")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_which_heads_attention_takes_depends_on_whether_they_share_keys(dtype: str) -> None:
    import torch

    from vllm_ascend.attention.rules import Heads, refusals

    def taken(queries: int, key_values: int) -> list[int]:
        sizes = [32, 64, 72, 80, 128, 192, 256, 272]
        return [size for size in sizes if not list(refusals(Heads(size, queries, key_values), getattr(torch, dtype)))]

    assert taken(queries=8, key_values=2) == [32, 64, 80, 128, 192, 256]
    assert taken(queries=8, key_values=8) == ([64, 128] if dtype == "bfloat16" else [])
    assert taken(queries=64, key_values=1) == taken(queries=8, key_values=2)
    assert taken(queries=65, key_values=1) == []
    assert taken(queries=258, key_values=86) == []
