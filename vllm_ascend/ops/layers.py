"""Layers that stand in for vLLM's own of the same purpose, once this module is imported."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.custom_op import CustomOp
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.rotary_embedding import (
    DynamicNTKScalingRotaryEmbedding,
    LinearScalingRotaryEmbedding,
    Llama3RotaryEmbedding,
    RotaryEmbedding,
    YaRNScalingRotaryEmbedding,
)

ROTARY_HEAD_SIZES = (64, 128)
"""Documented for npu_apply_rotary_pos_emb."""


class NPUSiluAndMul(SiluAndMul):
    def forward_oot(self, x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = torch.ops.npu.npu_swiglu(x)
        return product


class _Rotary:
    """The forward method of rotary embeddings that differ only in the angles in their cache."""

    head_size: int
    rotary_dim: int
    is_neox_style: bool

    def forward_oot(
        self: Any, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        whole_heads = self.rotary_dim == self.head_size and self.head_size in ROTARY_HEAD_SIZES
        if key is None or not whole_heads or not self.is_neox_style:
            rotated: tuple[torch.Tensor, torch.Tensor | None] = self.forward_native(positions, query, key)
            return rotated
        angles = self._match_cos_sin_cache_dtype(query).index_select(0, positions.flatten())
        cos, sin = angles.unsqueeze(1).chunk(2, dim=-1)  # of half a head: both halves of it turn by the same angles
        turned_query, turned_key = torch.ops.npu.npu_apply_rotary_pos_emb(
            query.view(*angles.shape[:1], -1, self.head_size).contiguous(),
            key.view(*angles.shape[:1], -1, self.head_size).contiguous(),
            torch.cat((cos, cos), dim=-1),
            torch.cat((sin, sin), dim=-1),
            "TND",
        )
        return turned_query.view(query.shape), turned_key.view(key.shape)


def _replace(layer: type, replacement: type) -> None:
    """Under the name by which users turn `layer` on and off, too."""
    CustomOp.register_oot(replacement, name=layer.__name__)
    replacement.name = layer.name  # type: ignore[attr-defined]


_replace(SiluAndMul, NPUSiluAndMul)
for _layer in (
    RotaryEmbedding,
    LinearScalingRotaryEmbedding,
    DynamicNTKScalingRotaryEmbedding,
    Llama3RotaryEmbedding,
    YaRNScalingRotaryEmbedding,
):
    _replace(_layer, type(f"NPU{_layer.__name__}", (_Rotary, _layer), {}))
