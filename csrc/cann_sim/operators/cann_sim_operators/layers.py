"""Normalisation and activation."""

from __future__ import annotations

import torch
from torch.nn.functional import silu

from cann_sim_operators.registry import implements, require, require_dtype

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@implements("npu::npu_rms_norm")
def rms_norm(x: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-6) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns x divided by its root mean square and scaled by gamma, and the reciprocal of that root in float32.

    The mean is taken over the last dimensions, as many as gamma has.
    """
    return _normalise("npu_rms_norm", x, gamma, epsilon)


@implements("npu::npu_add_rms_norm")
def add_rms_norm(
    x1: torch.Tensor, x2: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the same as `rms_norm` for the sum of x1 and x2, and the sum itself."""
    operator = "npu_add_rms_norm"
    require(x2.dtype == x1.dtype, operator, "the dtype of x2", x2.dtype, f"that of x1, {x1.dtype}")
    require(x2.shape == x1.shape, operator, "the shape of x2", tuple(x2.shape), f"that of x1, {tuple(x1.shape)}")
    total = x1 + x2
    normalised, reciprocal = _normalise(operator, total, gamma, epsilon)
    return normalised, reciprocal, total


def _normalise(
    operator: str, x: torch.Tensor, gamma: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    require_dtype(operator, "the input", x, *FLOATS)
    require(gamma.dtype == x.dtype, operator, "the dtype of gamma", gamma.dtype, f"that of the input, {x.dtype}")
    dimensions = gamma.dim()
    fits = 0 < dimensions <= x.dim() and gamma.shape == x.shape[-dimensions:]
    require(fits, operator, "the shape of gamma", tuple(gamma.shape), f"the end of {tuple(x.shape)}")
    single = x.float()
    reciprocal = torch.rsqrt(single.square().mean(tuple(range(-dimensions, 0)), keepdim=True) + epsilon)
    return (single * reciprocal).to(x.dtype) * gamma, reciprocal


@implements("npu::npu_swiglu")
def swiglu(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """Returns silu of the first half of x, times the second half; the halves are taken along dimension `dim`."""
    require_dtype("npu_swiglu", "the input", x, *FLOATS)
    require(x.size(dim) % 2 == 0, "npu_swiglu", f"the size of dimension {dim}", x.size(dim), "even")
    gate, up = x.chunk(2, dim)
    return silu(gate) * up
