"""Products of quantised matrices: linear layers (W8A8) and experts (W8A8 and W4A8), with activations in int8.

These functions know tensors and nothing of a format of checkpoints; `vllm_ascend.quantization` makes the tensors. They
take weights as `layout.for_quantised_product` returns them, and scales as these operators do:

- The scale of a weight has one value for each output, in float32. `npu_grouped_matmul` takes it in the type of its
  results if that is bfloat16: `scale_of_experts` casts it.
- *Dynamic* layers quantise each token by its largest value. Their scales and biases need no preparation.
- *Static* layers know the scale of their input, for all tokens. `StaticInput` holds it as `npu_quantize` takes it: in
  the type of the input, and as its reciprocal. What that rounds is part of the scale, so that the product takes it
  back exactly. `scale_of_static_product` makes the product's scale; for float16 that is an int64 of CANN's own.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch

from vllm_ascend.ops.experts import COUNTS, Range, combine, route

LONGEST_ROW: Final = 65535
"""Documented for npu_quant_matmul: how many inputs and outputs its matrices may have."""


def refuse_long_rows(layer: str, inputs: int, outputs: int) -> None:
    """Raises ValueError for a linear layer that has more inputs or outputs, on a device, than a product takes."""
    for what, count in (("inputs", inputs), ("outputs", outputs)):
        if count > LONGEST_ROW:
            raise ValueError(
                f"{layer} has {count} {what} on a device, and a quantised layer on NPUs at most {LONGEST_ROW}: divide "
                f"it among more devices (--tensor-parallel-size), or quantise the model without it"
            )


class StaticInput(NamedTuple):
    """How a static layer quantises its input: by `reciprocal` and `offset`, one value each in the input's type."""

    reciprocal: torch.Tensor
    offset: torch.Tensor | None

    @property
    def scale(self) -> torch.Tensor:
        """What one step of the quantised input stands for, in float32."""
        return self.reciprocal.float().reciprocal()


def static_input(scale: torch.Tensor, offset: torch.Tensor | None, dtype: torch.dtype) -> StaticInput:
    """For an input of `dtype`. `scale` and `offset` have one value; the offset is added after dividing by the scale."""
    reciprocal = scale.detach().reshape(1).float().reciprocal().to(dtype)
    return StaticInput(reciprocal, None if offset is None else offset.detach().reshape(1).to(dtype))


def scale_of_static_product(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`scale`, in float32 and one for each output, as a static product with results of `dtype` takes it."""
    if dtype != torch.float16:
        return scale
    packed: torch.Tensor = torch.ops.npu.npu_trans_quant_param(scale)
    return packed


def scale_of_experts(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`scale`, [experts, outputs], as grouped products with results of `dtype` take it."""
    return scale.to(torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)


def dynamic_linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x times `weight`, [inputs, outputs], with each token quantised by itself. `bias` has the type of x."""
    rows = x.flatten(0, -2)
    quantised, of_token = torch.ops.npu.npu_dynamic_quant(rows)
    product: torch.Tensor = torch.ops.npu.npu_quant_matmul(
        quantised, weight, scale, pertoken_scale=of_token, bias=bias, output_dtype=x.dtype
    )
    return product.view(*x.shape[:-1], product.shape[-1])


def static_linear(  # noqa: PLR0917
    x: torch.Tensor,
    given: StaticInput,
    weight: torch.Tensor,
    scale: torch.Tensor,
    quant_bias: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x times `weight`, [inputs, outputs]. `quant_bias`, in int32, is added before scaling and `bias` after it."""
    rows = x.flatten(0, -2)
    quantised = torch.ops.npu.npu_quantize(rows, given.reciprocal, given.offset, torch.qint8, -1, False)
    fused = bias is not None and quant_bias is None and x.dtype != torch.float16
    product: torch.Tensor = torch.ops.npu.npu_quant_matmul(
        quantised, weight, scale, bias=bias if fused else quant_bias, output_dtype=x.dtype
    )
    if bias is not None and not fused:
        product = product + bias
    return product.view(*x.shape[:-1], product.shape[-1])


class ExpertWeights(NamedTuple):
    """The matrices of some experts, [experts, inputs, outputs], and their scales, as grouped products take both.

    `sums`, [experts, outputs] in float32, are added before the scales of rows; `four_bits` says what for.
    """

    matrices: torch.Tensor
    scales: torch.Tensor
    sums: torch.Tensor | None = None


def run_quantised_experts(  # noqa: PLR0917
    x: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    w13: ExpertWeights,
    w2: ExpertWeights,
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
    rows: torch.Tensor, of_row: torch.Tensor, weights: ExpertWeights, lengths: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    product: torch.Tensor = torch.ops.npu.npu_grouped_matmul(
        [rows],
        [weights.matrices],
        bias=None if weights.sums is None else [weights.sums],
        scale=[weights.scales],
        per_token_scale=[of_row],
        group_list=lengths,
        split_item=2,
        group_type=0,
        group_list_type=COUNTS,
        output_dtype=dtype,
    )[0]
    return product
