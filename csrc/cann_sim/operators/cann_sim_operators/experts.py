"""Matrix products of mixtures of experts: each group of rows with a matrix of its own."""

from __future__ import annotations

import torch

from cann_sim_operators.layers import FLOATS
from cann_sim_operators.quantised_experts import OPERATOR, Factors, packed_products, scaled_products
from cann_sim_operators.registry import (
    block_width,
    implements,
    require,
    require_defaults,
    require_dtype,
    require_output_dtype,
    require_plain,
    require_whole,
    undefined,
)

INNER_LIMIT = 65536
MAX_GROUPS = 1024
BLOCK_ROWS = 16


@implements("npu::npu_grouped_matmul", takes_fractal=True)
def grouped_matmul(
    x: list[torch.Tensor],
    weight: list[torch.Tensor],
    *,
    bias: list[torch.Tensor] | None = None,
    scale: list[torch.Tensor] | None = None,
    per_token_scale: list[torch.Tensor] | None = None,
    group_list: torch.Tensor | None = None,
    split_item: int | None = 0,
    group_type: int | None = None,
    group_list_type: int | None = 0,
    output_dtype: int | None = None,
    **others: object,
) -> list[torch.Tensor]:
    """Multiplies each group of rows with the group's matrix, and returns the products as one tensor in a list.

    Simulated for one tensor x [rows, k], sorted by group, and one weight [groups, k, n]: numbers of one dtype, int8, or
    int8 by int4 of which int32 holds eight. `group_list` holds running totals of the groups' lengths (group_list_type
    0) or the lengths themselves (1). A device does not write the results for rows behind the last group; here they are
    NaN, or the largest integer.
    """
    require_defaults(OPERATOR, others)
    if len(x) != 1 or len(weight) != 1 or group_list is None or split_item not in {2, 3} or group_type != 0:
        raise RuntimeError(
            f"{OPERATOR}: {len(x)} x, {len(weight)} weight, group_list={group_list}, split_item={split_item}, "
            f"group_type={group_type} is not simulated; one x, one weight, a group_list, split_item=2, group_type=0 is"
        )
    (rows,), (matrices,) = x, weight
    factors = Factors.of_lists(bias=bias, scale=scale, per_token_scale=per_token_scale)
    _check_matrices(rows, matrices)
    lengths = _group_lengths(group_list, group_list_type, groups=len(matrices), rows=len(rows))
    if rows.dtype == torch.int8:
        if matrices.dtype == torch.int32:
            require(group_list_type == 1, OPERATOR, "group_list_type", group_list_type, "1 for weights in int4")
            products = packed_products(rows, matrices, factors, lengths=lengths, output_dtype=output_dtype)
        else:
            products = scaled_products(rows, matrices, factors, lengths=lengths, output_dtype=output_dtype)
    else:
        for argument, vector in vars(factors).items():
            require(vector is None, OPERATOR, argument, f"given for {rows.dtype}", "absent, which is what is simulated")
        require_output_dtype(OPERATOR, output_dtype, rows.dtype, rows.dtype)
        parts = rows[: sum(lengths)].split(lengths)
        products = torch.cat([part @ matrix for part, matrix in zip(parts, matrices, strict=True)])
    return [torch.cat([products, undefined((len(rows) - len(products), products.shape[1]), products.dtype)])]


def _check_matrices(rows: torch.Tensor, matrices: torch.Tensor) -> None:
    require_dtype(OPERATOR, "x", rows, *FLOATS, torch.int8)
    require_plain(OPERATOR, x=rows)
    packed = matrices.dtype == torch.int32 and rows.dtype == torch.int8
    expected = "int8, or int32 that holds int4" if rows.dtype == torch.int8 else f"{rows.dtype}"
    require(packed or matrices.dtype == rows.dtype, OPERATOR, "the dtype of weight", matrices.dtype, expected)
    fits = rows.dim() == 2 and matrices.dim() == 3 and matrices.shape[1] == rows.shape[1]
    expected = f"[groups, k, n] for x of {tuple(rows.shape)}"
    require(fits, OPERATOR, "the shape of weight", tuple(matrices.shape), expected)
    for argument, tensor in {"x": rows, "weight": matrices}.items():
        inner = tensor.shape[-1] if tensor.is_contiguous() else tensor.shape[-2]
        require(inner < INNER_LIMIT, OPERATOR, f"the inner dimension of {argument}", inner, f"below {INNER_LIMIT}")
    width = block_width(matrices)
    if width:
        _check_blocks(matrices, width)


def _check_blocks(matrices: torch.Tensor, width: int) -> None:
    """The operator does not know of padding."""
    weight = "weight, which is in FRACTAL_NZ,"
    require(matrices.dtype != torch.float32, OPERATOR, f"the dtype of {weight}", matrices.dtype, "of at most 2 bytes")
    require_whole(OPERATOR, "weight", matrices)
    if matrices.dtype == torch.int32:
        expected = "32: cast it to FRACTAL_NZ in int8, and view it as int32 then"
        require(width == 32, OPERATOR, f"the width of the blocks of {weight} in bytes", width, expected)
    columns = width // matrices.itemsize
    fits = matrices.shape[1] % BLOCK_ROWS == 0 and matrices.shape[2] % columns == 0
    expected = f"multiples of {BLOCK_ROWS} and {columns} in the last two dimensions"
    require(fits, OPERATOR, f"the shape of {weight}", tuple(matrices.shape), expected)


def _group_lengths(group_list: torch.Tensor, kind: int | None, *, groups: int, rows: int) -> list[int]:
    require_dtype(OPERATOR, "group_list", group_list, torch.int64)
    require(group_list.shape == (groups,), OPERATOR, "the shape of group_list", tuple(group_list.shape), f"[{groups}]")
    require(groups <= MAX_GROUPS, OPERATOR, "the length of group_list", groups, f"at most {MAX_GROUPS}")
    require(kind in {0, 1}, OPERATOR, "group_list_type", kind, "0 or 1")
    lengths = group_list if kind == 1 else group_list.diff(prepend=group_list.new_zeros(1))
    expected = "not negative, or not decreasing" if kind == 1 else "not decreasing, from 0 on"
    require(bool((lengths >= 0).all()), OPERATOR, "group_list", group_list.tolist(), expected)
    total = int(lengths.sum())
    require(total <= rows, OPERATOR, "the end of group_list", total, f"at most the rows of x, {rows}")
    return lengths.tolist()
