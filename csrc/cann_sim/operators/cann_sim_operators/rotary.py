"""Rotary position embedding."""

from __future__ import annotations

import torch

from cann_sim_operators.layers import FLOATS
from cann_sim_operators.registry import implements, require, require_contiguous, require_defaults, require_dtype

HEAD_SIZES = (64, 128)
VECTOR_BUFFER = 192 * 1024
"""Bytes of a core's buffer, which npu_mrope divides among a token's heads in float32."""


@implements("npu::npu_rotary_mul")
def rotary_mul(
    x: torch.Tensor, r1: torch.Tensor, r2: torch.Tensor, rotary_mode: str = "half", rotate: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns x * r1 + turned * r2, where `turned` has pairs of elements swapped and one of each negated.

    A pair is an element of the first half and the one of the second ("half"), or two neighbours ("interleave"). If the
    matrix `rotate` is given, `turned` is x @ rotate instead. All of x, r1 and r2 have 4 dimensions.
    """
    operator = "npu_rotary_mul"
    require_dtype(operator, "the input", x, *FLOATS)
    for argument, tensor in {"the input": x, "r1": r1, "r2": r2}.items():
        require(tensor.dim() == 4, operator, f"the shape of {argument}", tuple(tensor.shape), "of 4 dimensions")
        require(tensor.dtype == x.dtype, operator, f"the dtype of {argument}", tensor.dtype, f"{x.dtype}")
    size = x.shape[-1]
    require(size % 2 == 0 and size < 896, operator, "the last dimension", size, "even and below 896")
    require(rotary_mode in {"half", "interleave"}, operator, "rotary_mode", rotary_mode, "half or interleave")
    if rotate is not None:
        turned = x @ rotate
    elif rotary_mode == "half":
        turned = _turn_halves(x)
    else:
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return x * r1 + turned * r2


@implements("npu::npu_apply_rotary_pos_emb")
def apply_rotary_pos_emb(  # noqa: PLR0917
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    layout: str = "BSND",
    rotary_mode: str = "half",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turns query and key by the angles whose cosines and sines are given, in place as on a device, and returns them.

    The layout is [batch, tokens, heads, head size] (BSND) or [tokens, heads, head size] (TND); `cos` and `sin` have one
    head.
    """
    operator = "npu_apply_rotary_pos_emb"
    dimensions = {"BSND": 4, "TND": 3}
    require(layout in dimensions, operator, "layout", layout, "BSND or TND")
    require(rotary_mode == "half", operator, "rotary_mode", rotary_mode, "half")
    require_dtype(operator, "query", query, *FLOATS)
    for argument, tensor in {"query": query, "key": key, "cos": cos, "sin": sin}.items():
        require(tensor.dtype == query.dtype, operator, f"the dtype of {argument}", tensor.dtype, f"{query.dtype}")
        fits = tensor.dim() == dimensions[layout] and tensor.shape[:-2] == query.shape[:-2] and tensor.numel() > 0
        expected = f"{layout} like {tuple(query.shape)}, and not empty"
        require(fits, operator, f"the shape of {argument}", tuple(tensor.shape), expected)
        size = tensor.shape[-1]
        fits = size in HEAD_SIZES and size == query.shape[-1]
        require(fits, operator, f"the last dimension of {argument}", size, "64 or 128, and the same for all")
    for argument, tensor in {"cos": cos, "sin": sin}.items():
        require(tensor.shape[-2] == 1, operator, f"the heads of {argument}", tensor.shape[-2], "1")
    require_contiguous(operator, query=query, key=key)
    for tensor in (query, key):
        tensor.copy_(tensor * cos + _turn_halves(tensor) * sin)
    return query, key


@implements("npu::npu_mrope")
def mrope(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    head_size: int,
    *,
    mrope_section: list[int] | None = None,
    rotary_mode: str | None = "half",
    **others: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turns query and key, [tokens, heads x head size], by the angles that `cos_sin_cache` has for each position.

    The cache is [positions, rotary dim], first cosines, then sines. What a head has beyond the rotary dim stays. Pairs
    are as in `rotary_mul`. Simulated for positions of one dimension.
    """
    operator = "npu_mrope"
    require_defaults(operator, others)
    simulated = positions.dim() == 1 and mrope_section in (None, [0, 0, 0])
    found = f"{tuple(positions.shape)}, sections {mrope_section}"
    require(
        simulated, operator, "the shape of positions", found, "[tokens], without sections: others are not simulated"
    )
    require_dtype(operator, "positions", positions, torch.int64)
    require(rotary_mode in {"half", "interleave"}, operator, "rotary_mode", rotary_mode, "half or interleave")
    _check_heads(operator, query, key, cos_sin_cache, head_size, in_halves=rotary_mode == "half")
    for argument, tensor in {"query": query, "key": key}.items():
        require(len(tensor) == len(positions), operator, f"the tokens of {argument}", len(tensor), f"{len(positions)}")
    wild = positions[(positions < 0) | (positions >= len(cos_sin_cache))].tolist()
    require(not wild, operator, "a position", wild, f"from 0 to {len(cos_sin_cache) - 1}")

    cos, sin = cos_sin_cache[positions].float().unsqueeze(1).chunk(2, dim=-1)

    def turned(x: torch.Tensor) -> torch.Tensor:
        heads = x.float().unflatten(1, (-1, head_size))
        rotated, rest = heads.tensor_split((cos_sin_cache.shape[1],), dim=-1)
        first, second = rotated.chunk(2, dim=-1) if rotary_mode == "half" else (rotated[..., ::2], rotated[..., 1::2])
        pairs = (first * cos - second * sin, second * cos + first * sin)
        rotated = torch.cat(pairs, dim=-1) if rotary_mode == "half" else torch.stack(pairs, dim=-1).flatten(-2)
        return torch.cat((rotated, rest), dim=-1).flatten(1).to(x.dtype)

    return turned(query), turned(key)


def _check_heads(
    operator: str, query: torch.Tensor, key: torch.Tensor, cache: torch.Tensor, head_size: int, *, in_halves: bool
) -> None:
    require_dtype(operator, "query", query, *FLOATS)
    for argument, tensor in {"query": query, "key": key, "cos_sin_cache": cache}.items():
        require(tensor.dtype == query.dtype, operator, f"the dtype of {argument}", tensor.dtype, f"{query.dtype}")
        fits = tensor.dim() == 2 and tensor.numel() > 0
        require(fits, operator, f"the shape of {argument}", tuple(tensor.shape), "of 2 dimensions, and not empty")
    require_contiguous(operator, query=query, key=key)

    step, rotary_dim = 16 if query.dtype == torch.float32 else 32, cache.shape[1]
    for argument, size in {"head_size": head_size, "the rotary dim": rotary_dim}.items():
        fits = size % step == 0 and size <= head_size
        require(fits, operator, argument, size, f"a multiple of {step} for {query.dtype}, and at most head_size")
    heads, copies = max(query.shape[1], key.shape[1]) // head_size, 5 if in_halves else 6
    needed = 4 * (heads * (copies * rotary_dim + 2 * head_size) + 10 * rotary_dim)
    require(needed <= VECTOR_BUFFER, operator, f"the room that {heads} heads need", needed, f"at most {VECTOR_BUFFER}")


def _turn_halves(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)
