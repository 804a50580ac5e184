"""Writing keys and values into a paged cache, and reading them from it."""

from __future__ import annotations

import itertools
import math

import torch

from cann_sim_operators.registry import (
    fp32,
    implements,
    require,
    require_contiguous,
    require_defaults,
    require_dtype,
    require_plain,
    require_shape,
)

CACHED = (torch.float16, torch.bfloat16, torch.int8)
COPIED_BYTES, MAX_TOKEN_BYTES = 32, 148 * 1024


@implements("npu::npu_scatter_pa_kv_cache")
def scatter_pa_kv_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    cache_mode: str | None = "PA_NZ",
    **others: object,
) -> None:
    """Writes each token's key and value into the slot that `slot_mapping` names for it, in place.

    `key` and `value` are [tokens, heads, head size], the caches [blocks, tokens of a block, heads, head size]; the head
    sizes of key and value may differ. Slot s is token s % (tokens of a block) of block s // (tokens of a block).
    """
    operator = "npu_scatter_pa_kv_cache"
    require_defaults(operator, others)
    if cache_mode not in {None, "Norm"}:
        raise RuntimeError(f"{operator}: cache_mode={cache_mode!r}, the default, is not simulated; 'Norm' is")
    require_dtype(operator, "key", key, *CACHED, *fp32())
    require_dtype(operator, "slot_mapping", slot_mapping, torch.int32)  # the kernel reads 32 bits of int64 as well
    require_contiguous(operator, key=key, value=value, key_cache=key_cache, value_cache=value_cache)
    _write(operator, key, key_cache, slot_mapping)
    _write(operator, value, value_cache, slot_mapping)


@implements("atb::_npu_reshape_and_cache")
def reshape_and_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_indices: torch.Tensor,
) -> None:
    """Does the same as `scatter_pa_kv_cache`, for fewer dtypes."""
    operator = "_npu_reshape_and_cache"
    require_dtype(operator, "key", key, torch.float16, torch.bfloat16, torch.int8)
    require_dtype(operator, "slot_indices", slot_indices, torch.int32)
    _write(operator, key, key_cache, slot_indices)
    _write(operator, value, value_cache, slot_indices)


@implements("npu::npu_gather_pa_kv_cache")
def gather_pa_kv_cache(  # noqa: PLR0917
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    seq_offset: torch.Tensor | None = None,
    is_seq_lens_cumsum: bool = False,
) -> None:
    """Copies the first `seq_lens` tokens of each request's blocks into `key` and `value`, one request after another.

    The caches are [blocks, tokens of a block, heads, head size], `key` and `value` [tokens, heads, head size].
    `seq_offset` says how many tokens of each request are passed over, in whole blocks. Lengths may be running totals
    that begin with 0.
    """
    operator = "npu_gather_pa_kv_cache"
    require_dtype(operator, "key_cache", key_cache, *CACHED, *fp32())
    require_plain(operator, key_cache=key_cache, value_cache=value_cache)
    require_contiguous(operator, key_cache=key_cache, value_cache=value_cache, key=key, value=value)
    for name, cache, rows in (("key", key_cache, key), ("value", value_cache, value)):
        _check_read(operator, name, cache, rows, key_cache.dtype)
    offsets = [0] * len(block_tables) if seq_offset is None else seq_offset.tolist()
    lengths = _lengths(operator, block_tables, seq_lens, totals=is_seq_lens_cumsum)
    require(sum(lengths) == len(key), operator, "the tokens of key", len(key), f"{sum(lengths)}, all of seq_lens")

    size, first = key_cache.shape[1], 0
    if seq_offset is not None:
        require_dtype(operator, "seq_offset", seq_offset, torch.int32)
        require_shape(operator, "seq_offset", seq_offset, (len(block_tables),))
        whole = all(offset >= 0 and offset % size == 0 for offset in offsets)
        require(whole, operator, "seq_offset", offsets, f"of whole blocks of {size}")
    for table, length, offset in zip(block_tables, lengths, offsets, strict=True):
        begin, count = offset // size, math.ceil(length / size)
        blocks = table[begin : begin + count].long()
        fits = len(blocks) == count and bool(((blocks >= 0) & (blocks < len(key_cache))).all())
        require(fits, operator, "the blocks of a request", blocks.tolist(), f"{count} below {len(key_cache)}")
        for cache, rows in ((key_cache, key), (value_cache, value)):
            rows[first : first + length] = cache[blocks].flatten(0, 1)[:length]
        first += length


