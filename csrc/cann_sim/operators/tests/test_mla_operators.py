"""The operators of multi-head latent attention against plain torch, and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

npu = torch.ops.npu
BLOCK, LATENT, TURNED, HEADS = 128, 512, 64, 4
LENGTHS = [300, 128, 1]
HALVES = [torch.float16, torch.bfloat16]


def rand(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device="npu").to(dtype)


class Cache:
    """Latents and turned parts of three requests, whose blocks lie in any order."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        counts = [math.ceil(length / BLOCK) for length in LENGTHS]
        self.latents, self.turned = (rand(sum(counts) + 1, BLOCK, 1, size, dtype=dtype) for size in (LATENT, TURNED))
        self.table = torch.zeros(len(LENGTHS), max(counts), dtype=torch.int32)
        for row, blocks in zip(self.table, torch.randperm(sum(counts) + 1).int()[1:].split(counts), strict=True):
            row[: len(blocks)] = blocks
        self.rows = [
            tuple(each.cpu()[blocks.long()].flatten(0, 1)[:length, 0] for each in (self.latents, self.turned))
            for blocks, length in zip(self.table, LENGTHS, strict=True)
        ]

    def call(self, **changes: Any) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
        """Arguments of attention to it, with one query of each request."""
        dtype = self.latents.dtype
        latents, turned = (each.transpose(1, 2) for each in (self.latents, self.turned))
        given = {
            "query": rand(len(LENGTHS), HEADS, 1, LATENT, dtype=dtype),
            "key": latents,
            "value": latents,
            "query_rope": rand(len(LENGTHS), HEADS, 1, TURNED, dtype=dtype),
            "key_rope": turned,
            "actual_seq_lengths_kv": LENGTHS,
            "block_table": self.table.npu(),
            "num_heads": HEADS,
            "num_key_value_heads": 1,
            "scale": 0.1,
            "input_layout": "BNSD",
            "block_size": BLOCK,
            **changes,
        }
        return tuple(given.pop(name) for name in ("query", "key", "value")), given


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_latents_are_keys_and_values_of_all_heads(dtype: torch.dtype, require_meta_shapes: Callable[..., None]) -> None:
    cache = Cache(dtype)
    tensors, arguments = cache.call()
    require_meta_shapes(npu.npu_fused_infer_attention_score, tensors, arguments)
    output, sums = npu.npu_fused_infer_attention_score(*tensors, **arguments)
    assert sums.shape == (0,)
    queries = torch.cat((tensors[0], arguments["query_rope"]), dim=-1).cpu().double()
    for query, (latents, turned), found in zip(queries, cache.rows, output, strict=True):
        keys = torch.cat((latents, turned), dim=-1).double()
        expected = (query @ keys.t() * 0.1).softmax(-1) @ latents.double()
        torch.testing.assert_close(found.cpu().double(), expected, rtol=0.02, atol=0.02)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "layout": ({"input_layout": "TND"}, "input_layout='TND' with query_rope is not simulated"),
    "no turned keys": ({"key_rope": None}, "key_rope is None"),
    "no turned queries": ({"query_rope": None}, "query_rope is None"),
    "heads": ({"num_heads": 12}, "num_heads with query_rope is 12, but must be one of"),
    "key heads": ({"num_key_value_heads": 4}, "num_key_value_heads with query_rope is 4, but must be 1"),
    "other heads": ({"num_heads": 8}, r"shape of query is \(3, 4, 1, 512\), but must be \(3, 8, 1, 512\)"),
    "size": ({"query_rope": (3, HEADS, 1, 32)}, r"shape of query_rope is \(3, 4, 1, 32\)"),
    "values of their own": ({"value": (7, 1, BLOCK, LATENT)}, "value is another tensor than key"),
    "block size": ({"block_size": 64}, "block_size with query_rope is 64"),
    "no pages": ({"block_table": None}, "block_table with query_rope is None"),
    "long table": ({"block_table": torch.zeros(3, 3, dtype=torch.int64)}, "dtype of block_table is torch.int64"),
    "narrow table": ({"block_table": torch.zeros(3, 2, dtype=torch.int32)}, r"block_table is \(3, 2\).*\[3, 3 or"),
    "wild table": ({"block_table": torch.full((3, 3), 99, dtype=torch.int32)}, "of blocks below"),
    "lengths": ({"actual_seq_lengths_kv": [5, 5]}, "lengths of 3 requests"),
    "mask": ({"atten_mask": torch.ones(2048, 2048).bool(), "sparse_mode": 3}, "with query_rope: .* is not simulated"),
    "sums": ({"softmax_lse_flag": True}, "softmax_lse_flag=True is not simulated"),
    "float32": ({"query": (torch.float32, 3, HEADS, 1, LATENT)}, "dtype of query is torch.float32"),
    "mixed": ({"query_rope": (torch.float16, 3, HEADS, 1, TURNED)}, "dtype of query_rope is torch.float16"),
}


@pytest.mark.parametrize(("changes", "complaint"), WRONG.values(), ids=WRONG.keys())
def test_attention_to_latents_refuses_what_its_kernels_do_not_take(changes: dict[str, Any], complaint: str) -> None:
    tensors, arguments = Cache().call(**{name: made(value) for name, value in changes.items()})
    with pytest.raises(RuntimeError, match=complaint):
        npu.npu_fused_infer_attention_score(*tensors, **arguments)


