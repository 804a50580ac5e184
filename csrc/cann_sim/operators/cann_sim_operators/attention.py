"""Attention in layout TND, where the tokens of all requests follow one another; keys and values are paged or dense.

The documentation of torch-npu contradicts itself about TND: it excludes paging in one place and describes it in
another. The latter is followed, as inference engines do. Calls with `query_rope`, which have other layouts and rules,
are in `mla`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from cann_sim_operators.mla import attend_to_latents
from cann_sim_operators.registry import (
    FP32_SWITCH,
    fp32,
    implements,
    require,
    require_contiguous,
    require_defaults,
    require_dtype,
)
from cann_sim_operators.requests import check_totals, parts

OPERATOR = "npu_fused_infer_attention_score"
MASK_SIZE = 2048
BLOCK_SIZE = 128
MAX_REQUESTS, MAX_HEADS, MAX_HEADS_PER_KEY_HEAD = 4096, 256, 64
MAX_HEAD_SIZE, HEAD_SIZE_STEP = 256, 16
COMMON_HEAD_SIZES = 64, 128
UNEQUAL_SIZES, MAX_UNEQUAL_TOKENS = (192, 128), 65536
"""The head sizes of keys and values where they differ, as those of MLA do, and how many tokens may have them."""
MAX_ELEMENTS = 2**31 - 1

KeysAndValues = Callable[[int], tuple[torch.Tensor, torch.Tensor]]
"""Returns the keys and values of the request with this index, both [heads, tokens, head size]."""


@implements("npu::npu_fused_infer_attention_score")
def fused_infer_attention_score(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    atten_mask: torch.Tensor | None = None,
    actual_seq_lengths: list[int] | None = None,
    actual_seq_lengths_kv: list[int] | None = None,
    block_table: torch.Tensor | None = None,
    query_rope: torch.Tensor | None = None,
    key_rope: torch.Tensor | None = None,
    num_heads: int = 1,
    scale: float = 1.0,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    sparse_mode: int = 0,
    inner_precise: int = 0,
    block_size: int = 0,
    softmax_lse_flag: bool = False,
    **others: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the attention of each request's queries to its keys, and the logarithm of the softmax's sum if asked for.

    `query` is [tokens, heads, head size]. `key` and `value` are [tokens, key heads, head size], or with `block_table` a
    cache in blocks. README.md lists what is demanded of the arguments; anything else raises RuntimeError. The sums are
    [tokens, heads, 1] in float32, or empty.
    """
    require_defaults(OPERATOR, others)
    if query_rope is not None or key_rope is not None:
        given = {
            "atten_mask": atten_mask,
            "actual_seq_lengths": actual_seq_lengths,
            "sparse_mode": sparse_mode or None,
            "inner_precise": inner_precise or None,
            "softmax_lse_flag": softmax_lse_flag or None,
        }
        others = {name: value for name, value in given.items() if value is not None}
        require_defaults(f"{OPERATOR} with query_rope", others)
        attended = attend_to_latents(
            OPERATOR,
            (query, query_rope),
            (key, value, key_rope),
            actual_seq_lengths_kv,
            block_table,
            heads=num_heads,
            key_heads=num_key_value_heads,
            scale=scale,
            layout=input_layout,
            block_size=block_size,
        )
        return attended, torch.empty(0)
    if input_layout != "TND":
        raise RuntimeError(f"{OPERATOR}: input_layout={input_layout!r} is not simulated; 'TND' is")
    key_heads = num_key_value_heads or num_heads
    _check_heads(query, num_heads, key_heads)
    _check_tensors(query, key, value)
    _check_mask(atten_mask, sparse_mode)
    unequal = value.shape != key.shape
    if unequal:
        _check_unequal_sizes(query, key, value, shared=num_heads > key_heads, paged=block_table is not None)
    else:
        alone = atten_mask is None and block_table is None
        _check_kernel(query, num_heads > key_heads, inner_precise, alone=alone, rows=key.dim() == 3)

    query_ends = _lengths("actual_seq_lengths", actual_seq_lengths)  # running totals
    check_totals(OPERATOR, "actual_seq_lengths", query_ends, query.shape[0])
    key_lengths = _lengths("actual_seq_lengths_kv", actual_seq_lengths_kv)
    expected = f"of {len(query_ends)} requests, as actual_seq_lengths"
    require(len(key_lengths) == len(query_ends), OPERATOR, "actual_seq_lengths_kv", key_lengths, expected)
    fits = 0 < len(query_ends) <= MAX_REQUESTS
    require(fits, OPERATOR, "the number of requests", len(query_ends), f"from 1 to {MAX_REQUESTS}")

    row = (key_heads, query.shape[2])
    if unequal:
        check_totals(OPERATOR, "actual_seq_lengths_kv", key_lengths, key.shape[0])
        read = _read_rows(key, value, key_lengths)
    elif block_table is None:
        check_totals(OPERATOR, "actual_seq_lengths_kv", key_lengths, key.shape[0])
        read = _dense(key, value, key_lengths, row)
    else:
        _check_paging(key, block_table, key_lengths, block_size)
        read = _paged(key, value, block_table, key_lengths, row)

    values_size = value.shape[2] if unequal else query.shape[2]
    return _attend(query, query_ends, read, atten_mask, scale, values_size=values_size, with_sums=softmax_lse_flag)


