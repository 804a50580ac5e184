"""Rotary position embedding."""

from __future__ import annotations

import torch

from cann_sim_operators.layers import FLOATS
from cann_sim_operators.registry import implements, require, require_contiguous, require_dtype

HEAD_SIZES = (64, 128)


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


def _turn_halves(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)
