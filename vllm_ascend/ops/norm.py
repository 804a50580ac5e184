"""RMSNorm, with and without the residual added first, as implementations of vLLM's IR operators."""

from __future__ import annotations

import torch
from vllm import ir

PROVIDER = "torch_npu"


def _supported(x: torch.Tensor, weight: torch.Tensor | None, variance_size: int | None) -> bool:
    return weight is not None and weight.dtype == x.dtype and variance_size is None


def _rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, epsilon: float, variance_size: int | None = None
) -> torch.Tensor:
    normalised: torch.Tensor = torch.ops.npu.npu_rms_norm(x, weight, epsilon)[0]
    return normalised


def _rms_norm_supports(
    x: torch.Tensor, weight: torch.Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    return _supported(x, weight, variance_size)


def _add_rms_norm(
    x: torch.Tensor,
    x_residual: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    normalised, _, added = torch.ops.npu.npu_add_rms_norm(x, x_residual, weight, epsilon)
    return normalised, added


def _add_rms_norm_supports(
    x: torch.Tensor,
    x_residual: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> bool:
    return _supported(x, weight, variance_size) and x_residual.dtype == x.dtype


ir.ops.rms_norm.register_impl(PROVIDER, supports_args=_rms_norm_supports)(_rms_norm)
ir.ops.fused_add_rms_norm.register_impl(PROVIDER, supports_args=_add_rms_norm_supports)(_add_rms_norm)
