"""Multi-head latent attention (MLA), as DeepSeek V2 and V3 and Kimi K2 compute it, by torch_npu's fused operator.

The cache has one row for each token: its *latent*, of which keys and values of all heads can be made, and the part of
its keys that is turned by its position. vLLM's layer computes in two ways, and so does this backend:

- *Decode*: queries are multiplied by what would make keys of latents (`kv_b_proj`, absorbed), so that all heads share
  the latents as keys and as values. The operator gets the turned parts apart (`query_rope`, `key_rope`), and reads
  both from pages.
- *Prefill*: keys of 192 and values of 128 are made for each head, for the tokens of a prompt (causal), and, chunk by
  chunk, for what the cache holds of its beginning. vLLM merges the results by the logarithms of their sums.

The operator wants latents and turned parts in two contiguous caches. The memory of a layer is cut in two for that: all
latents lie before all turned parts. No block lies in one piece, then; nothing here moves blocks.

vLLM takes what it absorbs from `kv_b_proj` after loading: views of its matrix, which stays in a plain format for that,
or, if it is quantised, what it makes of the identity. So it must quantise what it is given by rows: a static scale
would cut off the ones of the identity.

vLLM's planning, layer and order of steps are used as they are. Lengths come from the host, as in `backend`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar, Final

import torch
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import mla_attention
from vllm.model_executor.layers.attention.mla_attention import (
    MLACommonBackend,
    MLACommonDecodeMetadata,
    MLACommonImpl,
    MLACommonMetadata,
    MLACommonMetadataBuilder,
    accumulate_mla_context_chunk,
    init_mla_context_partial,
)
from vllm.v1.attention.backends.mla.prefill.base import MLAPrefillBackend
from vllm.v1.attention.ops.merge_attn_states import _merge_attn_states_torch
from vllm.v1.kv_cache_layout import KVCacheLayout

from vllm_ascend.attention.backend import LOWER_RIGHT_CAUSAL, OnNPU, causal_mask
from vllm_ascend.attention.rules import LatentSizes, mla_refusals
from vllm_ascend.limits import ATTENTION_BACKEND

DTYPES: Final = (torch.bfloat16, torch.float32)
NO_MASK: Final = 0


class NPUMLABackend(OnNPU, MLACommonBackend):
    supported_dtypes = DTYPES

    @staticmethod
    def get_impl_cls() -> type[NPUMLAImpl]:
        return NPUMLAImpl

    @staticmethod
    def get_builder_cls() -> type[NPUMLAMetadataBuilder]:
        return NPUMLAMetadataBuilder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)


@dataclass
class NPUMLADecodeMetadata(MLACommonDecodeMetadata):
    """The requests of a batch that get one token each."""

    key_lengths: list[int]


class NPUMLAMetadataBuilder(MLACommonMetadataBuilder[MLACommonMetadata]):
    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> MLACommonMetadata[Any]:
        metadata: MLACommonMetadata[Any] = super().build(common_prefix_len, common_attn_metadata, fast_build)
        if (decode := metadata.decode) is not None:
            lengths = common_attn_metadata.seq_lens_cpu_upper_bound[: metadata.num_decodes].tolist()
            metadata.decode = NPUMLADecodeMetadata(**vars(decode), key_lengths=lengths)
        return metadata


class NPUMLAPrefill(MLAPrefillBackend):
    """Attention of the queries of a batch to keys and values that lie in rows, one request after another."""

    supported_dtypes: ClassVar[list[torch.dtype]] = list(DTYPES)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._mask: torch.Tensor | None = None
        self._query_lengths: list[int] = []

    @staticmethod
    def get_name() -> str:
        return ATTENTION_BACKEND

    def prepare_metadata(self, prefill_metadata: Any) -> None:
        """Before each step with prompts; one of these serves all layers."""
        super().prepare_metadata(prefill_metadata)
        self._query_lengths = prefill_metadata.query_lens_cpu.tolist()
        if self._mask is None:
            self._mask = causal_mask(prefill_metadata.block_table.device)

    def run_prefill_new_tokens(  # noqa: PLR0917
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        return_softmax_lse: bool,
        out: torch.Tensor | None = None,
        output_scale: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        lengths = self._query_lengths
        attended, sums = attend_to_rows(q, k, v, lengths, lengths, self._mask, self.scale)
        return (attended, sums) if return_softmax_lse else attended

    def run_prefill_context_chunk(
        self, chunk: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        lengths = self._query_lengths[chunk.request_slice]
        return attend_to_rows(q, k, v, lengths, chunk.seq_lens.tolist(), None, self.scale)


class NPUMLAImpl(MLACommonImpl[MLACommonMetadata]):
    def __init__(self, num_heads: int, head_size: int, scale: float, num_kv_heads: int, *args: Any, **mla: Any) -> None:
        super().__init__(num_heads, head_size, scale, num_kv_heads, *args, **mla)
        sizes = LatentSizes(*(mla[name] for name in LatentSizes.__dataclass_fields__))
        # vLLM builds models with their dtype as torch's default.
        if reasons := list(mla_refusals(sizes, num_heads, torch.get_default_dtype())):
            raise ValueError(f"{', '.join(reasons)} is not supported on NPUs")
        if getattr(self.kv_b_proj, "input_is_static", False):
            raise ValueError(
                f"{self.kv_b_proj.prefix} with static activations is not supported on NPUs: MLA multiplies it with "
                f"other matrices after loading, so quantise its activations for each token, or leave it as it is"
            )
        self.kv_b_proj.is_absorbed = True

    def do_kv_cache_update(  # noqa: PLR0917
        self,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        kv_cache_dtype: str,
        k_scale: torch.Tensor,
    ) -> None:
        """Writes the tokens of a batch, without those that only pad it."""
        tokens = _tokens_of_batch()
        if kv_cache.numel() == 0 or tokens == 0:  # vLLM measures or warms up
            return
        torch.ops.npu.npu_scatter_pa_kv_cache(
            kv_c_normed[:tokens].unsqueeze(1).contiguous(),
            k_pe[:tokens].reshape(tokens, 1, self.qk_rope_head_dim).to(kv_cache.dtype).contiguous(),
            *self._latents_and_turned(kv_cache),
            slot_mapping[:tokens],
            cache_mode="Norm",
        )

    def forward_mqa(
        self,
        q: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        kv_c_and_k_pe_cache: torch.Tensor,
        attn_metadata: MLACommonMetadata[Any],
        layer: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Absorbed queries, in two parts, to the cache: [requests, heads, size] of each."""
        decode = attn_metadata.decode
        assert decode is not None
        caches = self._latents_and_turned(kv_c_and_k_pe_cache)
        return attend_to_latents((q[0], q[1]), caches, decode.key_lengths, decode.block_table, self.scale), None

    def _compute_prefill_context(
        self,
        q: torch.Tensor,
        kv_c_and_k_pe_cache: torch.Tensor,
        attn_metadata: MLACommonMetadata[Any],
        k_scale: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the cache holds of the prompts, in chunks that fit vLLM's limit; as `NPUMLAPrefill` gives results."""
        prefill = attn_metadata.prefill
        context = prefill.chunked_context
        whole: tuple[torch.Tensor, torch.Tensor] | None = None
        for chunk in context.chunks:
            keys, values = self._keys_and_values(*self._read(kv_c_and_k_pe_cache, prefill.block_table, chunk))
            part = prefill.prefill_backend.run_prefill_context_chunk(chunk, q[chunk.token_slice], keys, values)
            whole = whole or init_mla_context_partial(context, *part, num_tokens=len(q))
            accumulate_mla_context_chunk(chunk, *part, *whole)
        assert whole is not None, "vLLM plans no context without chunks"
        return whole

    def _read(self, cache: torch.Tensor, block_table: torch.Tensor, chunk: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The latents and turned parts of a chunk's tokens, [tokens, 1, size] of each."""
        caches = self._latents_and_turned(cache)
        latents, turned = (each.new_empty(chunk.num_context_tokens, *each.shape[2:]) for each in caches)
        torch.ops.npu.npu_gather_pa_kv_cache(
            *caches,
            block_table[chunk.request_slice],
            chunk.cu_seq_lens,
            latents,
            turned,
            seq_offset=chunk.starts,
            is_seq_lens_cumsum=True,
        )
        return latents, turned

    def _keys_and_values(self, latents: torch.Tensor, turned: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        made = self.kv_b_proj(latents.squeeze(1))[0].unflatten(-1, (self.num_heads, -1))
        plain, values = made.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        return self._concat_k_nope_k_pe(plain, turned), values

    def _latents_and_turned(self, cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Both caches of a layer, [blocks, tokens of a block, 1, size] each."""
        blocks = cache.shape[:2]
        sizes = (self.kv_lora_rank, self.qk_rope_head_dim)
        parts = cache.view(-1).split([blocks.numel() * size for size in sizes])
        return parts[0].view(*blocks, 1, sizes[0]), parts[1].view(*blocks, 1, sizes[1])


def attend_to_rows(  # noqa: PLR0917
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    query_lengths: list[int],
    key_lengths: list[int],
    mask: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention of requests to keys and values of each head, and the logarithms of its sums, [heads, tokens].

    All else is [tokens, heads, size]. With a `mask` it is causal.
    """
    attended, sums = torch.ops.npu.npu_fused_infer_attention_score(
        query.contiguous(),
        keys.contiguous(),
        values.contiguous(),
        atten_mask=mask,
        actual_seq_lengths=list(accumulate(query_lengths)),
        actual_seq_lengths_kv=list(accumulate(key_lengths)),
        num_heads=query.shape[1],
        scale=scale,
        input_layout="TND",
        num_key_value_heads=query.shape[1],
        sparse_mode=NO_MASK if mask is None else LOWER_RIGHT_CAUSAL,
        softmax_lse_flag=True,
    )
    return attended, sums.squeeze(-1).transpose(0, 1)


def attend_to_latents(
    queries: tuple[torch.Tensor, torch.Tensor],
    caches: tuple[torch.Tensor, torch.Tensor],
    lengths: list[int],
    block_table: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """The attention of one query of each request to the cache, in latents, [requests, heads, size].

    `queries` are such, too, and `caches` [blocks, tokens of a block, 1, size]: what is not turned, and what is.
    """
    query, turned_query = (each.unsqueeze(2).contiguous() for each in queries)
    latents, turned = (each.transpose(1, 2) for each in caches)
    attended: torch.Tensor = torch.ops.npu.npu_fused_infer_attention_score(
        query,
        latents,
        latents,
        query_rope=turned_query,
        key_rope=turned,
        actual_seq_lengths_kv=lengths,
        block_table=block_table,
        num_heads=query.shape[1],
        scale=scale,
        input_layout="BNSD",
        num_key_value_heads=1,
        block_size=latents.shape[2],
    )[0]
    return attended.squeeze(2)


def _tokens_of_batch() -> int:
    metadata = get_forward_context().attn_metadata
    return next(iter(metadata.values())).num_actual_tokens if metadata else 0


mla_attention.merge_attn_states = _merge_attn_states_torch  # vLLM's other ones are kernels for GPUs
