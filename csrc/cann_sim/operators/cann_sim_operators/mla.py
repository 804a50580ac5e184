"""Attention to latents (MLA): all heads share one key, a latent that is its own value, beside a part that is turned.

Queries come multiplied by what would have made keys of latents, and results are latents too. The operator leads such
calls to kernels of their own, whose demands its sources and CANN's documentation tell. torch-npu's documentation, which
is older, takes 32, 64 or 128 heads only; inference engines run with as few as 4.
"""

from __future__ import annotations

import math

import torch

from cann_sim_operators.registry import FP32_SWITCH, fp32, require, require_contiguous, require_dtype

LATENT_SIZE, TURNED_SIZE = 512, 64
HEADS = [1, 2, 4, 8, 16, 32, 64, 128]
BLOCK_SIZES = 16, 128
MAX_ELEMENTS = 2**31 - 1


def attend_to_latents(
    operator: str,
    queries: tuple[torch.Tensor, torch.Tensor | None],
    cache: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    lengths: list[int] | None,
    table: torch.Tensor | None,
    *,
    heads: int,
    key_heads: int,
    scale: float,
    layout: str,
    block_size: int,
) -> torch.Tensor:
    """Returns the attention of one query of each request to the latents in its blocks: [requests, heads, 1, 512].

    `queries` are [requests, heads, 1, size], and `cache` is keys, values and turned keys, [blocks, 1, tokens of a
    block, size]. Raises RuntimeError for other arguments than the kernels take.
    """
    if layout != "BNSD":
        raise RuntimeError(f"{operator}: input_layout={layout!r} with query_rope is not simulated; 'BNSD' is")
    query, query_rope = queries
    key, value, key_rope = cache
    require(query_rope is not None, operator, "query_rope", None, "given with key_rope")
    require(key_rope is not None, operator, "key_rope", None, "given with query_rope")
    assert query_rope is not None
    assert key_rope is not None
    require(heads in HEADS, operator, "num_heads with query_rope", heads, f"one of {HEADS}")
    require(key_heads == 1, operator, "num_key_value_heads with query_rope", key_heads, "1")
    _check_types(operator, {"query": query, "query_rope": query_rope, "key": key, "value": value, "key_rope": key_rope})

    requests = len(query)
    for name, tensor, size in (("query", query, LATENT_SIZE), ("query_rope", query_rope, TURNED_SIZE)):
        expected = (requests, heads, 1, size)
        require(tensor.shape == expected, operator, f"the shape of {name}", tuple(tensor.shape), f"{expected}")
    same = value.data_ptr() == key.data_ptr() and value.shape == key.shape
    require(same, operator, "value", "another tensor than key", "the latents, as key is")
    _check_blocks(operator, key, key_rope, block_size)
    read = _blocks_of_requests(operator, len(key), table, lengths, requests, block_size)

    output = torch.empty_like(query)
    for request, (blocks, length) in enumerate(read):
        latents = key[blocks].flatten(0, 2)[:length].float()
        turned = key_rope[blocks].flatten(0, 2)[:length].float()
        scores = query[request, :, 0].float() @ latents.t() + query_rope[request, :, 0].float() @ turned.t()
        output[request, :, 0] = ((scores * scale).softmax(-1) @ latents).to(query.dtype)
    return output


def _check_types(operator: str, tensors: dict[str, torch.Tensor]) -> None:
    query = tensors["query"]
    if query.dtype == torch.float32:
        expected = f"half or bfloat16 (unless {FP32_SWITCH}=1)"
        require(query.dtype in fp32(), operator, "the dtype of query", query.dtype, expected)
    else:
        require_dtype(operator, "query", query, torch.float16, torch.bfloat16)
    for name, tensor in tensors.items():
        require(tensor.dtype == query.dtype, operator, f"the dtype of {name}", tensor.dtype, f"{query.dtype}")
    require_contiguous(operator, **tensors)


def _check_blocks(operator: str, key: torch.Tensor, key_rope: torch.Tensor, block_size: int) -> None:
    require(block_size in BLOCK_SIZES, operator, "block_size with query_rope", block_size, f"one of {BLOCK_SIZES}")
    for name, tensor, size in (("key", key, LATENT_SIZE), ("key_rope", key_rope, TURNED_SIZE)):
        expected = (len(key), 1, block_size, size)
        require(tensor.shape == expected, operator, f"the shape of {name}", tuple(tensor.shape), f"{expected}")
        elements = tensor.numel()
        require(elements <= MAX_ELEMENTS, operator, f"the elements of {name}", elements, f"at most {MAX_ELEMENTS}")


def _blocks_of_requests(  # noqa: PLR0917
    operator: str,
    blocks: int,
    table: torch.Tensor | None,
    lengths: list[int] | None,
    requests: int,
    block_size: int,
) -> list[tuple[torch.Tensor, int]]:
    """Returns for each request its blocks and how many tokens they hold."""
    require(table is not None, operator, "block_table with query_rope", None, "given")
    assert table is not None
    require_dtype(operator, "block_table", table, torch.int32)
    fits = lengths is not None and len(lengths) == requests and min(lengths, default=0) > 0
    require(fits, operator, "actual_seq_lengths_kv", lengths, f"the lengths of {requests} requests, each above 0")
    assert lengths is not None
    counts = [math.ceil(length / block_size) for length in lengths]
    fits = table.dim() == 2 and len(table) == requests and table.shape[1] >= max(counts)
    require(fits, operator, "the shape of block_table", tuple(table.shape), f"[{requests}, {max(counts)} or more]")
    own = [row[:count].long() for row, count in zip(table, counts, strict=True)]
    inside = all(bool(((each >= 0) & (each < blocks)).all()) for each in own)
    require(inside, operator, "block_table", table.tolist(), f"of blocks below {blocks}")
    return list(zip(own, lengths, strict=True))
