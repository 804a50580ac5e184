"""Experts with weights of 4 bits and activations in int8 (W4A8).

A device multiplies an int8 in two halves, of which the lower one counts from 0 to 15 and is taken as -8 to 7. What is
missing is 8 times the sum of each column of the matrix, with its scale, and every product is given these sums. int32
holds eight weights of neighbouring outputs, and a scale is a float32 in the lower half of an int64.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch

from vllm_ascend.ops.experts import COUNTS, Range, combine, route
from vllm_ascend.ops.layout import for_quantised_product

DEPTH_STEP: Final = 64
"""What the inputs of a product are a multiple of, by the source of npu_grouped_matmul."""


class FourBits(NamedTuple):
    """The matrices of some experts, from `pack_for_product` and `scale_in_bits`, and the sums, [experts, outputs]."""

    matrices: torch.Tensor
    scales: torch.Tensor
    sums: torch.Tensor


def pack_for_product(weights: torch.Tensor) -> torch.Tensor:
    """From int8 [experts, outputs / 2, inputs], of which each holds two outputs, int32 [experts, inputs, outputs / 8].

    The format is chosen for int8, of which the bytes stay together.
    """
    return for_quantised_product(weights).view(torch.int32)


def scale_in_bits(scale: torch.Tensor) -> torch.Tensor:
    """Float32 as int64 which holds its bits."""
    bits: torch.Tensor = scale.float().contiguous().view(torch.int32)
    return bits.to(torch.int64)


def run_w4a8_experts(  # noqa: PLR0917
    x: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    w13: FourBits,
    w2: FourBits,
    own: Range | None = None,
) -> torch.Tensor:
    """The weighted sum over those of each token's experts that are here; all are, if `own` is not given.

    `weights` and `experts`, in int32, are [tokens, experts of a token].
    """
    total = len(w13.matrices)
    routed = route(x, experts, own or Range(0, total, total), quantise=True)
    hidden = _grouped_product(routed.rows, routed.scales, w13, routed.lengths, x.dtype)
    quantised, of_row = torch.ops.npu.npu_dynamic_quant(torch.ops.npu.npu_swiglu(hidden))
    results = _grouped_product(quantised, of_row, w2, routed.lengths, x.dtype)
    return combine(results, routed.positions, weights, own)


def _grouped_product(
    rows: torch.Tensor, of_row: torch.Tensor, weights: FourBits, lengths: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    product: torch.Tensor = torch.ops.npu.npu_grouped_matmul(
        [rows],
        [weights.matrices],
        bias=[weights.sums],
        scale=[weights.scales],
        per_token_scale=[of_row],
        group_list=lengths,
        split_item=2,
        group_type=0,
        group_list_type=COUNTS,
        output_dtype=dtype,
    )[0]
    return product
