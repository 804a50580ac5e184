"""Whether vLLM gets the NPU platform: on this machine torch_npu is what a test writes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

MISSING_LIBRARY = "raise ImportError('libhccl.so: cannot open shared object file')"


def registering(directory: Path, torch_npu: str) -> subprocess.CompletedProcess[str]:
    """`register` in a fresh interpreter, where torch_npu has this text."""
    (directory / "torch_npu.py").write_text(torch_npu)
    script = "import sys, vllm_ascend\nprint(vllm_ascend.register())\nassert 'torch' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": str(directory), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=100, env=environment
    )


@pytest.mark.parametrize(
    ("torch_npu", "platform"),
    [
        ("class npu:\n    device_count = lambda: 2", "vllm_ascend.platform.NPUPlatform"),
        ("class npu:\n    device_count = lambda: 0", "None"),
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


def test_sizes_are_those_that_the_attention_operator_takes() -> None:
    from vllm_ascend.limits import usable_block_size, usable_head_size

    assert [size for size in (64, 128, 200, 384, 512, 640) if usable_block_size(size)] == [128, 384, 512]
    assert [size for size in (64, 72, 80, 128, 512, 528) if usable_head_size(size)] == [64, 80, 128, 512]
