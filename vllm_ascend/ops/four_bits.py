"""The weights of experts in 4 bits as `quantized.run_quantised_experts` takes them, for activations in int8 (W4A8).

A device multiplies an int8 in two halves, of which the lower one counts from 0 to 15 and is taken as -8 to 7. What is
missing is 8 times the sum of each column of the matrix, with its scale, and every product is given these sums. int32
holds eight weights of neighbouring outputs, and a scale is a float32 in the lower half of an int64.
"""

from __future__ import annotations

from typing import Final

import torch

DEPTH_STEP: Final = 64
"""What the inputs of a product are a multiple of, by the source of npu_grouped_matmul."""


def packed_for_product(weights: torch.Tensor) -> torch.Tensor:
    """From int8 [experts, inputs, outputs / 2], of which each holds two outputs, int32 [experts, inputs, outputs / 8].

    This is for the product alone, and parameters stay int8. torch-npu counts the elements of a matrix in FRACTAL_NZ as
    they were when it was cast. In a type four times as wide, it would copy four times as many bytes as there are, and
    write over what lies behind.
    """
    return weights.view(torch.int32)


def scale_in_bits(scale: torch.Tensor) -> torch.Tensor:
    """Float32 as int64 which holds its bits."""
    bits: torch.Tensor = scale.float().contiguous().view(torch.int32)
    return bits.to(torch.int64)
