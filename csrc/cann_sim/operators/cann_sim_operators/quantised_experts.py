"""The products of quantised experts, int8 by int8 and int8 by int4, and what happens between two of them.

The rules are those of CANN's sources, which are stricter than its documentation about scales: bfloat16 takes scales in
bfloat16 only, and float16 in float32 only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import silu

from cann_sim_operators.quantisation import offset_of_parameter, quantise_rows, scale_of_parameter
from cann_sim_operators.quantised_matmul import exact_product
from cann_sim_operators.registry import (
    fp32,
    implements,
    is_fractal,
    require,
    require_defaults,
    require_dtype,
    require_output_dtype,
    require_plain,
    require_shape,
    undefined,
)

OPERATOR = "npu_grouped_matmul"

SCALE_OF_OUTPUT = {
    torch.int8: torch.int64,
    torch.float16: torch.float32,
    torch.bfloat16: torch.bfloat16,
    torch.float32: torch.float32,
}
SWIGLU_STEP, SWIGLU_MAX = 64, 10496
INT4_PER_INT32 = 8
INT4_DEPTH_STEP, INT4_MAX_DEPTH = 64, 18432


@dataclass(frozen=True)
class Factors:
    """What the product of rows and matrices is scaled by, and shifted; tensors that are not given are None."""

    bias: torch.Tensor | None
    scale: torch.Tensor | None
    per_token_scale: torch.Tensor | None

    @classmethod
    def of_lists(cls, **tensors: list[torch.Tensor] | None) -> Factors:
        """Raises RuntimeError if one of the lists, given by the names of their arguments, has several tensors."""
        for argument, each in tensors.items():
            count = len(each or [None])
            require(count == 1, OPERATOR, f"the length of {argument}", count, "1, as those of x and weight")
        factors = cls(**{argument: each[0] if each else None for argument, each in tensors.items()})
        require_plain(OPERATOR, **vars(factors))
        return factors


def scaled_products(
    rows: torch.Tensor, matrices: torch.Tensor, factors: Factors, *, lengths: list[int], output_dtype: int | None
) -> torch.Tensor:
    """Returns (rows @ matrix + an integer bias) * scale * per_token_scale + another bias, of all groups together."""
    bias, scale, per_token_scale = factors.bias, factors.scale, factors.per_token_scale
    halves = (torch.float16, torch.bfloat16, *fp32())
    plain_only = () if is_fractal(matrices) else (torch.int8,)
    out = require_output_dtype(OPERATOR, output_dtype, torch.int8, *plain_only, *halves, torch.int32)
    groups, columns = len(matrices), matrices.shape[2]
    if bias is not None:
        require_dtype(OPERATOR, "bias", bias, torch.int32, torch.bfloat16)
        require_shape(OPERATOR, "bias", bias, (groups, columns))
    _check_scales(out, factors, rows=len(rows), groups=groups, columns=columns)

    results = []
    begin = 0
    for group, length in enumerate(lengths):
        product = exact_product(rows[begin : begin + length], matrices[group])
        if bias is not None and bias.dtype == torch.int32:
            product = product + bias[group].double()
        if scale is None:
            results.append(product.to(torch.int32))
        elif out == torch.int8:
            scaled = (product.float() * scale_of_parameter(scale[group])).round() + offset_of_parameter(scale[group])
            results.append(scaled.clamp(-128, 127).to(torch.int8))
        else:
            result = product.float() * scale[group].float()
            if per_token_scale is not None:
                result = result * per_token_scale[begin : begin + length].unsqueeze(-1)
            if bias is not None and bias.dtype != torch.int32:
                result = result + bias[group].float()
            results.append(result.to(out))
        begin += length
    return torch.cat(results)


def _check_scales(out: torch.dtype, factors: Factors, *, rows: int, groups: int, columns: int) -> None:
    scale, per_token_scale = factors.scale, factors.per_token_scale
    if out == torch.int32:
        for argument, vector in {"scale": scale, "per_token_scale": per_token_scale}.items():
            require(vector is None, OPERATOR, argument, "given for int32", "absent")
        return
    require(scale is not None, OPERATOR, "scale", "absent", f"given for {out}")
    expected = SCALE_OF_OUTPUT[out]
    require(scale.dtype == expected, OPERATOR, "the dtype of scale", scale.dtype, f"{expected} for {out}")
    require_shape(OPERATOR, "scale", scale, (groups, columns))
    if per_token_scale is not None:
        require(out != torch.int8, OPERATOR, "per_token_scale", "given for int8", "absent")
        require_dtype(OPERATOR, "per_token_scale", per_token_scale, torch.float32)
        require_shape(OPERATOR, "per_token_scale", per_token_scale, (rows,))


def packed_products(
    rows: torch.Tensor, matrices: torch.Tensor, factors: Factors, *, lengths: list[int], output_dtype: int | None
) -> torch.Tensor:
    """Returns ((rows - 8) @ (matrix * scale) + bias) * per_token_scale, of all groups together.

    A matrix holds eight int4 in an int32, and `scale` float32 numbers in int64, one row for each part of the depth. A
    device takes int8 apart into two int4, of which the lower is in 0 to 15: hence the 8, and `bias`, which must be 8
    times the sums of the columns of matrix * scale.
    """
    require(matrices.is_contiguous(), OPERATOR, "weight, which holds int4,", "transposed", "contiguous")
    out = require_output_dtype(OPERATOR, output_dtype, torch.int8, torch.float16, torch.bfloat16, *fp32())
    bias, scale, per_token_scale = factors.bias, factors.scale, factors.per_token_scale
    for argument, vector in vars(factors).items():
        require(vector is not None, OPERATOR, argument, "absent", "given for weights in int4")
    groups, depth = matrices.shape[:2]
    columns = matrices.shape[2] * INT4_PER_INT32
    fits = depth % INT4_DEPTH_STEP == 0 and depth <= INT4_MAX_DEPTH
    require(fits, OPERATOR, "the depth of x", depth, f"a multiple of {INT4_DEPTH_STEP} up to {INT4_MAX_DEPTH}")
    require_dtype(OPERATOR, "scale", scale, torch.int64)
    parts = scale.shape[1] if scale.dim() == 3 else 0
    fits = scale.shape == (groups, parts, columns) and parts > 0 and depth % parts == 0
    expected = f"({groups}, parts, {columns}), with parts that divide {depth}"
    require(fits, OPERATOR, "the shape of scale", tuple(scale.shape), expected)
    require_dtype(OPERATOR, "bias", bias, torch.float32)
    require_shape(OPERATOR, "bias", bias, (groups, columns))
    require_dtype(OPERATOR, "per_token_scale", per_token_scale, torch.float32)
    require_shape(OPERATOR, "per_token_scale", per_token_scale, (len(rows),))

    shifted = rows.double() - 8
    results = []
    for part, tokens, matrix, scales, shift in zip(
        shifted[: sum(lengths)].split(lengths),
        per_token_scale[: sum(lengths)].split(lengths),
        unpack_int4(matrices),
        scale_of_parameter(scale),
        bias,
        strict=True,
    ):
        total = shift.expand(len(part), columns)
        for piece, weights, factor in zip(part.chunk(parts, 1), matrix.chunk(parts), scales, strict=True):
            total = total + (piece @ weights.double()).float() * factor
        results.append((total * tokens.unsqueeze(-1)).to(out))
    return torch.cat(results)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """Returns as int8, in eight times as many columns, the int4 that int32 holds, beginning with the lowest bits."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    nibbles = packed.unsqueeze(-1) >> shifts & 15
    return torch.where(nibbles > 7, nibbles - 16, nibbles).to(torch.int8).flatten(-2)


