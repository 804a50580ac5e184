"""The environment variables that the platform reads, one function each; they are read at every call."""

from __future__ import annotations

import os


def fp32_attention() -> bool:
    """CANN_SIM_FP32_ATTENTION=1: the fused attention computes in fp32, as the simulator's does and no device's."""
    return os.environ.get("CANN_SIM_FP32_ATTENTION", "0") == "1"


def stateless_group_buffer() -> int:
    """ASCEND_STATELESS_HCCL_BUFFSIZE: MiB of HCCL's buffer for a stateless group; a device holds it twice."""
    return int(os.environ.get("ASCEND_STATELESS_HCCL_BUFFSIZE", "16"))
