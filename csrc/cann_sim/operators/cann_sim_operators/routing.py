"""Which experts take which tokens, and the ways of the tokens' rows to the experts and back.

The operators' sources settle what their documentation leaves open. What the documentation calls undefined is NaN here,
or the largest integer, so that nobody can rely on it.
"""

from __future__ import annotations

import torch

from cann_sim_operators.layers import FLOATS
from cann_sim_operators.quantisation import quantise_rows
from cann_sim_operators.registry import implements, require, require_defaults, require_dtype, require_shape, undefined

MAX_CHOSEN = 1024
MAX_EXPERTS = 2048
GROUP_STEP = 32
"""Experts of a group are counted in these steps against MAX_EXPERTS."""
MAX_ROUTED_EXPERTS = 10240
MAX_ROUTES_OF_A_TOKEN = 512
COUNTS = 1
NOT_QUANTISED, QUANTISED = -1, 1


@implements("npu::npu_moe_gating_top_k_softmax_v2")
def gating_top_k_softmax(
    x: torch.Tensor, *, k: int = 1, renorm: int | None = 0, **others: object
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the k largest values of softmax(x), their indices in int32, and an empty tensor.

    With `renorm=1` it is the softmax of the k largest values of x. Of equal values, the first is taken.
    """
    operator = "npu_moe_gating_top_k_softmax_v2"
    require_defaults(operator, others)
    require_dtype(operator, "x", x, *FLOATS)
    require(x.dim() in {2, 3}, operator, "the shape of x", tuple(x.shape), "of 2 or 3 dimensions")
    require(0 < k <= min(x.shape[-1], MAX_CHOSEN), operator, "k", k, f"from 1 to {min(x.shape[-1], MAX_CHOSEN)}")
    require(renorm in {0, 1}, operator, "renorm", renorm, "0 or 1")
    scores = x.float() if renorm else x.float().softmax(-1)
    values, indices = _largest(scores, k)
    values = values.softmax(-1) if renorm else values
    return values.to(x.dtype), indices.int(), x.new_empty(0, dtype=torch.float32)


@implements("npu::npu_moe_gating_top_k")
def gating_top_k(
    x: torch.Tensor,
    k: int,
    *,
    bias: torch.Tensor | None = None,
    k_group: int = 1,
    group_count: int = 1,
    group_select_mode: int = 0,
    norm_type: int = 0,
    routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
    **others: object,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the scores of the k experts chosen for each row of x, the experts in int32, and an undefined tensor.

    A score is softmax(x) (`norm_type` 0) or sigmoid(x) (1). The choice is made by score + bias, among the `k_group`
    best of `group_count` groups of experts. A group is as good as its best expert (`group_select_mode` 0), or as its
    best two together (1). Chosen sigmoid scores are divided by their sum, softmax scores are not; both are multiplied
    by `routed_scaling_factor`.
    """
    operator = "npu_moe_gating_top_k"
    require_defaults(operator, others)
    require_dtype(operator, "x", x, *FLOATS)
    require(x.dim() == 2, operator, "the shape of x", tuple(x.shape), "of 2 dimensions")
    experts = x.shape[1]
    _check_groups(operator, experts, k, k_group, group_count)
    require(group_select_mode in {0, 1}, operator, "group_select_mode", group_select_mode, "0 or 1")
    require(norm_type in {0, 1}, operator, "norm_type", norm_type, "0 or 1")
    scores = x.float().sigmoid() if norm_type else x.float().softmax(-1)
    preferences = scores
    if bias is not None:
        require(bias.dtype == x.dtype, operator, "the dtype of bias", bias.dtype, f"that of x, {x.dtype}")
        require(bias.shape == (experts,), operator, "the shape of bias", tuple(bias.shape), f"({experts},)")
        preferences = scores + bias.float()

    groups = preferences.unflatten(1, (group_count, -1))
    goodness = _largest(groups, 1 + group_select_mode)[0].sum(-1)
    chosen_groups = torch.zeros_like(goodness, dtype=torch.bool).scatter_(1, _largest(goodness, k_group)[1], value=True)
    indices = _largest(groups.masked_fill(~chosen_groups.unsqueeze(-1), -torch.inf).flatten(1), k)[1]
    values = scores.gather(1, indices)
    if norm_type:
        values = values / (values.sum(-1, keepdim=True) + eps)
    return (values * routed_scaling_factor).to(x.dtype), indices.int(), undefined(x.shape, torch.float32)


def _check_groups(operator: str, experts: int, k: int, k_group: int, group_count: int) -> None:
    require(experts <= MAX_EXPERTS, operator, "the number of experts", experts, f"at most {MAX_EXPERTS}")
    fits = group_count > 0 and experts % group_count == 0 and experts // group_count > 2
    require(fits, operator, "group_count", group_count, f"a divisor of {experts} that leaves more than 2 to each group")
    size = experts // group_count
    counted = -(-size // GROUP_STEP) * GROUP_STEP * group_count
    require(counted <= MAX_EXPERTS, operator, f"{group_count} groups of {size}", counted, f"at most {MAX_EXPERTS}")
    require(1 <= k_group <= group_count, operator, "k_group", k_group, f"from 1 to {group_count}")
    require(1 <= k <= size * k_group, operator, "k", k, f"from 1 to {size * k_group}")


@implements("npu::npu_moe_init_routing_v2")
def init_routing(
    x: torch.Tensor,
    expert_idx: torch.Tensor,
    *,
    scale: torch.Tensor | None = None,
    active_num: int = -1,
    expert_num: int = -1,
    expert_tokens_num_type: int = 0,
    expert_tokens_num_flag: bool = False,
    quant_mode: int = NOT_QUANTISED,
    active_expert_range: tuple[int, ...] = (),
    **others: object,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Copies each row of x once for each of its experts that is within the range, sorted by expert.

    Returns the copies, followed by undefined rows; for each entry of `expert_idx` where its copy is, or -1; how many
    copies each expert within the range has; and the scales of the copies. With `quant_mode` 1 the copies are quantised
    by row, after having been multiplied by the expert's row of `scale`, if there is one. Otherwise `scale` holds the
    scales of the rows of x, and without it those of the copies are undefined.
    """
    operator = "npu_moe_init_routing_v2"
    require_defaults(operator, others)
    require(quant_mode in {NOT_QUANTISED, QUANTISED}, operator, "quant_mode", quant_mode, "-1 or 1 on A2 and A3")
    require_dtype(operator, "x", x, *FLOATS, *((torch.int8,) if quant_mode == NOT_QUANTISED else ()))
    require_dtype(operator, "expert_idx", expert_idx, torch.int32)
    fits = x.dim() == expert_idx.dim() == 2 and len(x) == len(expert_idx)
    require(fits, operator, "the shape of expert_idx", tuple(expert_idx.shape), f"[rows of x, k] for {tuple(x.shape)}")
    routes = expert_idx.numel()
    require(active_num in {-1, routes}, operator, "active_num", active_num, f"{routes}, or -1")
    require(expert_tokens_num_flag, operator, "expert_tokens_num_flag", expert_tokens_num_flag, "True")
    require(expert_tokens_num_type == COUNTS, operator, "expert_tokens_num_type", expert_tokens_num_type, "1 (counts)")
    require(0 < expert_num <= MAX_ROUTED_EXPERTS, operator, "expert_num", expert_num, f"1 to {MAX_ROUTED_EXPERTS}")
    begin, end = active_expert_range if len(active_expert_range) == 2 else (0, 0)
    fits = 0 <= begin < end <= expert_num
    require(fits, operator, "active_expert_range", list(active_expert_range), f"[begin, end] within {expert_num}")
    wild = expert_idx[(expert_idx < 0) | (expert_idx >= expert_num)].tolist()
    require(not wild, operator, "an expert", wild, f"from 0 to {expert_num - 1}")

    if scale is not None:
        require_dtype(operator, "scale", scale, torch.float32)
        require_shape(operator, "scale", scale, (end - begin, x.shape[1]) if quant_mode == QUANTISED else (len(x),))

    experts = expert_idx.flatten()
    here = (experts >= begin) & (experts < end)
    order = torch.sort(torch.where(here, experts, expert_num), stable=True)[1][: int(here.sum())]
    rows = order // expert_idx.shape[1]
    copies = undefined((routes, x.shape[1]), torch.int8 if quant_mode == QUANTISED else x.dtype)
    scales = undefined((routes,), torch.float32)
    if quant_mode == QUANTISED:
        smoothed = x[rows].float() if scale is None else x[rows].float() * scale[experts[order] - begin]
        copies[: len(order)], scales[: len(order)] = quantise_rows(smoothed)
    else:
        copies[: len(order)] = x[rows]
        if scale is not None:
            scales[: len(order)] = scale[rows]
    positions = torch.full_like(experts, -1)
    positions[order] = torch.arange(len(order), dtype=torch.int32)
    counts = torch.bincount(experts[order] - begin, minlength=end - begin)
    return copies, positions, counts, scales


@implements("npu::npu_moe_token_unpermute")
def token_unpermute(
    permuted_tokens: torch.Tensor, sorted_indices: torch.Tensor, probs: torch.Tensor | None = None, **others: object
) -> torch.Tensor:
    """Returns for each row of `probs` the weighted sum of the tokens at the row's indices, added in their order.

    A token of weight 0 is not read, whatever it holds. Without `probs`, returns the tokens at the indices.
    """
    operator = "npu_moe_token_unpermute"
    require_defaults(operator, others)
    require_dtype(operator, "permuted_tokens", permuted_tokens, *FLOATS)
    require_dtype(operator, "sorted_indices", sorted_indices, torch.int32)
    if probs is None:
        probs = torch.ones(len(sorted_indices), 1)
    require_dtype(operator, "probs", probs, *FLOATS)
    fits = permuted_tokens.dim() == 2 and probs.dim() == 2 and sorted_indices.shape == (probs.numel(),)
    expected = f"({probs.numel()},), as many as probs, beside tokens of 2 dimensions"
    require(fits, operator, "the shape of sorted_indices", tuple(sorted_indices.shape), expected)
    require(probs.shape[1] <= MAX_ROUTES_OF_A_TOKEN, operator, "k", probs.shape[1], f"at most {MAX_ROUTES_OF_A_TOKEN}")
    last = len(permuted_tokens) - 1
    wild = sorted_indices[(sorted_indices < 0) | (sorted_indices > last)].tolist()
    require(not wild, operator, "an index", wild, f"from 0 to {last}")
    used = sorted_indices[probs.flatten() != 0]
    require(len(used.unique()) == len(used), operator, "sorted_indices", used.tolist(), "free of repetitions")

    total = torch.zeros(len(probs), permuted_tokens.shape[1])
    for indices, weights in zip(sorted_indices.view(probs.shape).t(), probs.float().t().unsqueeze(-1), strict=True):
        total += torch.where(weights == 0, 0, permuted_tokens[indices].float() * weights)
    return total.to(permuted_tokens.dtype)


@implements("npu::_npu_moe_token_unpermute")
def token_unpermute_for_training(*arguments: torch.Tensor, **others: object) -> tuple[torch.Tensor, torch.Tensor]:
    """What torch-npu calls outside of inference mode: the same, and the tokens, which it keeps for gradients."""
    return token_unpermute(*arguments, **others), arguments[0].clone()


def _largest(values: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    ordered, indices = torch.sort(values, dim=-1, descending=True, stable=True)
    return ordered[..., :count], indices[..., :count]
