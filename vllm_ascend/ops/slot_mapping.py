"""Where in the KV cache each token of a batch is written, in place of vLLM's Triton kernel for it."""

from __future__ import annotations

import torch


def compute_slot_mapping(  # noqa: PLR0917
    num_tokens: int,
    max_num_tokens: int,
    query_start_loc_ptr: torch.Tensor,
    positions_ptr: torch.Tensor,
    block_table_ptr: torch.Tensor,
    block_table_stride: int,
    slot_mapping_ptr: torch.Tensor,
    KV_CACHE_BLOCK_SIZE: int,  # noqa: N803
    TOTAL_CP_WORLD_SIZE: int,  # noqa: N803
    TOTAL_CP_RANK: int,  # noqa: N803
    CP_KV_CACHE_INTERLEAVE_SIZE: int,  # noqa: N803
    PAD_ID: int,  # noqa: N803
    BLOCK_SIZE: int,  # noqa: N803
) -> None:
    """The kernel's parameters, by its names; context parallelism is refused when vLLM is configured."""
    positions = positions_ptr[:num_tokens]
    tokens = torch.arange(num_tokens, device=positions.device, dtype=query_start_loc_ptr.dtype)
    requests = torch.searchsorted(query_start_loc_ptr, tokens, right=True) - 1
    blocks = block_table_ptr[requests, positions // KV_CACHE_BLOCK_SIZE].to(slot_mapping_ptr.dtype)
    slot_mapping_ptr[:num_tokens] = blocks * KV_CACHE_BLOCK_SIZE + positions % KV_CACHE_BLOCK_SIZE
    slot_mapping_ptr[num_tokens:max_num_tokens] = PAD_ID
