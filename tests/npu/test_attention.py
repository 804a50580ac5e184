"""Attention over the paged cache against attention as it is written in books, for everything that vLLM schedules.

The cache is one that vLLM lays out for the backend, with garbage in it; blocks are dealt in random order. Each step
gives requests more tokens, as the scheduler does.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

BLOCK = 128
BLOCKS = 24
NPU = "npu:0"


@dataclass(frozen=True)
class Shape:
    heads: int
    key_heads: int
    size: int
    dtype: torch.dtype = torch.float32


SHAPES = {
    "as many KV heads": Shape(4, 4, 64),
    "grouped queries": Shape(8, 2, 128),
    "one KV head": Shape(6, 1, 80),
    "grouped queries in bf16": Shape(8, 2, 128, torch.bfloat16),
}
STEPS = {
    "prefill": [{"a": 5, "b": 300, "c": 1}],
    "decode": [{"a": 5, "b": 300}, {"a": 1, "b": 1}, {"b": 1}],
    "over the end of a block": [{"a": 126}, *[{"a": 1}] * 4],
    "chunked prefill": [{"a": 100}, {"a": 100}, {"a": 57}, {"a": 1}],
    "all at once": [{"a": 130}, {"a": 1, "b": 40}, {"b": 200, "a": 1, "c": 3}, {"c": 1, "b": 1, "a": 1}],
}


@dataclass
class Request:
    """What a request has so far: the blocks of its cache, and all its keys and values."""

    blocks: list[int] = field(default_factory=list)
    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)

    @property
    def length(self) -> int:
        return sum(map(len, self.keys))


class Layer:
    """One attention layer of `shape` with its cache."""

    def __init__(self, shape: Shape) -> None:
        from vllm_ascend.attention.backend import NPUAttentionBackend, causal_mask

        self.shape = shape
        self.scale = shape.size**-0.5
        self.layer = NPUAttentionBackend.get_impl_cls()(shape.heads, shape.size, self.scale, shape.key_heads)
        self.cache = cache_of_vllm(NPUAttentionBackend, shape)
        self.cache.normal_()
        self.mask = causal_mask(torch.device(NPU))
        self.requests: dict[str, Request] = {}
        self._random = torch.Generator().manual_seed(0)
        self._free = torch.randperm(BLOCKS, generator=self._random).tolist()

    def step(self, scheduled: dict[str, int], padding: int = 3) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """What the layer and the book say for each request that gets so many tokens."""
        from vllm_ascend.attention.backend import NPUAttentionMetadata

        tokens = sum(scheduled.values())
        heads, size = (self.shape.heads, self.shape.key_heads, self.shape.key_heads), self.shape.size
        query, key, value = (
            torch.randn(tokens + padding, count, size, generator=self._random).to(self.shape.dtype) for count in heads
        )
        slots, tables, lengths, ends = [], [], [], [0]
        for name, count in scheduled.items():
            request = self.requests.setdefault(name, Request())
            start = request.length
            own = slice(ends[-1], ends[-1] + count)
            request.keys.append(key[own])
            request.values.append(value[own])
            while len(request.blocks) * BLOCK < request.length:
                request.blocks.append(self._free.pop())
            slots += [request.blocks[at // BLOCK] * BLOCK + at % BLOCK for at in range(start, request.length)]
            tables.append(request.blocks + [0] * (8 - len(request.blocks)))
            lengths.append(request.length)
            ends.append(own.stop)
        batch = NPUAttentionMetadata(
            query_ends=ends[1:],
            key_lengths=lengths,
            block_table=torch.tensor(tables, dtype=torch.int32, device=NPU),
            slots=torch.tensor(slots, dtype=torch.int32, device=NPU),
            mask=self.mask,
        )
        output = torch.empty_like(query, device=NPU)
        self.layer.forward(None, query.to(NPU), key.to(NPU), value.to(NPU), self.cache, batch, output)
        for (name, count), end in zip(scheduled.items(), ends[1:], strict=True):
            yield output[end - count : end].cpu(), self.by_the_book(query[end - count : end], self.requests[name])

    def by_the_book(self, query: torch.Tensor, request: Request) -> torch.Tensor:
        keys, values = (torch.cat(each).transpose(0, 1).float()[None] for each in (request.keys, request.values))
        visible = torch.ones(len(query), request.length, dtype=torch.bool).tril(request.length - len(query))
        queries = query.transpose(0, 1).float()[None]
        result = scaled_dot_product_attention(queries, keys, values, visible, scale=self.scale, enable_gqa=True)
        return result[0].transpose(0, 1).to(query.dtype)


def cache_of_vllm(backend: Any, shape: Shape) -> torch.Tensor:
    """The second of three layers' caches, as vLLM's worker makes it."""
    from vllm.v1.kv_cache_interface import (
        FullAttentionSpec,
        KVCacheTensor,
        compute_layout_strides,
        create_kv_cache_views,
    )
    from vllm.v1.worker.utils import customize_attention_spec

    spec = customize_attention_spec(
        backend,
        FullAttentionSpec(block_size=BLOCK, num_kv_heads=shape.key_heads, head_size=shape.size, dtype=shape.dtype),
    )
    (layout,) = backend.supported_kv_cache_layouts()
    layer_stride, block_stride, *_ = compute_layout_strides(spec, BLOCKS, 3, layout)
    size = 3 * layer_stride
    tensor = KVCacheTensor(size=size, layers=["x", "y", "z"], layer_stride=layer_stride, block_stride=block_stride)
    raw = torch.zeros(size, dtype=torch.int8, device=NPU)
    views: list[torch.Tensor] = create_kv_cache_views(raw, spec, BLOCKS, layout, tensor)
    return views[1]


TOLERANCE: dict[int, Any] = {2: {"rtol": 2e-2, "atol": 2e-2}}
"""By bytes of an element; torch's own for others."""


