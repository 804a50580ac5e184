"""Layers that stand in for vLLM's own of the same purpose, once this module is imported.

Linear layers without quantisation are vLLM's, and torch's product. Only how their weights lie is chosen here.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.custom_op import CustomOp
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.rotary_embedding import (
    DeepseekScalingRotaryEmbedding,
    DynamicNTKScalingRotaryEmbedding,
    LinearScalingRotaryEmbedding,
    Llama3RotaryEmbedding,
    RotaryEmbedding,
    YaRNScalingRotaryEmbedding,
)

from vllm_ascend.ops.layout import in_chosen_format

ROTARY_STEP, ROTARY_STEP_FP32 = 32, 16
"""Documented for npu_mrope: the size of a head, and of what is turned of it, are multiples of this."""
VECTOR_BUFFER = 192 * 1024
"""Bytes of a core's buffer. npu_mrope holds all heads of a token there, in float32 and several times; if they do not
fit, its source divides by zero."""


class NPUSiluAndMul(SiluAndMul):
    def forward_oot(self, x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = torch.ops.npu.npu_swiglu(x)
        return product


class NPURMSNorm(RMSNorm):
    """With a bias, if quantisation moved values by one: which norms have it, only the checkpoint knows.

    vLLM's loaders leave a bias out that a model does not have, and say nothing.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = get_current_vllm_config_or_none()
        bias = None
        if config is not None and getattr(config.quant_config, "norms_add_bias", False):
            bias = torch.nn.Parameter(torch.zeros_like(self.weight), requires_grad=False)
        self.register_parameter("bias", bias)

    def forward_native(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        normalised = super().forward_native(x, residual)
        if self.bias is None:
            return normalised
        if residual is None:
            return normalised + self.bias
        return normalised[0] + self.bias, normalised[1]


class _Rotary:
    """The forward method of rotary embeddings that differ only in the angles in their cache.

    One operator looks the angles up and turns queries and keys, so that nothing needs to be prepared for a step.
    """

    head_size: int
    rotary_dim: int
    is_neox_style: bool

    def forward_oot(
        self: Any, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if key is None or not self._is_fused(query, key):
            rotated: tuple[torch.Tensor, torch.Tensor | None] = self.forward_native(positions, query, key)
            return rotated
        turned_query, turned_key = torch.ops.npu.npu_mrope(
            positions,
            query.flatten(1).contiguous(),
            key.flatten(1).contiguous(),
            self._match_cos_sin_cache_dtype(query),
            self.head_size,
            rotary_mode="half" if self.is_neox_style else "interleave",
        )
        return turned_query.view(query.shape), turned_key.view(key.shape)

    def _is_fused(self, query: torch.Tensor, key: torch.Tensor) -> bool:
        step = ROTARY_STEP_FP32 if query.dtype == torch.float32 else ROTARY_STEP
        heads = max(math.prod(each.shape[1:]) for each in (query, key)) // self.head_size
        copies = 5 if self.is_neox_style else 6
        needed = 4 * (heads * (copies * self.rotary_dim + 2 * self.head_size) + 10 * self.rotary_dim)
        return self.head_size % step == 0 and self.rotary_dim % step == 0 and needed <= VECTOR_BUFFER


def _lay_weights_out(method: UnquantizedLinearMethod, layer: Any) -> None:
    """Not of what latent attention takes views of."""
    if not getattr(layer, "is_absorbed", False):
        layer.weight.data = in_chosen_format(layer.weight.data)


def _replace(layer: type, replacement: type) -> None:
    """Under the name by which users turn `layer` on and off, too."""
    CustomOp.register_oot(replacement, name=layer.__name__)
    replacement.name = layer.name  # type: ignore[attr-defined]


_replace(SiluAndMul, NPUSiluAndMul)
_replace(RMSNorm, NPURMSNorm)
for _layer in (
    RotaryEmbedding,
    LinearScalingRotaryEmbedding,
    DynamicNTKScalingRotaryEmbedding,
    Llama3RotaryEmbedding,
    YaRNScalingRotaryEmbedding,
    DeepseekScalingRotaryEmbedding,
):
    _replace(_layer, type(f"NPU{_layer.__name__}", (_Rotary, _layer), {}))
UnquantizedLinearMethod.process_weights_after_loading = _lay_weights_out
