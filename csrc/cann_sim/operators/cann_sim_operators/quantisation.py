"""Quantising activations to int8, and the scales that a device's matrix unit reads.

Scales are computed and applied in float32, in the order of the formulas in the documentation. Rounding is to the
nearest integer, and of two to the even one.
"""

from __future__ import annotations

import torch

from cann_sim_operators.registry import (
    fp32,
    implements,
    require,
    require_defaults,
    require_dtype,
    require_output_dtype,
    require_shape,
)

INT8_MAX = 127
MAX_EXPERTS = 1024
HALVES = (torch.float16, torch.bfloat16)

MANTISSA_OF_SCALES = ~0x1FFF
"""A matrix unit reads the upper 19 bits of a float32 as a scale."""
SCALE_FLAG = 1 << 46
OFFSET_BITS, OFFSET_SHIFT = 9, 37


@implements("npu::npu_dynamic_quant")
def dynamic_quant(
    x: torch.Tensor,
    *,
    smooth_scales: torch.Tensor | None = None,
    group_index: torch.Tensor | None = None,
    dst_type: int | None = None,
    quant_mode: str = "pertoken",
    **others: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns each row of x as int8, and the row's scale: its largest absolute value divided by 127, in float32.

    The columns of x are first multiplied by `smooth_scales`. With `group_index`, running totals of the groups' rows,
    each group of rows has a row of `smooth_scales`. A row of zeros has a scale of 0.
    """
    operator = "npu_dynamic_quant"
    require_defaults(operator, others)
    require_dtype(operator, "x", x, *HALVES, *fp32())
    require(1 < x.dim() < 9, operator, "the shape of x", tuple(x.shape), "of 2 to 8 dimensions")
    require_output_dtype(operator, dst_type, torch.int8, torch.int8)
    require(quant_mode == "pertoken", operator, "quant_mode", quant_mode, "pertoken on A2 and A3")
    values = x.float()
    if smooth_scales is not None:
        values = values * _smooth_scales_of_rows(operator, x, smooth_scales, group_index)
    else:
        require(group_index is None, operator, "group_index", "given", "absent where smooth_scales is")
    return quantise_rows(values)


def quantise_rows(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns rows of float32 as int8, and their scales."""
    scales = values.abs().amax(-1) / INT8_MAX
    rounded = torch.round(values / scales.unsqueeze(-1)).nan_to_num_(0)
    return rounded.clamp_(-INT8_MAX - 1, INT8_MAX).to(torch.int8), scales


def _smooth_scales_of_rows(
    operator: str, x: torch.Tensor, smooth_scales: torch.Tensor, group_index: torch.Tensor | None
) -> torch.Tensor:
    require(smooth_scales.dtype == x.dtype, operator, "the dtype of smooth_scales", smooth_scales.dtype, str(x.dtype))
    columns = x.shape[-1]
    if group_index is None:
        require_shape(operator, "smooth_scales", smooth_scales, (columns,))
        return smooth_scales.float()
    require_dtype(operator, "group_index", group_index, torch.int32, torch.int64)
    require(group_index.dim() == 1, operator, "the shape of group_index", tuple(group_index.shape), "of 1 dimension")
    groups = len(group_index)
    require(groups <= MAX_EXPERTS, operator, "the length of group_index", groups, f"at most {MAX_EXPERTS}")
    require_shape(operator, "smooth_scales", smooth_scales, (groups, columns))
    rows = x.numel() // columns
    lengths = group_index.diff(prepend=group_index.new_zeros(1))
    expected = f"running totals that end with the number of rows, {rows}"
    fits = groups and bool((lengths >= 0).all()) and int(group_index[-1]) == rows
    require(bool(fits), operator, "group_index", group_index.tolist(), expected)
    return smooth_scales.float().repeat_interleave(lengths.long(), 0).view(*x.shape[:-1], columns)


@implements("npu::npu_quantize")
def quantize(  # noqa: PLR0917  the genuine schema
    x: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    dtype: int,
    axis: int = 1,
    div_mode: bool = True,
) -> torch.Tensor:
    """Returns x * scales + zero_points as int8; `scales` and `zero_points` are rows, or one number each.

    An `axis` from -1 on means the last one, as on a device.
    """
    operator = "npu_quantize"
    if div_mode or axis < -1:
        raise RuntimeError(f"{operator}: div_mode={div_mode}, axis={axis} is not simulated; div_mode=False, axis=-1 is")
    require_output_dtype(operator, dtype, torch.qint8, torch.qint8, torch.int8)
    require_dtype(operator, "input", x, *HALVES, torch.float32)
    require(0 < x.dim() < 9, operator, "the shape of input", tuple(x.shape), "of 1 to 8 dimensions")
    allowed = (*HALVES, torch.float32) if x.dtype == torch.float32 else (x.dtype,)
    require_dtype(operator, "scales", scales, *allowed)
    columns = x.shape[-1]
    ones = (1,) * (x.dim() - 1)
    require_shape(operator, "scales", scales, (columns,), (1,), (*ones, columns), (*ones, 1))
    shifted = x.float() * scales.to(x.dtype).float()
    if zero_points is not None:
        require_dtype(operator, "zero_points", zero_points, scales.dtype)
        require_shape(operator, "zero_points", zero_points, tuple(scales.shape))
        shifted = shifted + zero_points.to(x.dtype).float()
    return shifted.round().clamp(-INT8_MAX - 1, INT8_MAX).to(torch.int8)


@implements("npu::npu_trans_quant_param")
def trans_quant_param(
    scale: torch.Tensor, offset: torch.Tensor | None = None, round_mode: int | None = 0
) -> torch.Tensor:
    """Returns in int64 what a matrix unit reads: the upper 19 bits of a scale, and an offset of 9 bits."""
    operator = "npu_trans_quant_param"
    require_dtype(operator, "scale", scale, torch.float32)
    fits = scale.numel() > 0 and (scale.dim() == 1 or (scale.dim() == 2 and len(scale) == 1))
    require(fits, operator, "the shape of scale", tuple(scale.shape), "(n,) or (1, n)")
    if round_mode not in {None, 0}:
        raise RuntimeError(f"{operator}: round_mode={round_mode} is not simulated; 0 is")
    bits = scale.contiguous().view(torch.int32).long() & 0xFFFFFFFF & MANTISSA_OF_SCALES | SCALE_FLAG
    if offset is None:
        return bits
    require_dtype(operator, "offset", offset, torch.float32)
    fits = offset.shape == scale.shape or (offset.dim() == scale.dim() == 1 and 1 in {len(offset), len(scale)})
    require(
        fits, operator, "the shape of offset", tuple(offset.shape), f"{tuple(scale.shape)}, or (1,) where that is 1D"
    )
    reach = 1 << (OFFSET_BITS - 1)
    whole = (offset.abs() + 0.5).floor() * offset.sign()
    return bits | (whole.clamp(-reach, reach - 1).long() & (2 * reach - 1)) << OFFSET_SHIFT


def scale_of_parameter(parameter: torch.Tensor) -> torch.Tensor:
    """Returns the scale that a matrix unit reads from int64: the upper 19 bits of a float32 in the lower 32 bits."""
    return (parameter & 0xFFFFFFFF & MANTISSA_OF_SCALES).to(torch.int32).view(torch.float32)


def offset_of_parameter(parameter: torch.Tensor) -> torch.Tensor:
    """Returns the offset that a matrix unit reads from int64, as float32."""
    span = 1 << OFFSET_BITS
    bits = parameter >> OFFSET_SHIFT & (span - 1)
    return torch.where(bits >= span // 2, bits - span, bits).float()
