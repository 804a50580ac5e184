"""Everything here runs on NPUs, simulated ones as a rule; where there are none, all of it is skipped."""

from __future__ import annotations

import os

import pytest

import vllm_ascend

os.environ.setdefault("CANN_SIM_MACHINE", f"tests {os.getpid()}")  # another run's processes take none of its memory
os.environ.setdefault("CANN_SIM_FP32", "1")  # fp32 makes answers comparable with those of other kernels


@pytest.fixture(scope="session", autouse=True)
def _there_is_an_npu() -> None:
    if vllm_ascend.register() is None:
        pytest.skip("needs torch_npu and an NPU: make npu-sim, then source tools/npu_sim.sh")
