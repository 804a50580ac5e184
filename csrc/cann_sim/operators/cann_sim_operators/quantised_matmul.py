"""The product of int8 matrices, with scales.

Products are exact. What follows is float32.
"""

from __future__ import annotations

import torch

from cann_sim_operators.quantisation import offset_of_parameter, scale_of_parameter, trans_quant_param
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
    require_whole,
)

OPERATOR = "npu_quant_matmul"
INNER_LIMIT = 65535
EXACT_DEPTH = 1024
"""So many products of int8 add up to at most 2**24."""
OUTPUTS = (torch.int8, torch.float16, torch.bfloat16, torch.int32)


@implements("npu::npu_quant_matmul", takes_fractal=True)
def quant_matmul(
    x1: torch.Tensor,
    x2: torch.Tensor,
    scale: torch.Tensor,
    *,
    offset: torch.Tensor | None = None,
    pertoken_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    output_dtype: int | None = None,
    **others: object,
) -> torch.Tensor:
    """Returns (x1 @ x2 + an integer bias) * scale * pertoken_scale + another bias or offset, in the output dtype.

    x2 may be in FRACTAL_NZ, but not transposed then. An int32 result is not scaled.
    """
    require_defaults(OPERATOR, others)
    out = require_output_dtype(OPERATOR, output_dtype, torch.int8, *OUTPUTS, *fp32())
    _check_matrices(x1, x2)
    _check_dtypes(out, scale, pertoken_scale, bias, offset)
    product = exact_product(x1, x2)
    _check_vectors(product, scale, pertoken_scale, bias, offset)

    if bias is not None and bias.dtype == torch.int32:
        product = product + bias.double()
    if out == torch.int32:
        return product.to(torch.int32)
    if pertoken_scale is None and out in {torch.int8, torch.float16}:
        return _requantised(product.float(), out, scale, offset)
    result = product.float() * scale.float()
    if pertoken_scale is not None:
        result = result * pertoken_scale.unsqueeze(-1)
    if bias is not None and bias.dtype != torch.int32:
        result = result + bias.float()
    return result.to(out)


def exact_product(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Returns the product of int8 matrices as integers in float64.

    A part of EXACT_DEPTH is exact in float32, and even where that is multiplied as bfloat16.
    """
    parts = zip(x.float().split(EXACT_DEPTH, -1), matrix.float().split(EXACT_DEPTH, -2), strict=True)
    products = [(part @ rows).double() for part, rows in parts]
    return torch.stack(products).sum(0)


def _requantised(
    product: torch.Tensor, out: torch.dtype, scale: torch.Tensor, offset: torch.Tensor | None
) -> torch.Tensor:
    """What the matrix unit does by itself, with a scale of 19 bits."""
    parameter = scale if scale.dtype == torch.int64 else trans_quant_param(scale, offset)
    scaled = product * scale_of_parameter(parameter)
    if out == torch.float16:
        return scaled.half()
    return (scaled.round() + offset_of_parameter(parameter)).clamp(-128, 127).to(torch.int8)


def _check_matrices(x1: torch.Tensor, x2: torch.Tensor) -> None:
    for argument, matrix in {"x1": x1, "x2": x2}.items():
        require_dtype(OPERATOR, argument, matrix, torch.int8)
        fits = 2 <= matrix.dim() <= 6 and matrix.numel() > 0
        require(fits, OPERATOR, f"the shape of {argument}", tuple(matrix.shape), "of 2 to 6 dimensions, none of them 0")
        transposed = matrix.mT.is_contiguous()
        whole = matrix.is_contiguous() or transposed
        expected = "contiguous, or transposed in the last two dimensions"
        require(whole, OPERATOR, argument, f"strided {matrix.stride()}", expected)
        inner = matrix.shape[-1] if matrix.is_contiguous() else matrix.shape[-2]
        require(inner <= INNER_LIMIT, OPERATOR, f"the inner dimension of {argument}", inner, f"at most {INNER_LIMIT}")
    require_plain(OPERATOR, x1=x1)
    if is_fractal(x2):
        require_whole(OPERATOR, "x2", x2)
        lengths = tuple(x2.shape[-2:])
        require(1 not in lengths, OPERATOR, "the shape of x2, which is in FRACTAL_NZ,", lengths, "above 1")
    depth = x1.shape[-1]
    require(x2.shape[-2] == depth, OPERATOR, "the shape of x2", tuple(x2.shape), f"[..., {depth}, n], as x1 has it")


def _check_dtypes(
    out: torch.dtype,
    scale: torch.Tensor,
    pertoken_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    offset: torch.Tensor | None,
) -> None:
    by_token = pertoken_scale is not None
    require_plain(OPERATOR, scale=scale, pertoken_scale=pertoken_scale, bias=bias, offset=offset)
    if pertoken_scale is not None:
        require_dtype(OPERATOR, "pertoken_scale", pertoken_scale, torch.float32)
        allowed = "bfloat16 or float16 beside pertoken_scale"
        require(out not in {torch.int8, torch.int32}, OPERATOR, "the output dtype", out, allowed)
    scales, biases = _allowed_dtypes(out, by_token=by_token)
    require(scale.dtype in scales, OPERATOR, "the dtype of scale", scale.dtype, f"one of {scales} for {out}")
    if bias is not None:
        require(bias.dtype in biases, OPERATOR, "the dtype of bias", bias.dtype, f"one of {biases} for {out}")
    if offset is not None:
        require_dtype(OPERATOR, "offset", offset, torch.float32)
        fits = out == torch.int8 and scale.dtype == torch.float32
        expected = "given for int8 only, and beside a float32 scale: npu_trans_quant_param puts it into an int64 scale"
        require(fits, OPERATOR, "offset", f"given for {out} with a scale of {scale.dtype}", expected)


def _allowed_dtypes(out: torch.dtype, *, by_token: bool) -> tuple[tuple[torch.dtype, ...], tuple[torch.dtype, ...]]:
    """Of scale, and of bias."""
    single, half, brain, integer = torch.float32, torch.float16, torch.bfloat16, torch.int32
    if out in {brain, single}:
        return (single, brain), (integer, brain, single)
    if by_token:
        return (single,), (integer, half, single)
    if out == integer:
        return (single, brain), (integer,)
    return (torch.int64, single), (integer,)


def _check_vectors(
    product: torch.Tensor,
    scale: torch.Tensor,
    pertoken_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    offset: torch.Tensor | None,
) -> None:
    rows, columns = product.shape[-2:]
    require_shape(OPERATOR, "scale", scale, (columns,), (1,))
    if pertoken_scale is not None:
        require_shape(OPERATOR, "pertoken_scale", pertoken_scale, (rows,))
    if offset is not None:
        require_shape(OPERATOR, "offset", offset, (columns,), (1,))
    if bias is not None:
        by_batch = ((len(product), 1, columns),) if product.dim() == 3 else ()
        require_shape(OPERATOR, "bias", bias, (columns,), *by_batch)