def assert_close(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    ours, expected = pair
    torch.testing.assert_close(ours, expected, **TOLERANCE.get(ours.dtype.itemsize, {}))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS.keys())
def test_attention_is_that_of_the_book(shape: Shape, steps: list[dict[str, int]]) -> None:
    layer = Layer(shape)
    for scheduled in steps:
        for pair in layer.step(scheduled):
            assert_close(pair)


def test_a_cached_beginning_is_shared_by_requests() -> None:
    layer = Layer(SHAPES["grouped queries"])
    for pair in layer.step({"first": 300}):
        assert_close(pair)
    first = layer.requests["first"]
    layer.requests["second"] = Request(first.blocks[:2], [first.keys[0][:256]], [first.values[0][:256]])
    for pair in layer.step({"second": 70, "first": 1}):
        assert_close(pair)
    assert layer.requests["second"].blocks[:2] == first.blocks[:2]


def test_what_only_pads_a_batch_is_not_written_into_the_cache() -> None:
    layer = Layer(SHAPES["as many KV heads"])
    list(layer.step({"a": 3}))
    before = layer.cache.clone()
    list(layer.step({"a": 1}, padding=7))
    changed = (layer.cache != before).flatten(-1).any(-1).nonzero().tolist()
    block = layer.requests["a"].blocks[0]
    assert changed == [[block, 0, 3], [block, 1, 3]]


def test_without_a_cache_there_is_nothing_to_attend_to() -> None:
    layer = Layer(SHAPES["as many KV heads"])
    query, key, value, output = (torch.randn(5, 4, 64, device=NPU) for _ in range(4))
    result = layer.layer.forward(None, query, key, value, torch.tensor([]), None, output)
    assert result is output
    assert not result.any()