@implements("npu::npu_dequant_swiglu_quant")
def dequant_swiglu_quant(
    x: torch.Tensor,
    *,
    weight_scale: torch.Tensor | None = None,
    activation_scale: torch.Tensor | None = None,
    quant_scale: torch.Tensor | None = None,
    group_index: torch.Tensor | None = None,
    activate_left: bool = False,
    quant_mode: int = 0,
    **others: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales int32 products of experts, takes silu of one half times the other, and returns that as int8 and scales.

    `group_index` holds the lengths of the groups of rows, each of which has a row of `weight_scale`, and of
    `quant_scale` if that is given. What follows the last group is undefined.
    """
    operator = "npu_dequant_swiglu_quant"
    require_defaults(operator, others)
    if x.dtype != torch.int32 or group_index is None or quant_mode != 1:
        given = "absent" if group_index is None else "given"
        raise RuntimeError(
            f"{operator}: x of {x.dtype}, group_index {given}, quant_mode={quant_mode} is not simulated; int32, a "
            "group_index, quant_mode=1 is"
        )
    require(x.dim() == 2, operator, "the shape of x", tuple(x.shape), "of 2 dimensions")
    rows, half = x.shape[0], x.shape[1] // 2
    fits = x.shape[1] == 2 * half and half % SWIGLU_STEP == 0 and 0 < half <= SWIGLU_MAX
    expected = f"twice a multiple of {SWIGLU_STEP} up to {SWIGLU_MAX}"
    require(fits, operator, "the last dimension of x", x.shape[1], expected)
    lengths = _lengths_of_groups(operator, group_index, rows)
    groups = len(lengths)
    for argument, factor, shape in (
        ("weight_scale", weight_scale, (groups, 2 * half)),
        ("activation_scale", activation_scale, (rows,)),
        ("quant_scale", quant_scale, (groups, half)),
    ):
        if factor is not None or argument != "quant_scale":
            require(factor is not None, operator, argument, "absent", "given for int32")
            require_dtype(operator, argument, factor, torch.float32)
            require_shape(operator, argument, factor, shape)

    used = int(lengths.sum())
    scaled = x[:used].float() * weight_scale.repeat_interleave(lengths, 0) * activation_scale[:used, None]
    left, right = scaled.chunk(2, -1)
    activated = silu(left) * right if activate_left else silu(right) * left
    if quant_scale is not None:
        activated = activated * quant_scale.repeat_interleave(lengths, 0)
    quantised, scales = quantise_rows(activated)
    rest = undefined((rows - used, half), torch.int8), undefined((rows - used,), torch.float32)
    return torch.cat([quantised, rest[0]]), torch.cat([scales, rest[1]])


def _lengths_of_groups(operator: str, group_index: torch.Tensor, rows: int) -> torch.Tensor:
    require_dtype(operator, "group_index", group_index, torch.int64)
    fits = group_index.dim() == 1 and bool((group_index >= 0).all()) and int(group_index.sum()) <= rows
    require(fits, operator, "group_index", group_index.tolist(), f"lengths of groups of at most {rows} rows together")
    return group_index
