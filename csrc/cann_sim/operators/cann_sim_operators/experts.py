"""Matrix products of mixtures of experts."""

from __future__ import annotations

import torch

from cann_sim_operators.layers import FLOATS
from cann_sim_operators.registry import implements, require, require_defaults, require_dtype

INNER_LIMIT = 65536
MAX_GROUPS = 1024


@implements("npu::npu_grouped_matmul")
def grouped_matmul(
    x: list[torch.Tensor],
    weight: list[torch.Tensor],
    *,
    group_list: torch.Tensor | None = None,
    split_item: int | None = 0,
    group_type: int | None = None,
    group_list_type: int | None = 0,
    **others: object,
) -> list[torch.Tensor]:
    """Multiplies each group of rows with the group's matrix, and returns the products as one tensor in a list.

    Simulated for one tensor x [rows, k], sorted by group, and one weight [groups, k, n]. `group_list` holds running
    totals of the groups' lengths (group_list_type 0) or the lengths themselves (1). A device does not write the results
    for rows behind the last group; here they are NaN.
    """
    operator = "npu_grouped_matmul"
    require_defaults(operator, others)
    if len(x) != 1 or len(weight) != 1 or group_list is None or split_item not in {2, 3} or group_type != 0:
        raise RuntimeError(
            f"{operator}: {len(x)} x, {len(weight)} weight, group_list={group_list}, split_item={split_item}, "
            f"group_type={group_type} is not simulated; one x, one weight, a group_list, split_item=2, group_type=0 is"
        )
    (rows,), (matrices,) = x, weight
    require_dtype(operator, "x", rows, *FLOATS)
    require(matrices.dtype == rows.dtype, operator, "the dtype of weight", matrices.dtype, f"{rows.dtype}")
    fits = rows.dim() == 2 and matrices.dim() == 3 and matrices.shape[1] == rows.shape[1]
    require(
        fits, operator, "the shape of weight", tuple(matrices.shape), f"[groups, k, n] for x of {tuple(rows.shape)}"
    )
    for argument, tensor in {"x": rows, "weight": matrices}.items():
        inner = tensor.shape[-1] if tensor.is_contiguous() else tensor.shape[-2]
        require(inner < INNER_LIMIT, operator, f"the inner dimension of {argument}", inner, f"below {INNER_LIMIT}")
    lengths = _group_lengths(operator, group_list, group_list_type, groups=len(matrices), rows=len(rows))
    parts = rows[: sum(lengths)].split(lengths)
    products = [part @ matrix for part, matrix in zip(parts, matrices, strict=True)]
    return [torch.cat([*products, rows.new_full((len(rows) - sum(lengths), matrices.shape[2]), torch.nan)])]


def _group_lengths(operator: str, group_list: torch.Tensor, kind: int | None, *, groups: int, rows: int) -> list[int]:
    require_dtype(operator, "group_list", group_list, torch.int64)
    require(group_list.shape == (groups,), operator, "the shape of group_list", tuple(group_list.shape), f"[{groups}]")
    require(groups <= MAX_GROUPS, operator, "the length of group_list", groups, f"at most {MAX_GROUPS}")
    require(kind in {0, 1}, operator, "group_list_type", kind, "0 or 1")
    lengths = group_list if kind == 1 else group_list.diff(prepend=group_list.new_zeros(1))
    expected = "not negative, or not decreasing" if kind == 1 else "not decreasing, from 0 on"
    require(bool((lengths >= 0).all()), operator, "group_list", group_list.tolist(), expected)
    total = int(lengths.sum())
    require(total <= rows, operator, "the end of group_list", total, f"at most the rows of x, {rows}")
    return lengths.tolist()
