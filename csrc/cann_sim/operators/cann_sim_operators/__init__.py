"""Operators for torch-npu on the simulated CANN.

`import torch` calls `autoload`, before or after torch-npu's own entry point. The library with ATen's operators lies
beside the simulated CANN that ASCEND_HOME_PATH names; this package adds torch-npu's own operators, written in torch.
Where ASCEND_HOME_PATH names no simulated CANN, nothing happens.
"""

from __future__ import annotations

import os
from pathlib import Path

_LIBRARY = "libcann_sim_operators.so"


def autoload() -> None:
    """Loads the operators into this process, once, if ASCEND_HOME_PATH names a simulated CANN.

    Imports torch and torch-npu then. Raises RuntimeError if TASK_QUEUE_ENABLE is not 0: torch-npu's queue would run
    operators in another thread than the one that calls them.
    """
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
    from cann_sim_operators import attention, cache, experts, layers, rotary, routing  # noqa: F401  registers them