@implements("npu::npu_fused_infer_attention_score.out")
def fused_infer_attention_score_out(
    *tensors: torch.Tensor, out: list[torch.Tensor], **others: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Does the same, into two tensors that the caller has made. The second, for the sums, is empty without them."""
    results = fused_infer_attention_score(*tensors, **others)
    require(len(out) == len(results), OPERATOR, "the number of tensors in out", len(out), f"{len(results)}")
    for place, result in zip(out, results, strict=True):
        shape, dtype = tuple(place.shape), place.dtype
        require(place.shape == result.shape, OPERATOR, "the shape of a tensor in out", shape, f"{tuple(result.shape)}")
        require(dtype == result.dtype, OPERATOR, "the dtype of a tensor in out", dtype, f"{result.dtype}")
        require_contiguous(OPERATOR, out=place)
        place.copy_(result)
    return out[0], out[1]


def _attend(
    query: torch.Tensor,
    ends: list[int],
    read: KeysAndValues,
    mask: torch.Tensor | None,
    scale: float,
    *,
    values_size: int,
    with_sums: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    output = query.new_empty(*query.shape[:2], values_size)
    sums = torch.empty(*query.shape[:2], 1, dtype=torch.float32) if with_sums else torch.empty(0)
    for request, own in enumerate(parts(ends)):
        if own.start == own.stop:
            continue
        keys, values = read(request)
        visible = _visible(mask, own.stop - own.start, keys.shape[1])
        queries = query[own].transpose(0, 1)
        attended = scaled_dot_product_attention(
            queries[None], keys[None], values[None], attn_mask=visible, scale=scale, enable_gqa=True
        )
        output[own] = attended[0].transpose(0, 1)
        if with_sums:
            sums[own] = _log_sum_exp(queries, keys, visible, scale)
    return output, sums


def _check_heads(query: torch.Tensor, heads: int, key_heads: int) -> None:
    require(query.dim() == 3, OPERATOR, "the shape of query", tuple(query.shape), "[tokens, heads, head size]")
    require(query.shape[1] == heads, OPERATOR, "num_heads", heads, f"the heads of query, {query.shape[1]}")
    require(heads <= MAX_HEADS, OPERATOR, "num_heads", heads, f"at most {MAX_HEADS}")
    fits = key_heads > 0 and heads % key_heads == 0 and heads // key_heads <= MAX_HEADS_PER_KEY_HEAD
    expected = f"a divisor of num_heads ({heads}), at least a {MAX_HEADS_PER_KEY_HEAD}th of it"
    require(fits, OPERATOR, "num_key_value_heads", key_heads, expected)


def _check_kernel(query: torch.Tensor, shared: bool, inner_precise: int, *, alone: bool, rows: bool) -> None:
    """Finds the kernel to which the operator would lead the call, and checks what that demands.

    `shared` means several heads for each key head, `alone` neither mask nor pages, `rows` that the heads of a token
    follow one another in `key`.
    """
    size = query.shape[2]
    any_size = size <= MAX_HEAD_SIZE and size % HEAD_SIZE_STEP == 0
    multiples = f"a multiple of {HEAD_SIZE_STEP}, at most {MAX_HEAD_SIZE}"
    common = " or ".join(map(str, COMMON_HEAD_SIZES))
    if not rows:
        require(size in COMMON_HEAD_SIZES, OPERATOR, "the head size", size, f"{common} in a cache of four dimensions")
    if shared:
        require(inner_precise == 0, OPERATOR, "inner_precise", inner_precise, "0 where heads share a key head")
        require(any_size, OPERATOR, "the head size", size, f"{multiples} where heads share a key head")
    elif query.dtype == torch.float16:
        expected = "bfloat16 with a mask or pages where no heads share a key head"
        require(alone, OPERATOR, "the dtype of query", query.dtype, expected)
        require(
            inner_precise == 1, OPERATOR, "inner_precise", inner_precise, "1 in half where no heads share a key head"
        )
        require(any_size, OPERATOR, "the head size", size, multiples)
    else:
        require(0 <= inner_precise <= 3, OPERATOR, "inner_precise", inner_precise, "from 0 to 3")
        expected = f"{common} where no heads share a key head"
        require(size in COMMON_HEAD_SIZES, OPERATOR, "the head size", size, expected)


def _check_unequal_sizes(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, shared: bool, paged: bool
) -> None:
    """Checks what is demanded where values have another size than keys: neither pages nor shared heads."""
    sizes = (query.shape[-1], key.shape[-1], value.shape[-1])
    fits = sizes == (UNEQUAL_SIZES[0], *UNEQUAL_SIZES) and not shared and not paged
    expected = f"{UNEQUAL_SIZES[0]}, {UNEQUAL_SIZES[0]}, {UNEQUAL_SIZES[1]} without pages, one key head for each head"
    require(fits, OPERATOR, "the head sizes of query, key and value", sizes, expected)
    require(query.dtype != torch.float16, OPERATOR, "the dtype of query", query.dtype, "bfloat16 with unequal sizes")
    fits = key.dim() == value.dim() == 3 and key.shape[:2] == value.shape[:2]
    require(fits, OPERATOR, "the shape of value", tuple(value.shape), f"{tuple(key.shape)} up to the head size")
    require(key.shape[1] == query.shape[1], OPERATOR, "the heads of key", key.shape[1], f"{query.shape[1]}")
    tokens = max(len(query), len(key))
    require(tokens <= MAX_UNEQUAL_TOKENS, OPERATOR, "the number of tokens", tokens, f"at most {MAX_UNEQUAL_TOKENS}")


def _check_tensors(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    if query.dtype == torch.float32:
        require(
            query.dtype in fp32(),
            OPERATOR,
            "the dtype of query",
            query.dtype,
            f"half or bfloat16 (unless {FP32_SWITCH}=1)",
        )
    else:
        require_dtype(OPERATOR, "query", query, torch.float16, torch.bfloat16)
    for argument, tensor in {"key": key, "value": value}.items():
        require(tensor.dtype == query.dtype, OPERATOR, f"the dtype of {argument}", tensor.dtype, f"{query.dtype}")
    require_contiguous(OPERATOR, query=query, key=key, value=value)


def _check_mask(mask: torch.Tensor | None, sparse_mode: int) -> None:
    require(sparse_mode in {0, 3}, OPERATOR, "sparse_mode", sparse_mode, "0 or 3 (others are not simulated)")
    if sparse_mode == 0:
        found = None if mask is None else f"a tensor of {tuple(mask.shape)}"
        require(mask is None, OPERATOR, "atten_mask", found, "None in sparse mode 0 of layout TND")
        return
    shapes = [(1,) * leading + (MASK_SIZE, MASK_SIZE) for leading in range(3)]
    found = None if mask is None else tuple(mask.shape)
    require(found in shapes, OPERATOR, "the shape of atten_mask", found, f"one of {shapes} in sparse mode 3")
    assert mask is not None
    require_dtype(OPERATOR, "atten_mask", mask, torch.bool, torch.int8, torch.uint8)
    require_contiguous(OPERATOR, atten_mask=mask)


def _lengths(argument: str, lengths: list[int] | None) -> list[int]:
    require(lengths is not None, OPERATOR, argument, lengths, "given in layout TND")
    assert lengths is not None
    require(min(lengths, default=0) >= 0, OPERATOR, argument, lengths, "not negative")
    return lengths


def _check_paging(
    cache: torch.Tensor,
    block_table: torch.Tensor,
    key_lengths: list[int],
    block_size: int,
) -> None:
    require(block_size == BLOCK_SIZE, OPERATOR, "block_size", block_size, f"{BLOCK_SIZE}")
    shapes = "[blocks, tokens of a block, heads x head size] or [blocks, heads, tokens of a block, head size]"
    require(cache.dim() in {3, 4}, OPERATOR, "the shape of key", tuple(cache.shape), shapes)
    require(cache.shape[-2] == block_size, OPERATOR, "the tokens of a block of key", cache.shape[-2], f"{block_size}")
    require(cache.numel() <= MAX_ELEMENTS, OPERATOR, "the elements of key", cache.numel(), f"at most {MAX_ELEMENTS}")
    require_dtype(OPERATOR, "block_table", block_table, torch.int32)
    blocks = max((math.ceil(length / block_size) for length in key_lengths), default=0)
    fits = block_table.dim() == 2 and len(block_table) == len(key_lengths) and block_table.shape[1] >= blocks
    expected = f"[{len(key_lengths)}, {blocks} or more]"
    require(fits, OPERATOR, "the shape of block_table", tuple(block_table.shape), expected)


def _dense(key: torch.Tensor, value: torch.Tensor, ends: list[int], row: tuple[int, int]) -> KeysAndValues:
    require(
        tuple(key.shape[1:]) == row, OPERATOR, "the shape of key", tuple(key.shape), f"[tokens, {row[0]}, {row[1]}]"
    )
    return _read_rows(key, value, ends)


def _read_rows(key: torch.Tensor, value: torch.Tensor, ends: list[int]) -> KeysAndValues:
    rows = parts(ends)

    def read(request: int) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(each[rows[request]].transpose(0, 1) for each in (key, value))

    return read


def _paged(
    key: torch.Tensor, value: torch.Tensor, block_table: torch.Tensor, lengths: list[int], row: tuple[int, int]
) -> KeysAndValues:
    heads, size = row
    block_size = key.shape[-2]
    block = (heads, block_size, size) if key.dim() == 4 else (block_size, heads * size)
    require(tuple(key.shape[1:]) == block, OPERATOR, "the shape of a block of key", tuple(key.shape[1:]), f"{block}")

    def read(request: int) -> tuple[torch.Tensor, torch.Tensor]:
        blocks = block_table[request, : math.ceil(lengths[request] / block_size)].long()
        inside = bool(((blocks >= 0) & (blocks < len(key))).all())
        require(inside, OPERATOR, f"block_table[{request}]", blocks.tolist(), f"of blocks below {len(key)}")
        return tuple(in_order(cache[blocks])[:, : lengths[request]] for cache in (key, value))

    def in_order(blocks: torch.Tensor) -> torch.Tensor:
        if blocks.dim() == 4:
            return blocks.transpose(0, 1).flatten(1, 2)
        return blocks.flatten(0, 1).unflatten(-1, (heads, size)).transpose(0, 1)

    return read


def _visible(mask: torch.Tensor | None, queries: int, keys: int) -> torch.Tensor | None:
    """Returns which keys each query sees, None for all: the last query and the last key are aligned in the mask."""
    if mask is None or queries == 1:
        return None
    expected = f"at least {queries}, a key for each query, in sparse mode 3"
    require(keys >= queries, OPERATOR, "a length of actual_seq_lengths_kv", keys, expected)
    visible = torch.ones(queries, keys, dtype=torch.bool)
    if queries > MASK_SIZE:
        return visible.tril_(keys - queries)
    corner = mask.reshape(MASK_SIZE, MASK_SIZE)[:queries, :queries]
    visible[:, keys - queries :] = corner == 0
    return visible


def _log_sum_exp(queries: torch.Tensor, keys: torch.Tensor, visible: torch.Tensor | None, scale: float) -> torch.Tensor:
    groups = queries.shape[0] // keys.shape[0]
    scores = queries.float() @ keys.float().repeat_interleave(groups, 0).transpose(1, 2) * scale
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    return scores.logsumexp(dim=-1).transpose(0, 1).unsqueeze(-1)