HEAD_SIZES = [16, 32, 48, 64, 72, 80, 96, 112, 128, 144, 192, 256, 272, 512]
GROUPS = [(1, 1), (4, 4), (2, 1), (6, 2), (64, 1), (65, 1), (256, 4), (258, 6), (258, 258)]
BLOCK_SIZES = [16, 64, 256, 512]
GRID = [
    *itertools.product(HEAD_SIZES, GROUPS, [BLOCK]),
    *itertools.product(HEAD_SIZES, GROUPS[:3], BLOCK_SIZES),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_platform_and_simulator_hold_one_rule_of_heads_and_blocks(dtype: torch.dtype) -> None:
    from vllm_ascend.attention.backend import NPUAttentionBackend, NPUAttentionMetadata, attend, causal_mask
    from vllm_ascend.attention.rules import Heads, refusals

    def operator_takes(heads: Heads, block: int) -> bool:
        query = torch.ones(1, heads.queries, heads.size, dtype=dtype, device=NPU)
        cache = torch.empty(1, block, heads.key_values * heads.size, dtype=dtype, device=NPU)
        batch = NPUAttentionMetadata([1], [1], torch.zeros(1, 1, dtype=torch.int32, device=NPU), torch.empty(0), mask)
        try:
            attend(query, cache, cache, batch, num_kv_heads=heads.key_values, scale=1.0, output=torch.empty_like(query))
        except RuntimeError as error:
            assert "npu_fused_infer_attention_score: " in str(error)  # noqa: PT017
            return False
        return True

    mask = causal_mask(torch.device(NPU))
    taken = 0
    for size, group, block in GRID:
        heads = Heads(size, *group)
        allowed = NPUAttentionBackend.supports_block_size(block) and not list(refusals(heads, dtype))
        assert operator_takes(heads, block) == allowed, (heads, block)
        taken += allowed
    assert 40 < taken < 60


@pytest.mark.parametrize(
    ("argument", "word"),
    [
        ({"alibi_slopes": [0.5]}, "ALiBi"),
        ({"sliding_window": 64}, "a sliding window"),
        ({"logits_soft_cap": 30.0}, "soft-capped logits"),
        ({"sinks": torch.zeros(4)}, "sinks"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_what_a_layer_wants_more_is_refused_by_name(argument: dict[str, Any], word: str) -> None:
    from vllm_ascend.attention.backend import NPUAttentionImpl

    with pytest.raises(ValueError, match=f"attention with {word} is not supported on NPUs"):
        NPUAttentionImpl(4, 64, 0.125, 4, **argument)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_platform_and_simulator_hold_one_rule_of_an_encoders_heads(dtype: torch.dtype) -> None:
    from vllm_ascend.attention.rules import Heads, encoder_refusals

    def operator_takes(heads: Heads) -> bool:
        query, key = (
            torch.ones(2, count, heads.size, dtype=dtype, device=NPU) for count in (heads.queries, heads.key_values)
        )
        lengths = {"actual_seq_qlen": [2], "actual_seq_kvlen": [2]}
        try:
            torch.ops.npu.npu_fusion_attention(query, key, key, heads.queries, "TND", **lengths)
        except RuntimeError as error:
            assert "npu_fusion_attention: " in str(error)  # noqa: PT017
            return False
        return True

    for size, group in itertools.product([*HEAD_SIZES, 768, 784], GROUPS):
        heads = Heads(size, *group)
        assert operator_takes(heads) == (not list(encoder_refusals(heads, dtype))), heads


@pytest.mark.parametrize(("heads", "size"), [(4, 64), (12, 32)])
def test_an_encoder_sees_all_of_each_request(heads: int, size: int) -> None:
    """And what only pads a batch is left alone."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    from vllm_ascend.attention.encoder import NPUEncoderBackend

    ends = [5, 6, 300]
    starts = torch.tensor([0, *ends, 300], dtype=torch.int32)
    query, key, value = (torch.randn(303, heads, size) for _ in range(3))
    common: Any = CommonAttentionMetadata.__new__(CommonAttentionMetadata)
    common.query_start_loc_cpu, common.num_reqs = starts, 3
    batch = NPUEncoderBackend.get_builder_cls()(None, [], None, torch.device(NPU)).build(0, common)
    layer = NPUEncoderBackend.get_impl_cls()(heads, size, size**-0.5)
    output = torch.full_like(query, 7.0, device=NPU)
    layer.forward(None, query.to(NPU), key.to(NPU), value.to(NPU), torch.tensor([]), batch, output)
    for start, end in itertools.pairwise([0, *ends]):
        queries, keys, values = (each[start:end].transpose(0, 1)[None] for each in (query, key, value))
        expected = scaled_dot_product_attention(queries, keys, values)[0].transpose(0, 1)
        torch.testing.assert_close(output[start:end].cpu(), expected)
    assert (output[300:] == 7).all()


def test_a_layer_with_heads_that_the_operator_does_not_take_is_refused_when_it_is_built() -> None:
    """The configuration of a model may tell of other heads than some of its layers have."""
    from vllm_ascend.attention.backend import NPUAttentionImpl

    with pytest.raises(ValueError, match=r"attention with heads of 80 \(.* whose size must be 64 or 128"):
        NPUAttentionImpl(4, 80, 0.125, 4)


def test_the_builder_takes_lengths_from_the_host() -> None:
    """And leaves out the requests and tokens that only pad a batch."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    from vllm_ascend.attention.backend import NPUAttentionMetadataBuilder

    ends = torch.tensor([0, 3, 4, 4], dtype=torch.int32)
    lengths = torch.tensor([3, 200, 0], dtype=torch.int32)
    common = CommonAttentionMetadata(
        query_start_loc=ends.to(NPU).zero_(),
        query_start_loc_cpu=ends,
        seq_lens=lengths.to(NPU).zero_(),
        seq_lens_cpu_upper_bound=lengths,
        num_reqs=2,
        num_actual_tokens=4,
        max_query_len=3,
        max_seq_len=200,
        block_table_tensor=torch.arange(6, dtype=torch.int32, device=NPU).view(3, 2),
        slot_mapping=torch.arange(8, device=NPU),
    )
    batch = NPUAttentionMetadataBuilder(None, [], None, torch.device(NPU)).build(0, common)
    assert (batch.query_ends, batch.key_lengths) == ([3, 4], [3, 200])
    assert batch.block_table.tolist() == [[0, 1], [2, 3]]
    assert batch.slots.tolist() == [0, 1, 2, 3]
