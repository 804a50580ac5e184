"""How weights lie on a device for the operators that multiply by them.

vLLM's linear layers hold [outputs, inputs]. Quantised products want [inputs, outputs], and are faster if a matrix lies
in FRACTAL_NZ: in blocks of 16 rows and 32 bytes, each in one piece. `VLLM_ASCEND_ENABLE_NZ` chooses, as upstream's
platform documents it: 0 for no weights, 1 for quantised weights, 2 for the others too.

Only matrices that consist of whole blocks get this format. The grouped product demands that, and a matrix with a
dimension of 1 may not have it anyway. So it changes the order of the bytes, and never their number.

Sleep mode empties and fills storages where they are, which torch-npu does in plain formats only. With it, all weights
stay plain.
"""

from __future__ import annotations

from typing import Any, Final

import torch
import torch_npu
from vllm.logger import init_logger

from vllm_ascend import envs

logger = init_logger(__name__)

FRACTAL_NZ: Final = 29
ND: Final = 2
BLOCK_ROWS: Final = 16
BLOCK_ROW_BYTES: Final = 32


_allowed: set[int] = {ND}
"""The formats that weights may get in this process."""


def choose_formats(model_config: Any) -> None:
    """Allows this process what VLLM_ASCEND_ENABLE_NZ chooses, unless the model can sleep. Before a model is made.

    torch-npu makes no internal formats otherwise.
    """
    wanted = envs.enable_nz() >= (1 if model_config.quantization else 2)
    if wanted and model_config.enable_sleep_mode:
        logger.warning_once("sleep mode empties weights where they are, in plain formats: using no FRACTAL_NZ")
    allow_fractal_nz(wanted and not model_config.enable_sleep_mode)


def allow_fractal_nz(allowed: bool = True) -> None:
    (_allowed.add if allowed else _allowed.discard)(FRACTAL_NZ)
    torch_npu.npu.config.allow_internal_format = allowed


def for_quantised_product(weight: torch.Tensor) -> torch.Tensor:
    """The transpose of `weight`, [..., outputs, inputs], in a memory of its own and in the format that is set."""
    return in_chosen_format(weight.transpose(-2, -1).contiguous())


def in_chosen_format(weight: torch.Tensor) -> torch.Tensor:
    """`weight` in FRACTAL_NZ if that is chosen for its type and it consists of whole blocks, else as it is."""
    least = 1 if weight.dtype == torch.int8 else 2
    if FRACTAL_NZ not in _allowed or envs.enable_nz() < least or not _has_whole_blocks(weight):
        return weight
    cast: torch.Tensor = torch_npu.npu_format_cast(weight, FRACTAL_NZ)
    return cast


def is_fractal_nz(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "npu" and bool(torch_npu.get_npu_format(tensor) == FRACTAL_NZ)


def _has_whole_blocks(weight: torch.Tensor) -> bool:
    """Float32 has none: products do not take it in this format."""
    if weight.dtype == torch.float32:
        return False
    rows, columns = weight.shape[-2:]
    return rows % BLOCK_ROWS == 0 and columns * weight.element_size() % BLOCK_ROW_BYTES == 0