def made(value: Any) -> Any:
    """A tensor for a shape, which may begin with a dtype."""
    if not isinstance(value, tuple):
        return value.npu() if isinstance(value, torch.Tensor) else value
    return rand(*value[1:], dtype=value[0]) if isinstance(value[0], torch.dtype) else rand(*value)


def rows(query: int, key: int, value: int, *, tokens: int = 30, **changes: Any) -> tuple[Any, Any]:
    arguments = {
        "actual_seq_lengths": [10, tokens],
        "actual_seq_lengths_kv": [10, tokens],
        "num_heads": HEADS,
        "scale": 0.1,
        "input_layout": "TND",
        "softmax_lse_flag": True,
    }
    return tuple(rand(tokens, HEADS, size) for size in (query, key, value)), {**arguments, **changes}


@pytest.mark.parametrize("causal", [False, True])
def test_values_may_be_smaller_than_keys(causal: bool, require_meta_shapes: Callable[..., None]) -> None:
    mask = torch.ones(2048, 2048, dtype=torch.int8, device="npu").triu_(1)
    tensors, arguments = rows(192, 192, 128, **({"atten_mask": mask, "sparse_mode": 3} if causal else {}))
    require_meta_shapes(npu.npu_fused_infer_attention_score, tensors, arguments)
    output, sums = npu.npu_fused_infer_attention_score(*tensors, **arguments)
    for part in (slice(0, 10), slice(10, 30)):
        query, key, value = (each[part].cpu().double().transpose(0, 1) for each in tensors)
        scores = query @ key.transpose(1, 2) * 0.1
        if causal:
            scores = scores.masked_fill(torch.ones(scores.shape[1:]).bool().triu(1), -math.inf)
        expected = (scores.softmax(-1) @ value).transpose(0, 1)
        torch.testing.assert_close(output[part].cpu().double(), expected, rtol=0.02, atol=0.02)
        found = sums[part].cpu().double().squeeze(-1).t()
        torch.testing.assert_close(found, scores.logsumexp(-1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("sizes", "changes", "complaint"),
    [
        ((192, 192, 64), {}, r"head sizes of query, key and value is \(192, 192, 64\)"),
        ((128, 128, 64), {}, r"\(128, 128, 64\), but must be 192, 192, 128"),
        ((192, 192, 192), {}, "head size is 192, but must be 64 or 128"),
        ((192, 192, 128), {"num_key_value_heads": 2}, "one key head for each head"),
        ((192, 192, 128), {"tokens": 65537}, "number of tokens is 65537, but must be at most 65536"),
    ],
    ids=["values", "sizes", "equal", "shared", "tokens"],
)
def test_other_unequal_sizes_are_refused(sizes: tuple[int, int, int], changes: dict[str, Any], complaint: str) -> None:
    tensors, arguments = rows(*sizes, **changes)
    with pytest.raises(RuntimeError, match=complaint):
        npu.npu_fused_infer_attention_score(*tensors, **arguments)


def gather(cache: Cache, lengths: torch.Tensor, tokens: int, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    results = tuple(each.new_zeros(tokens, *each.shape[2:]) for each in (cache.latents, cache.turned))
    given = cache.latents, cache.turned, cache.table.npu(), lengths.npu()
    npu.npu_gather_pa_kv_cache(*given, *results, **options)
    return results


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_tokens_are_read_from_their_blocks(dtype: torch.dtype) -> None:
    cache = Cache(dtype)
    for found, at in zip(gather(cache, int32(200, 128, 1), 329), (0, 1), strict=True):
        assert torch.equal(
            found.cpu()[:, 0], torch.cat([cache.rows[0][at][:200], cache.rows[1][at], cache.rows[2][at]])
        )
    totals = {"is_seq_lens_cumsum": True, "seq_offset": int32(128, 0, 0).npu()}
    for found, at in zip(gather(cache, int32(0, 172, 177, 178), 178, **totals), (0, 1), strict=True):
        expected = [cache.rows[0][at][128:], cache.rows[1][at][:5], cache.rows[2][at]]
        assert torch.equal(found.cpu()[:, 0], torch.cat(expected))


@pytest.mark.parametrize(
    ("lengths", "tokens", "options", "complaint"),
    [
        (int32(1, 1, 1), 4, {}, "tokens of key is 4, but must be 3"),
        (int32(1, 1), 2, {}, r"shape of seq_lens is \(2,\)"),
        (torch.tensor([1, 1, 1]), 3, {}, "dtype of seq_lens is torch.int64"),
        (int32(1, 2, 3, 4), 3, {"is_seq_lens_cumsum": True}, "first of seq_lens is 1, but must be 0"),
        (int32(1, 1, 1), 3, {"seq_offset": int32(0, 64, 0)}, r"seq_offset is \[0, 64, 0\].*whole blocks"),
        (int32(1, 1, 1), 3, {"seq_offset": int32(0, 0)}, r"shape of seq_offset is \(2,\)"),
        (int32(129, 1, 1), 131, {"seq_offset": int32(256, 0, 0)}, "the blocks of a request"),
        (int32(0, 0, 0), 0, {}, r"key is empty"),
    ],
    ids=["tokens", "requests", "dtype", "totals", "part of a block", "offsets", "beyond the table", "nothing"],
)
def test_wrong_reads_are_refused(lengths: torch.Tensor, tokens: int, options: dict[str, Any], complaint: str) -> None:
    options = {name: made(value) for name, value in options.items()}
    with pytest.raises(RuntimeError, match=complaint):
        gather(Cache(), lengths, tokens, **options)
