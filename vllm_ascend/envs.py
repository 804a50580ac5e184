"""The environment variables that the platform reads, one function each; they are read at every call."""

from __future__ import annotations

import os


def fp32() -> bool:
    """CANN_SIM_FP32=1: fused and quantised operators compute in fp32, as the simulator's do and no device's."""
    return os.environ.get("CANN_SIM_FP32", "0") == "1"


def stateless_group_buffer() -> int:
    """ASCEND_STATELESS_HCCL_BUFFSIZE: MiB of HCCL's buffer for a stateless group; a device holds it twice."""
    return int(os.environ.get("ASCEND_STATELESS_HCCL_BUFFSIZE", "16"))


def enable_nz() -> int:
    """VLLM_ASCEND_ENABLE_NZ: which weights lie in FRACTAL_NZ, 0 for none, 1 for quantised ones, 2 for others too.

    Raises ValueError for another value.
    """
    value = os.environ.get("VLLM_ASCEND_ENABLE_NZ", "1")
    if value not in {"0", "1", "2"}:
        raise ValueError(f"VLLM_ASCEND_ENABLE_NZ={value!r}: it is 0, 1 or 2")
    return int(value)
