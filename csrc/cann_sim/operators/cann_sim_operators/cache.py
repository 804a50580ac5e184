"""Writing keys and values into a paged cache."""

from __future__ import annotations

import torch

from cann_sim_operators.registry import (
    fp32,
    implements,
    require,
    require_contiguous,
    require_defaults,
    require_dtype,
)

CACHED = (torch.float16, torch.bfloat16, torch.int8)


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

    `key` and `value` are [tokens, heads, head size], the caches [blocks, tokens of a block, heads, head size]. Slot s
    is token s % (tokens of a block) of block s // (tokens of a block).
    """
    operator = "npu_scatter_pa_kv_cache"
    require_defaults(operator, others)
    if cache_mode not in {None, "Norm"}:
        raise RuntimeError(f"{operator}: cache_mode={cache_mode!r}, the default, is not simulated; 'Norm' is")
    require_dtype(operator, "key", key, *CACHED, *fp32())
    require_dtype(operator, "slot_mapping", slot_mapping, torch.int32, torch.int64)
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
