"""Operators for torch-npu on the simulated CANN.

`import torch` calls `autoload`, as it calls torch-npu's, in whichever order. The library with ATen's operators lies
beside the simulated CANN that the environment names; this package adds the operators of torch-npu, in torch. Without
such an environment nothing happens.
"""

from __future__ import annotations

import os
from pathlib import Path

_LIBRARY = "libcann_sim_operators.so"


def autoload() -> None:
    library = Path(os.environ.get("ASCEND_HOME_PATH", ""), "lib", _LIBRARY)
    if library.is_absolute() and library.exists():
        _load(library)


def _load(library: Path) -> None:
    import torch
    import torch_npu  # noqa: F401  its kernels must be there to be replaced

    if hasattr(torch.ops.cann_sim, "install"):
        return
    if (queue := os.environ.get("TASK_QUEUE_ENABLE")) != "0":
        raise RuntimeError(f"TASK_QUEUE_ENABLE is {queue}; with operators of the simulated CANN it must be 0 (env.sh)")
    torch.ops.load_library(str(library))
    torch.ops.cann_sim.install()
    from cann_sim_operators import attention, cache, experts, layers, rotary  # noqa: F401  registers them
