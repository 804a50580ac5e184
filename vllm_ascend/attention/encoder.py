"""Attention within a prompt, for encoders: every token sees every token of its request, and nothing is cached.

torch_npu's `npu_fusion_attention` takes the tokens of a whole batch in one call (TND), with the running totals of the
requests' lengths, and no mask. It is made for training, and only its forward pass is used. The fused operator for
inference has a call without cache and mask as well, but it takes few heads, and users have seen it give the mean of all
values on devices. vLLM does not divide the prompts of encoders, so queries, keys and values are always complete.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.v1.attention.backend import AttentionMetadataBuilder, AttentionType

from vllm_ascend.attention.backend import NPUAttentionBackend, NPUAttentionImpl
from vllm_ascend.attention.rules import encoder_refusals


class NPUEncoderBackend(NPUAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[NPUEncoderImpl]:
        return NPUEncoderImpl

    @staticmethod
    def get_builder_cls() -> type[NPUEncoderMetadataBuilder]:
        return NPUEncoderMetadataBuilder

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return bool(attn_type == AttentionType.ENCODER_ONLY)


@dataclass(frozen=True)
class NPUEncoderMetadata:
    """A batch: after how many rows the tokens of each request end."""

    ends: list[int]


class NPUEncoderMetadataBuilder(AttentionMetadataBuilder):
    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> NPUEncoderMetadata:
        batch = common_attn_metadata
        return NPUEncoderMetadata(batch.query_start_loc_cpu[1 : batch.num_reqs + 1].tolist())


class NPUEncoderImpl(NPUAttentionImpl):
    _refusals = staticmethod(encoder_refusals)

    def forward(  # noqa: PLR0917
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: NPUEncoderMetadata | None,  # type: ignore[override]
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if attn_metadata is None:  # vLLM measures or warms up
            return output.zero_()
        ends = attn_metadata.ends
        tokens = ends[-1]  # the tensors may be padded to the size of a graph
        output[:tokens] = torch.ops.npu.npu_fusion_attention(
            query[:tokens],
            key[:tokens],
            value[:tokens],
            self.num_heads,
            "TND",
            scale=self.scale,
            actual_seq_qlen=ends,
            actual_seq_kvlen=ends,
        )[0]
        return output
