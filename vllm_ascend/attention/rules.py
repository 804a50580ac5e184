"""Which heads, blocks and types CANN's attention operators take on A2 and A3.

`npu_fused_infer_attention_score` leads a call to one of several kernels, by the head size, by how many query heads
share a KV head, by the block size and by the type, and each kernel takes something else. What is told here is what the
operator's sources and its documentation both allow for the call of `backend`: queries in layout TND, the cache in
blocks of [tokens, heads x head size], a causal mask in sparse mode 3. Anything else ends with error 561002 in the first
forward pass.

With multi-head latent attention (MLA), the same operator is called in two other ways, which `mla` describes. CANN's
documentation and sources take powers of two of heads; torch-npu's documentation is older and takes fewer, and others
run with 4.

Encoders have no cache. Their operator, `npu_fusion_attention`, takes almost all heads.

The simulated CANN holds the same rules in code of its own. A test compares them over the whole grid, and the table in
docs/source/ascend.md is the rule for people.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

BLOCK_SIZE = 128
"""Tokens in a block of the KV cache. Larger blocks work for some heads only."""
MAX_REQUESTS = 4096
"""Requests in one call."""
MAX_HEADS = 256
MAX_QUERIES_PER_KV_HEAD = 64
MAX_HEAD_SIZE = 256
HEAD_SIZE_STEP = 16
"""Where several query heads share a KV head."""
HEAD_SIZES_OF_THEIR_OWN = (64, 128)
"""Where each query head has a KV head of its own."""
MAX_MLA_HEADS = 128
MAX_MLA_TOKENS = 65536
"""In one call."""
MAX_ENCODER_REQUESTS = 2048
MAX_ENCODER_HEAD_SIZE = 768


@dataclass(frozen=True)
class Heads:
    """The attention heads of one layer on one device."""

    size: int
    queries: int
    key_values: int

    @property
    def shared(self) -> bool:
        """Several query heads share a KV head."""
        return self.queries > self.key_values

    def __str__(self) -> str:
        return f"heads of {self.size} (on each device: query heads {self.queries}, KV heads {self.key_values})"


@dataclass(frozen=True)
class LatentSizes:
    """What multi-head latent attention computes with, by the names in configurations of models."""

    kv_lora_rank: int
    qk_rope_head_dim: int
    qk_nope_head_dim: int
    v_head_dim: int

    def __str__(self) -> str:
        return ", ".join(f"{name} {size}" for name, size in vars(self).items())


LATENT_SIZES = LatentSizes(kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128)
"""Those of DeepSeek V2 and V3, for which the kernels are made."""


def refusals(heads: Heads, dtype: torch.dtype) -> Iterator[str]:
    """Everything about attention over the cache with these heads that the operator does not take."""
    fits = heads.size % HEAD_SIZE_STEP == 0 and heads.size <= MAX_HEAD_SIZE
    alone = "where no query heads share a KV head"
    if heads.shared and not fits:
        yield f"{heads}, whose size must be a multiple of {HEAD_SIZE_STEP}, at most {MAX_HEAD_SIZE}"
    if not heads.shared and heads.size not in HEAD_SIZES_OF_THEIR_OWN:
        yield f"{heads}, whose size must be {' or '.join(map(str, HEAD_SIZES_OF_THEIR_OWN))} {alone}"
    if not heads.shared and dtype == torch.float16:
        yield f"{heads} in float16 (choose --dtype bfloat16 {alone})"

    if heads.queries > MAX_HEADS:
        yield f"{heads}, more than {MAX_HEADS} query heads"
    if heads.queries > MAX_QUERIES_PER_KV_HEAD * heads.key_values:
        yield f"{heads}, more than {MAX_QUERIES_PER_KV_HEAD} query heads for each KV head"


def mla_refusals(sizes: LatentSizes, heads: int, dtype: torch.dtype) -> Iterator[str]:
    """Everything about MLA with these sizes, and so many heads on a device, that the operator does not take."""
    if sizes != LATENT_SIZES:
        yield f"MLA with {sizes} (there is {LATENT_SIZES})"
    if heads > MAX_MLA_HEADS or heads & (heads - 1):
        yield f"MLA with {heads} heads on each device, which must be a power of two, at most {MAX_MLA_HEADS}"
    if dtype == torch.float16:
        yield "MLA in float16 (choose --dtype bfloat16)"


def encoder_refusals(heads: Heads, dtype: torch.dtype) -> Iterator[str]:
    """Everything about an encoder's attention with these heads that its operator does not take."""
    if heads.size > MAX_ENCODER_HEAD_SIZE:
        yield f"{heads}, whose size must be at most {MAX_ENCODER_HEAD_SIZE}"
    if heads.queries > MAX_HEADS:
        yield f"{heads}, more than {MAX_HEADS} query heads"