def _check_read(operator: str, name: str, cache: torch.Tensor, rows: torch.Tensor, dtype: torch.dtype) -> None:
    for argument, tensor in ((f"{name}_cache", cache), (name, rows)):
        require(tensor.dtype == dtype, operator, f"the dtype of {argument}", tensor.dtype, f"{dtype}")
        require(tensor.numel() > 0, operator, argument, f"empty, {tuple(tensor.shape)}", "not empty")
    fits = cache.dim() == 4 and rows.dim() == 3 and cache.shape[2:] == rows.shape[1:]
    expected = f"[blocks, tokens of a block, heads, head size] for rows of {tuple(rows.shape)}"
    require(fits, operator, f"the shape of {name}_cache", tuple(cache.shape), expected)
    token = math.prod(rows.shape[1:]) * dtype.itemsize
    expected = f"a multiple of {COPIED_BYTES}, at most {MAX_TOKEN_BYTES}"
    fits = token % COPIED_BYTES == 0 and token <= MAX_TOKEN_BYTES
    require(fits, operator, f"the bytes of a token of {name}", token, expected)


def _lengths(operator: str, block_tables: torch.Tensor, seq_lens: torch.Tensor, *, totals: bool) -> list[int]:
    require_dtype(operator, "block_tables", block_tables, torch.int32)
    require_dtype(operator, "seq_lens", seq_lens, torch.int32)
    require_contiguous(operator, block_tables=block_tables, seq_lens=seq_lens)
    expected = "[requests, blocks], not empty"
    fits = block_tables.dim() == 2 and block_tables.numel() > 0
    require(fits, operator, "the shape of block_tables", tuple(block_tables.shape), expected)
    require_shape(operator, "seq_lens", seq_lens, (len(block_tables) + totals,))
    lengths: list[int] = seq_lens.tolist()
    if totals:
        require(lengths[0] == 0, operator, "the first of seq_lens", lengths[0], "0, as they are running totals")
        lengths = [end - begin for begin, end in itertools.pairwise(lengths)]
    require(min(lengths) >= 0, operator, "the lengths in seq_lens", lengths, "not negative")
    return lengths


def _write(operator: str, rows: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
    require(cache.dtype == rows.dtype, operator, "the dtype of a cache", cache.dtype, f"{rows.dtype}")
    fits = rows.dim() == 3 and cache.dim() == 4 and cache.shape[2:] == rows.shape[1:]
    expected = f"[blocks, tokens of a block, heads, head size] for rows of {tuple(rows.shape)}"
    require(fits, operator, "the shape of a cache", tuple(cache.shape), expected)
    require(slots.shape == rows.shape[:1], operator, "the shape of the slots", tuple(slots.shape), f"[{len(rows)}]")
    room = cache.shape[0] * cache.shape[1]
    sorted_slots = slots.sort().values
    wrong = sorted_slots[(sorted_slots < 0) | (sorted_slots >= room)]
    require(not len(wrong), operator, "a slot", wrong[:1].tolist(), f"from 0 to {room - 1}")
    twice = sorted_slots[1:][sorted_slots[1:] == sorted_slots[:-1]]
    require(not len(twice), operator, "a slot", f"{twice[:1].tolist()} twice", "different from the others")
    block, place = slots.long() // cache.shape[1], slots.long() % cache.shape[1]
    cache[block, place] = rows
