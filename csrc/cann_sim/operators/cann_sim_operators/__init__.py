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

    Imports torch and torch-npu then.
    """
    library = Path(os.environ.get("ASCEND_HOME_PATH", ""), "lib", _LIBRARY)
    if library.is_absolute() and library.exists():
        _load(library)


def _load(library: Path) -> None:
    import torch
    import torch_npu  # noqa: F401  its kernels must be there to be replaced

    if hasattr(torch.ops.cann_sim, "install"):
        return
    torch.ops.load_library(str(library))
    torch.ops.cann_sim.install()
    from cann_sim_operators import (  # noqa: F401  registers them
        attention,
        cache,
        experts,
        flash_attention,
        layers,
        quantisation,
        quantised_matmul,
        rotary,
        routing,
    )


def aicpu_operators() -> dict[str, int]:
    """How often this process called operators that a device runs on its slow AICPU cores, by name.

    Which operators these are depends on the dtype of their first argument; the list, and what it was read from, is in
    `aicpu.cpp`. One that is captured gives a warning.
    """
    import torch

    return dict(torch.ops.cann_sim.aicpu_operators())
