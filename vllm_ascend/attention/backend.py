"""Causal attention over vLLM's paged KV cache, by torch_npu's fused operator.

One call serves every batch: prefill, decode, chunks of a prompt, prompts whose beginning is cached, and mixtures of
them. Queries come as one row per token (TND), each request's with the running total of rows; its keys and values are
read from the cache through the block table, with the request's whole length. The mask is causal from the lower right
corner (sparse mode 3), so that the last query sees everything.

The operator wants keys and values in two contiguous caches of [blocks, tokens of a block, heads x head size].
`customize_spec` publishes them to vLLM as two planes of one cache, and the layout puts the planes outside of the
blocks.

It takes lengths from the host. Those that vLLM has there are exact, as nothing decides them on the device (that would
be speculative decoding), so nothing waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from vllm.utils.torch_utils import get_dtype_size
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, AttentionMetadataBuilder, AttentionType
from vllm.v1.kv_cache_layout import KVCacheLayout

from vllm_ascend.attention.rules import BLOCK_SIZE, Heads, refusals
from vllm_ascend.limits import ATTENTION_BACKEND

LOWER_RIGHT_CAUSAL = 3
MASK_SIZE = 2048
"""The sparse mode, and the mask that the operator then wants, whatever the lengths."""


class OnNPU(AttentionBackend):
    """What all attention on NPUs has in common: the name that vLLM knows it by, and blocks of one size."""

    @staticmethod
    def get_name() -> str:
        return ATTENTION_BACKEND

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int]:
        return [BLOCK_SIZE]

    @classmethod
    def supports_block_size(cls, block_size: int | None) -> bool:
        return block_size is None or block_size == BLOCK_SIZE

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False


class NPUAttentionBackend(OnNPU):
    supported_dtypes = (torch.bfloat16, torch.float16, torch.float32)

    @staticmethod
    def get_impl_cls() -> type[NPUAttentionImpl]:
        return NPUAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[NPUAttentionMetadataBuilder]:
        return NPUAttentionMetadataBuilder

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        if spec.head_size_v != spec.head_size:
            raise ValueError(f"heads of {spec.head_size} with values of {spec.head_size_v} do not work on NPUs")
        row_bytes = spec.num_kv_heads * spec.head_size * get_dtype_size(spec.dtype)
        return replace(spec, num_head_slots=2, state_content_bytes=row_bytes)

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LHBNC,)


@dataclass(frozen=True)
class NPUAttentionMetadata:
    """A batch. The lists have one entry for each request; `slots` one for each token."""

    query_ends: list[int]
    key_lengths: list[int]
    block_table: torch.Tensor
    slots: torch.Tensor
    mask: torch.Tensor


class NPUAttentionMetadataBuilder(AttentionMetadataBuilder):
    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._mask = causal_mask(device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> NPUAttentionMetadata:
        batch = common_attn_metadata
        if batch.causal is not True:
            raise NotImplementedError("attention over the cache that is not causal is not supported on NPUs")
        query_ends = batch.query_start_loc_cpu[1 : batch.num_reqs + 1].tolist()
        return NPUAttentionMetadata(
            query_ends=query_ends,
            key_lengths=batch.seq_lens_cpu_upper_bound[: batch.num_reqs].tolist(),
            block_table=batch.block_table_tensor[: batch.num_reqs],
            slots=batch.slot_mapping[: query_ends[-1]],
            mask=self._mask,
        )


class NPUAttentionImpl(AttentionImpl):
    _refusals = staticmethod(refusals)

    def __init__(  # noqa: PLR0917
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **other: Any,
    ) -> None:
        unsupported = {
            "ALiBi": alibi_slopes,
            "a sliding window": sliding_window,
            "soft-capped logits": logits_soft_cap,
            **other,
        }
        reasons = [name for name, value in unsupported.items() if value is not None]
        # vLLM builds models with their dtype as torch's default.
        reasons += self._refusals(Heads(head_size, num_heads, num_kv_heads or num_heads), torch.get_default_dtype())
        if reasons:
            raise ValueError(f"attention with {', '.join(reasons)} is not supported on NPUs")
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self._writes_cache = kv_sharing_target_layer_name is None

    def forward(  # noqa: PLR0917
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: NPUAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if attn_metadata is None:  # vLLM measures or warms up; there may be no cache yet
            return output.zero_()
        tokens = attn_metadata.query_ends[-1]  # the tensors may be padded to the size of a graph
        keys, values = kv_cache.unbind(1)
        if self._writes_cache:
            write_cache(key[:tokens], value[:tokens], keys, values, attn_metadata.slots)
        attend(
            query[:tokens],
            keys,
            values,
            attn_metadata,
            num_kv_heads=self.num_kv_heads,
            scale=self.scale,
            output=output[:tokens],
        )
        return output


def write_cache(
    key: torch.Tensor, value: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor
) -> None:
    """`key` and `value` are [tokens, heads, head size], `keys` and `values` the caches of one layer."""
    heads = key.shape[1:]
    torch.ops.npu.npu_scatter_pa_kv_cache(
        key.contiguous(),
        value.contiguous(),
        keys.unflatten(-1, heads),
        values.unflatten(-1, heads),
        slots,
        cache_mode="Norm",
    )


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    batch: NPUAttentionMetadata,
    *,
    num_kv_heads: int,
    scale: float,
    output: torch.Tensor,
) -> None:
    """Writes the result into `output`, which is contiguous and, as `query`, [tokens, heads, head size]."""
    no_sums = query.new_empty(0, dtype=torch.float32)
    torch.ops.npu.npu_fused_infer_attention_score.out(
        query.contiguous(),
        keys,
        values,
        atten_mask=batch.mask,
        actual_seq_lengths=batch.query_ends,
        actual_seq_lengths_kv=batch.key_lengths,
        block_table=batch.block_table,
        num_heads=query.shape[1],
        scale=scale,
        input_layout="TND",
        num_key_value_heads=num_kv_heads,
        sparse_mode=LOWER_RIGHT_CAUSAL,
        block_size=keys.shape[1],
        out=[output, no_sums],
    )


def causal_mask(device: torch.device) -> torch.Tensor:
    """1 where a query must not look."""
    return torch.ones(MASK_SIZE, MASK_SIZE, dtype=torch.int8, device=device).triu_(1)
