"""How weights lie on a device for the operators that multiply by them.

vLLM's linear layers hold [outputs, inputs]. Quantised products want [inputs, outputs], and are faster if a matrix lies
in FRACTAL_NZ: in blocks of 16 rows and 32 bytes, each in one piece. `VLLM_ASCEND_ENABLE_NZ` chooses, as upstream's
platform documents it: 0 for no weights, 1 for quantised weights, 2 for the others too.

Only matrices that consist of whole blocks get this format. The grouped product demands that, and a matrix with a
dimension of 1 may not have it anyway. So it changes the order of the bytes, and never their number.
"""

from __future__ import annotations

from typing import Final

import torch
import torch_npu

from vllm_ascend import envs

FRACTAL_NZ: Final = 29
ND: Final = 2
BLOCK_ROWS: Final = 16
BLOCK_ROW_BYTES: Final = 32
QUANTISED = {torch.int8, torch.int32}
"""int32 stands for eight values of 4 bits."""


def allow_fractal_nz() -> None:
    """To be called once in a process that computes: torch-npu ignores casts to internal formats without it."""
    torch_npu.npu.config.allow_internal_format = True


def for_quantised_product(weight: torch.Tensor) -> torch.Tensor:
    """The transpose of `weight`, [..., outputs, inputs], in a memory of its own and in the format that is set."""
    return in_chosen_format(weight.transpose(-2, -1).contiguous())


def in_chosen_format(weight: torch.Tensor) -> torch.Tensor:
    """`weight` in FRACTAL_NZ if that is chosen for its type and it consists of whole blocks, else as it is."""
    least = 1 if weight.dtype in QUANTISED else 2
    if envs.enable_nz() < least or not _has_whole_blocks(weight):
        return weight
    cast: torch.Tensor = torch_npu.npu_format_cast(weight, FRACTAL_NZ)
    if not is_fractal_nz(cast):
        raise RuntimeError("torch-npu made no FRACTAL_NZ: allow_fractal_nz must be called first in this process")
    return cast


def is_fractal_nz(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "npu" and bool(torch_npu.get_npu_format(tensor) == FRACTAL_NZ)


def _has_whole_blocks(weight: torch.Tensor) -> bool:
    """Float32 has none: products do not take it in this format."""
    if weight.dtype == torch.float32:
        return False
    rows, columns = weight.shape[-2:]
    return rows % BLOCK_ROWS == 0 and columns * weight.element_size() % BLOCK_ROW_BYTES == 0
