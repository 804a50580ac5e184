"""Where in the KV cache each token of a batch is written, in place of vLLM's Triton kernel for it.

Once for a step, outside of graphs. Devices search sorted sequences on their AI CPUs only, and compute with int64 there
in part, so a token's request is found by counting the requests that have begun, and all is int32 until the end.
"""

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
    positions = positions_ptr[:num_tokens].to(torch.int32)
    tokens = torch.arange(num_tokens, device=positions.device, dtype=torch.int32)
    requests = (query_start_loc_ptr[1:] <= tokens.unsqueeze(1)).sum(dim=1, dtype=torch.float32).to(torch.int32)
    columns = positions // KV_CACHE_BLOCK_SIZE
    blocks = block_table_ptr.flatten().index_select(0, requests * block_table_stride + columns)
    slot_mapping_ptr[:num_tokens] = (blocks - columns) * KV_CACHE_BLOCK_SIZE + positions
    slot_mapping_ptr[num_tokens:max_num_tokens] = PAD_ID
