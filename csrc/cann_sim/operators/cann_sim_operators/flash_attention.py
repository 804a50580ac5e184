"""Attention of encoders in layout TND: the tokens of all requests follow one another, and see all of their request.

The operator is that of training. Only its forward pass is simulated, without mask and dropout.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from cann_sim_operators.registry import implements, require, require_defaults, require_dtype
from cann_sim_operators.requests import check_totals, parts

OPERATOR = "npu_fusion_attention"
MAX_TOKENS, MAX_REQUESTS, MAX_HEADS, MAX_HEAD_SIZE = 1 << 20, 2048, 256, 768
UNLIMITED = 2**31 - 1
COPIES = 8
"""How often each value of the softmax's statistics is there."""

Result = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, int, int]


@implements("npu::npu_fusion_attention")
def fusion_attention(  # noqa: PLR0917
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    head_num: int,
    input_layout: str,
    pse: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
    atten_mask: torch.Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = UNLIMITED,
    next_tockens: int = UNLIMITED,
    inner_precise: int = 0,
    prefix: list[int] | None = None,
    actual_seq_qlen: list[int] | None = None,
    actual_seq_kvlen: list[int] | None = None,
    *others: object,
) -> Result:
    """Returns the attention of each request's queries to its keys, and the maxima and sums of the softmax.

    `query` is [tokens, heads, head size], `key` and `value` are [tokens, key heads, head size]; both lists are running
    totals of tokens. README.md lists what is demanded of the arguments; anything else raises RuntimeError.
    """
    optional = {"pse": pse, "padding_mask": padding_mask, "atten_mask": atten_mask, "prefix": prefix}
    numbers = {"pre_tockens": pre_tockens, "next_tockens": next_tockens}
    require_defaults(OPERATOR, {name: argument for name, argument in optional.items() if argument is not None})
    require_defaults(OPERATOR, {name: number for name, number in numbers.items() if number != UNLIMITED})
    require(not others, OPERATOR, "what follows actual_seq_kvlen", others, "left out (it is not simulated)")
    require(keep_prob == 1, OPERATOR, "keep_prob", keep_prob, "1 (others are not simulated)")
    require(inner_precise == 0, OPERATOR, "inner_precise", inner_precise, "0 (others are not simulated)")
    require(input_layout == "TND", OPERATOR, "input_layout", repr(input_layout), "'TND' (others are not simulated)")
    _check_tensors(query, key, value, head_num)
    query_ends = _ends("actual_seq_qlen", actual_seq_qlen, len(query))
    key_ends = _ends("actual_seq_kvlen", actual_seq_kvlen, len(key))
    expected = f"of {len(query_ends)} requests, as actual_seq_qlen"
    require(len(key_ends) == len(query_ends), OPERATOR, "actual_seq_kvlen", key_ends, expected)

    output = torch.empty_like(query)
    maxima, sums = (torch.empty(*query.shape[:2], dtype=torch.float32) for _ in range(2))
    for own, others_own in zip(parts(query_ends), parts(key_ends), strict=True):
        if own.start == own.stop:
            continue
        require(others_own.start < others_own.stop, OPERATOR, "actual_seq_kvlen", key_ends, "of keys for all queries")
        queries, keys, values = query[own].transpose(0, 1), key[others_own].transpose(0, 1), value[others_own]
        attended = scaled_dot_product_attention(
            queries[None], keys[None], values.transpose(0, 1)[None], scale=scale, enable_gqa=True
        )
        output[own] = attended[0].transpose(0, 1)
        maxima[own], sums[own] = _statistics(queries, keys, scale)
    spread = (each.unsqueeze(-1).expand(-1, -1, COPIES).contiguous() for each in (maxima, sums))
    return (output, *spread, query.new_empty(0), 0, 0, 0)


def _check_tensors(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int) -> None:
    for argument, tensor in {"query": query, "key": key, "value": value}.items():
        require_dtype(OPERATOR, argument, tensor, torch.float16, torch.bfloat16, torch.float32)
        require(tensor.dtype == query.dtype, OPERATOR, f"the dtype of {argument}", tensor.dtype, f"{query.dtype}")
        shape = tuple(tensor.shape)
        fits = len(shape) == 3 and 0 < shape[0] <= MAX_TOKENS and shape[2] == query.shape[2]
        require(fits, OPERATOR, f"the shape of {argument}", shape, f"[1 to {MAX_TOKENS} tokens, heads, head size]")
    require(query.shape[2] <= MAX_HEAD_SIZE, OPERATOR, "the head size", query.shape[2], f"at most {MAX_HEAD_SIZE}")
    require(value.shape == key.shape, OPERATOR, "the shape of value", tuple(value.shape), f"{tuple(key.shape)}")
    require(heads == query.shape[1], OPERATOR, "head_num", heads, f"the heads of query, {query.shape[1]}")
    require(heads <= MAX_HEADS, OPERATOR, "head_num", heads, f"at most {MAX_HEADS}")
    fits = key.shape[1] > 0 and heads % key.shape[1] == 0
    require(fits, OPERATOR, "the heads of key", key.shape[1], f"a divisor of head_num, {heads}")


def _ends(argument: str, ends: list[int] | None, tokens: int) -> list[int]:
    require(
        bool(ends) and len(ends or ()) <= MAX_REQUESTS, OPERATOR, argument, ends, f"of 1 to {MAX_REQUESTS} requests"
    )
    assert ends is not None
    check_totals(OPERATOR, argument, ends, tokens)
    return ends


def _statistics(queries: torch.Tensor, keys: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    groups = queries.shape[0] // keys.shape[0]
    scores = queries.float() @ keys.float().repeat_interleave(groups, 0).transpose(1, 2) * scale
    maxima = scores.amax(dim=-1)
    sums = (scores - maxima.unsqueeze(-1)).exp().sum(dim=-1)
    return maxima.transpose(0, 1), sums.transpose(0, 1)
