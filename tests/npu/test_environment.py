"""What all tests beside this one stand on: the vLLM of machines with NPUs, which has no kernels of its own."""

from __future__ import annotations

import importlib.util


def test_vllm_has_no_kernels() -> None:
    compiled = [name for name in ("_C", "_moe_C", "spinloop", "fs_io_C") if importlib.util.find_spec(f"vllm.{name}")]
    assert not compiled, "these are of a build for another platform; for simulated NPUs, make npu-sim makes one without"
