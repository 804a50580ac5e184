"""torch-npu's operators: equal to plain torch, shaped as the wheel's own meta kernels say, strict as documented."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch_npu
from torch.utils._pytree import tree_map

npu, atb = torch.ops.npu, torch.ops.atb
Tensors = tuple[torch.Tensor, ...]
HEADS, KEY_HEADS, SIZE, BLOCK = 8, 2, 64, 128
HEADS_OF = {"query": HEADS, "key": KEY_HEADS, "value": KEY_HEADS}
FLOATS = [torch.float16, torch.bfloat16]


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, device="npu").to(dtype)


def causal_mask() -> torch.Tensor:
    return torch.ones(2048, 2048, dtype=torch.int8, device="npu").triu_(1)


def expected_attention(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, causal: bool) -> Tensors:
    """Returns the attention of one request in double precision, and the logarithm of the softmax's sum.

    All tensors are [tokens, heads, head size].
    """
    query, keys, values = (each.cpu().double().transpose(0, 1) for each in (query, keys, values))
    groups = query.shape[0] // keys.shape[0]
    scores = query @ keys.repeat_interleave(groups, 0).transpose(1, 2) / math.sqrt(query.shape[-1])
    if causal:
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1 + keys.shape[1] - query.shape[1])
        scores = scores.masked_fill(hidden, -math.inf)
    attended = scores.softmax(-1) @ values.repeat_interleave(groups, 0)
    return attended.transpose(0, 1), scores.logsumexp(-1).transpose(0, 1).unsqueeze(-1)


class Paged:
    """A cache in which the blocks of several requests lie in any order."""

    def __init__(self, lengths: list[int], *, dtype: torch.dtype = torch.bfloat16, block: int = BLOCK) -> None:
        self.lengths = lengths
        self.keys = [rand(length, KEY_HEADS, SIZE, dtype=dtype) for length in lengths]
        self.values = [rand(length, KEY_HEADS, SIZE, dtype=dtype) for length in lengths]
        counts = [math.ceil(length / block) for length in lengths]
        order = torch.randperm(sum(counts) + 1).int()
        self.table = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
        self.key_cache = rand(len(order), block, KEY_HEADS, SIZE, dtype=dtype)
        self.value_cache = rand(len(order), block, KEY_HEADS, SIZE, dtype=dtype)
        for request, blocks in enumerate(order[1:].split(counts)):
            self.table[request, : len(blocks)] = blocks
            slots = (blocks[:, None] * block + torch.arange(block)).flatten()[: lengths[request]].int().npu()
            rows = self.keys[request], self.values[request]
            npu.npu_scatter_pa_kv_cache(*rows, self.key_cache, self.value_cache, slots, cache_mode="Norm")
        self.arguments = {
            "atten_mask": causal_mask(),
            "actual_seq_lengths_kv": lengths,
            "block_table": self.table.npu(),
            "num_heads": HEADS,
            "num_key_value_heads": KEY_HEADS,
            "scale": 1 / math.sqrt(SIZE),
            "input_layout": "TND",
            "sparse_mode": 3,
            "block_size": block,
        }

    def attend(self, query: torch.Tensor, ends: list[int], **other: object) -> Tensors:
        arguments = self.arguments | {"actual_seq_lengths": ends} | other
        key, value = self.key_cache.flatten(2), self.value_cache.flatten(2)
        return npu.npu_fused_infer_attention_score(query, key, value, **arguments)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_paged_attention_of_a_mixed_batch(dtype: torch.dtype) -> None:
    cache = Paged([300, 128, 5, 1], dtype=dtype)  # a chunk, a decode, a prompt, a first token
    queries = [40, 1, 5, 1]
    ends = torch.tensor(queries).cumsum(0).tolist()
    query = rand(ends[-1], HEADS, SIZE, dtype=dtype)
    output, sums = cache.attend(query, ends, softmax_lse_flag=True)
    for part, lse, q, k, v in zip(
        output.split(queries), sums.split(queries), query.split(queries), cache.keys, cache.values, strict=True
    ):
        attended, log_sum = expected_attention(q, k, v, causal=True)
        torch.testing.assert_close(part.cpu().double(), attended, rtol=0.02, atol=0.02)
        torch.testing.assert_close(lse.cpu().double(), log_sum, rtol=1e-3, atol=1e-3)


def test_both_layouts_of_the_cache_are_read_alike() -> None:
    cache = Paged([200, 70])
    query = rand(10, HEADS, SIZE, dtype=torch.bfloat16)
    flat, _ = cache.attend(query, [6, 10])
    of_heads = (each.transpose(1, 2).contiguous() for each in (cache.key_cache, cache.value_cache))
    arguments = cache.arguments | {"actual_seq_lengths": [6, 10]}
    by_heads, _ = npu.npu_fused_infer_attention_score(query, *of_heads, **arguments)
    assert torch.equal(flat, by_heads)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_over_dense_keys(causal: bool) -> None:
    query, key, value = (rand(50, heads, SIZE, dtype=torch.float16) for heads in (HEADS, KEY_HEADS, KEY_HEADS))
    output, sums = npu.npu_fused_infer_attention_score(
        query,
        key,
        value,
        actual_seq_lengths=[20, 50],
        actual_seq_lengths_kv=[20, 50],
        num_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        scale=1 / math.sqrt(SIZE),
        input_layout="TND",
        **({"atten_mask": causal_mask(), "sparse_mode": 3} if causal else {}),
    )
    assert sums.shape == (0,)
    for part in (slice(0, 20), slice(20, 50)):
        attended, _ = expected_attention(query[part], key[part], value[part], causal=causal)
        torch.testing.assert_close(output[part].cpu().double(), attended, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("with_sums", [False, True])
def test_attention_is_written_where_the_caller_wants_it(with_sums: bool) -> None:
    cache = Paged([200, 70])
    query = rand(10, HEADS, SIZE, dtype=torch.bfloat16)
    expected, expected_sums = cache.attend(query, [6, 10], softmax_lse_flag=with_sums)
    place = torch.zeros(12, HEADS, SIZE, dtype=torch.bfloat16, device="npu")
    out = [place[1:11], torch.empty(expected_sums.shape, device="npu")]
    arguments = cache.arguments | {"actual_seq_lengths": [6, 10], "softmax_lse_flag": with_sums}
    tensors = query, cache.key_cache.flatten(2), cache.value_cache.flatten(2)
    found, sums = npu.npu_fused_infer_attention_score.out(*tensors, **arguments, out=out)
    assert found.data_ptr() == place[1].data_ptr()
    assert torch.equal(place[1:11], expected)
    assert torch.equal(sums, expected_sums)
    assert not place[[0, 11]].any()
    for wrong, complaint in (
        ([place[1:10], out[1]], r"shape of a tensor in out is \(9, 8, 64\)"),
        ([place[1:11].float(), out[1]], "dtype of a tensor in out is torch.float32"),
        (out[:1], "number of tensors in out is 1"),
    ):
        with pytest.raises(RuntimeError, match=complaint):
            npu.npu_fused_infer_attention_score.out(*tensors, **arguments, out=wrong)


def test_the_mask_is_what_hides() -> None:
    cache = Paged([6])
    query = rand(6, HEADS, SIZE, dtype=torch.bfloat16)
    open_mask = torch.zeros(2048, 2048, dtype=torch.bool, device="npu")
    output, _ = cache.attend(query, [6], atten_mask=open_mask)
    attended, _ = expected_attention(query, cache.keys[0], cache.values[0], causal=False)
    torch.testing.assert_close(output.cpu().double(), attended, rtol=0.02, atol=0.02)


def test_single_precision_is_for_comparisons_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CANN_SIM_FP32", raising=False)
    with pytest.raises(RuntimeError, match=r"dtype of key is torch.float32.*float16, bfloat16, int8"):
        Paged([200], dtype=torch.float32)
    monkeypatch.setenv("CANN_SIM_FP32", "1")
    cache = Paged([200], dtype=torch.float32)
    query = rand(10, HEADS, SIZE)
    monkeypatch.delenv("CANN_SIM_FP32")
    with pytest.raises(RuntimeError, match=r"dtype of query is torch.float32.*CANN_SIM_FP32"):
        cache.attend(query, [10])
    monkeypatch.setenv("CANN_SIM_FP32", "1")
    attended, _ = expected_attention(query, cache.keys[0], cache.values[0], causal=True)
    torch.testing.assert_close(cache.attend(query, [10])[0].cpu().double(), attended, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float32], ids=str)
@pytest.mark.parametrize("size", [32, 64])
def test_attention_of_encoders_sees_all_of_a_request(dtype: torch.dtype, size: int) -> None:
    query, key, value = (rand(50, heads, size, dtype=dtype) for heads in (HEADS, KEY_HEADS, KEY_HEADS))
    ends = [20, 20, 50]  # the second request has no tokens
    lengths = {"actual_seq_qlen": ends, "actual_seq_kvlen": ends}
    output, maxima, sums, *_ = npu.npu_fusion_attention(
        query, key, value, HEADS, "TND", scale=1 / math.sqrt(size), **lengths
    )
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    for part in (slice(0, 20), slice(20, 50)):
        attended, log_sum = expected_attention(query[part], key[part], value[part], causal=False)
        torch.testing.assert_close(output[part].cpu().double(), attended, rtol=tolerance, atol=tolerance)
        found = (maxima + sums.log())[part].cpu().double()
        torch.testing.assert_close(found, log_sum.expand_as(found), rtol=1e-3, atol=1e-3)


WRONG_FUSION = {
    "layout": ({"input_layout": "BSH"}, "input_layout is 'BSH'"),
    "mask": ({"atten_mask": torch.zeros(2048, 2048, dtype=torch.bool)}, "atten_mask=a tensor"),
    "dropout": ({"keep_prob": 0.9}, "keep_prob is 0.9, but must be 1"),
    "heads": ({"head_num": 4}, "head_num is 4.*the heads of query, 8"),
    "not all tokens": ({"actual_seq_qlen": [4, 9]}, r"actual_seq_qlen is \[4, 9\].*up to 10"),
    "not running totals": ({"actual_seq_kvlen": [10, 4]}, r"actual_seq_kvlen is \[10, 4\]"),
    "no lengths": ({"actual_seq_qlen": None}, "actual_seq_qlen is None"),
    "requests": ({"actual_seq_kvlen": [10]}, r"actual_seq_kvlen is \[10\].*2 requests"),
    "no keys": ({"actual_seq_kvlen": [0, 10]}, r"actual_seq_kvlen is \[0, 10\].*keys for all queries"),
    "types": ({"key": torch.zeros(10, KEY_HEADS, SIZE)}, "dtype of key is torch.float32"),
    "odd key heads": (
        {"key": torch.zeros(10, 3, SIZE).bfloat16(), "value": torch.zeros(10, 3, SIZE).bfloat16()},
        "heads of key is 3, but must be a divisor of head_num",
    ),
    "other sizes": ({"query": torch.zeros(10, HEADS, 128).bfloat16()}, r"shape of key is \(10, 2, 64\)"),
}


@pytest.mark.parametrize(("change", "complaint"), WRONG_FUSION.values(), ids=WRONG_FUSION.keys())
def test_attention_of_encoders_refuses_what_documentation_forbids(change: dict[str, object], complaint: str) -> None:
    change = {name: value.npu() if isinstance(value, torch.Tensor) else value for name, value in change.items()}
    tensors = {name: rand(10, heads, SIZE, dtype=torch.bfloat16) for name, heads in HEADS_OF.items()}
    arguments = {"head_num": HEADS, "input_layout": "TND", "actual_seq_qlen": [4, 10], "actual_seq_kvlen": [4, 10]}
    with pytest.raises(RuntimeError, match=complaint):
        npu.npu_fusion_attention(**{**tensors, **arguments, **change})


WRONG_ATTENTION = {
    "layout": ({"input_layout": "BSH"}, "input_layout='BSH' is not simulated"),
    "quantised": ({"quant_scale1": torch.ones(1)}, "quant_scale1=a tensor"),
    "window": ({"pre_tokens": 5}, "pre_tokens=5 is not simulated"),
    "heads": ({"num_heads": 4}, "num_heads is 4"),
    "key heads": ({"num_key_value_heads": 3}, "num_key_value_heads is 3"),
    "not running totals": ({"actual_seq_lengths": [10, 6]}, r"actual_seq_lengths is \[10, 6\]"),
    "not all queries": ({"actual_seq_lengths": [4, 9]}, r"actual_seq_lengths is \[4, 9\].*up to 10"),
    "no lengths of queries": ({"actual_seq_lengths": None}, "actual_seq_lengths is None"),
    "no lengths of keys": ({"actual_seq_lengths_kv": None}, "actual_seq_lengths_kv is None"),
    "requests": ({"actual_seq_lengths_kv": [200]}, r"actual_seq_lengths_kv is \[200\].*2 requests"),
    "fewer keys than queries": ({"actual_seq_lengths_kv": [200, 3]}, "actual_seq_lengths_kv is 3.*at least 4"),
    "no mask": ({"atten_mask": None}, "atten_mask is None.*2048"),
    "small mask": ({"atten_mask": torch.ones(10, 200).bool()}, r"atten_mask is \(10, 200\)"),
    "float mask": ({"atten_mask": torch.ones(2048, 2048)}, "dtype of atten_mask is torch.float32"),
    "mask without use": ({"sparse_mode": 0}, "atten_mask is a tensor.*sparse mode 0"),
    "sparse mode": ({"sparse_mode": 4}, "sparse_mode is 4"),
    "precision": ({"inner_precise": 1}, "inner_precise is 1, but must be 0 where heads share"),
    "block size": ({"block_size": 64}, "block_size is 64, but must be 128"),
    "long table": ({"block_table": torch.zeros(2, 2, dtype=torch.int64)}, "dtype of block_table is torch.int64"),
    "narrow table": ({"block_table": torch.zeros(2, 1, dtype=torch.int32)}, r"block_table is \(2, 1\).*\[2, 2"),
    "wild table": ({"block_table": torch.full((2, 2), 99, dtype=torch.int32)}, r"block_table\[0\] is \[99, 99\]"),
}


@pytest.mark.parametrize(("change", "complaint"), WRONG_ATTENTION.values(), ids=WRONG_ATTENTION.keys())
def test_attention_refuses_what_documentation_forbids(change: dict[str, object], complaint: str) -> None:
    cache = Paged([200, 70])
    change = {name: value.npu() if isinstance(value, torch.Tensor) else value for name, value in change.items()}
    with pytest.raises(RuntimeError, match=complaint):
        cache.attend(rand(10, HEADS, SIZE, dtype=torch.bfloat16), change.pop("actual_seq_lengths", [6, 10]), **change)


def test_blocks_have_128_tokens() -> None:
    cache = Paged([20, 40], block=256)
    query = rand(2, HEADS, SIZE, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"block_size is 256, but must be 128"):
        cache.attend(query, [1, 2])
    with pytest.raises(RuntimeError, match=r"tokens of a block of key is 256, but must be 128"):
        cache.attend(query, [1, 2], block_size=128)


@pytest.mark.parametrize(
    ("dtype", "size", "complaint"),
    [
        (
            torch.float16,
            64,
            r"dtype of query is torch.float16, but must be bfloat16 .* where no heads share a key head",
        ),
        (torch.bfloat16, 80, "head size is 80, but must be 64 or 128 where no heads share a key head"),
    ],
    ids=["half", "head size"],
)
def test_heads_with_keys_of_their_own_are_led_to_another_kernel(dtype: torch.dtype, size: int, complaint: str) -> None:
    """Which takes them in half only without a mask and in low precision."""
    query = rand(5, 2, size, dtype=dtype)
    arguments = {"actual_seq_lengths": [5], "actual_seq_lengths_kv": [5], "num_heads": 2, "input_layout": "TND"}
    mask = {"atten_mask": causal_mask(), "sparse_mode": 3}
    with pytest.raises(RuntimeError, match=complaint):
        npu.npu_fused_infer_attention_score(query, query, query, **arguments, **mask)
    if dtype == torch.float16:
        npu.npu_fused_infer_attention_score(query, query, query, **arguments, inner_precise=1)
        with pytest.raises(RuntimeError, match="inner_precise is 0, but must be 1"):
            npu.npu_fused_infer_attention_score(query, query, query, **arguments)


def test_strided_tensors_are_refused() -> None:
    cache = Paged([5])
    query = rand(5, HEADS, 2 * SIZE, dtype=torch.bfloat16)[..., :SIZE]
    with pytest.raises(RuntimeError, match="query is strided"):
        cache.attend(query, [5])


def test_rows_are_written_where_the_slots_say() -> None:
    rows = rand(3, KEY_HEADS, SIZE, dtype=torch.float16)
    slots = torch.tensor([9, 0, 4], dtype=torch.int32, device="npu")
    key_cache, value_cache = (torch.zeros(3, 4, KEY_HEADS, SIZE, dtype=torch.float16, device="npu") for _ in range(2))
    npu.npu_scatter_pa_kv_cache(rows, 2 * rows, key_cache, value_cache, slots, cache_mode="Norm")
    assert torch.equal(key_cache.flatten(0, 1)[slots], rows)
    assert torch.equal(value_cache.flatten(0, 1)[slots], 2 * rows)
    assert key_cache.count_nonzero() == rows.count_nonzero()
    again = torch.zeros_like(key_cache)
    atb._npu_reshape_and_cache(rows, rows, again, torch.zeros_like(again), slots.int())
    assert torch.equal(again, key_cache)


@pytest.mark.parametrize(
    ("slots", "options", "complaint"),
    [
        ([0, 12], {}, r"a slot is \[12\].*from 0 to 11"),
        ([0, -1], {}, r"a slot is \[-1\]"),
        ([5, 5], {}, r"a slot is \[5\] twice"),
        ([5], {}, r"slots is \(1,\).*\[2\]"),
        ([0, 1], {"cache_mode": "PA_NZ"}, "cache_mode='PA_NZ'"),
        ([0, 1], {"seq_lens": torch.ones(1)}, "seq_lens=a tensor"),
    ],
    ids=["beyond", "negative", "twice", "too few", "mode", "compressed"],
)
def test_wrong_slots_are_refused(slots: list[int], options: dict[str, object], complaint: str) -> None:
    rows = rand(2, KEY_HEADS, SIZE, dtype=torch.bfloat16)
    cache = torch.zeros(3, 4, KEY_HEADS, SIZE, dtype=torch.bfloat16, device="npu")
    options = tree_map(lambda value: value.npu() if isinstance(value, torch.Tensor) else value, options)
    with pytest.raises(RuntimeError, match=complaint):
        npu.npu_scatter_pa_kv_cache(
            rows,
            rows,
            cache,
            cache.clone(),
            torch.tensor(slots, dtype=torch.int32, device="npu"),
            **{"cache_mode": "Norm"} | options,
        )
    assert not cache.any()


def test_slots_have_32_bits() -> None:
    """The documentation takes int64, of which the kernel for plain caches would read halves."""
    rows = rand(2, KEY_HEADS, SIZE, dtype=torch.bfloat16)
    cache = torch.zeros(3, 4, KEY_HEADS, SIZE, dtype=torch.bfloat16, device="npu")
    with pytest.raises(RuntimeError, match=r"dtype of slot_mapping is torch.int64.*int32"):
        npu.npu_scatter_pa_kv_cache(rows, rows, cache, cache.clone(), torch.arange(2).npu(), cache_mode="Norm")


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x.float(), weight.shape, weight.float(), 1e-6)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float32], ids=str)
def test_normalisation(dtype: torch.dtype) -> None:
    x, residual, weight = (rand(3, 5, 32, dtype=dtype) for _ in range(3))
    weight = weight[0, 0].contiguous()
    tolerance = {"rtol": 0, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    normalised, reciprocal = npu.npu_rms_norm(x, weight)
    torch.testing.assert_close(normalised.float(), rms_norm(x, weight), **tolerance)
    torch.testing.assert_close(reciprocal, (x.float().square().mean(-1, keepdim=True) + 1e-6).rsqrt())
    normalised, _, total = npu.npu_add_rms_norm(x, residual, weight)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(normalised.float(), rms_norm(total, weight), **tolerance)


def test_activation() -> None:
    x = rand(4, 6, 10)
    for dim in (-1, 1):
        gate, up = x.chunk(2, dim)
        assert torch.equal(npu.npu_swiglu(x, dim), torch.nn.functional.silu(gate) * up)


def turn(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """Turns pairs of numbers, one in the first half and one in the second, as complex numbers in double precision."""
    pairs = torch.complex(*x.cpu().double().chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((pairs.real, pairs.imag), -1)


def test_rotation_of_queries_and_keys_is_in_place() -> None:
    query, key = rand(7, HEADS, SIZE), rand(7, KEY_HEADS, SIZE)
    angle = torch.rand(7, 1, SIZE // 2, dtype=torch.float64) * 6
    cos, sin = (torch.cat((each, each), -1).float().npu() for each in (angle.cos(), angle.sin()))
    expected = turn(query, angle), turn(key, angle)
    turned = npu.npu_apply_rotary_pos_emb(query, key, cos, sin, "TND")
    for found, argument, wanted in zip(turned, (query, key), expected, strict=True):
        torch.testing.assert_close(found.cpu().double(), wanted, rtol=1e-5, atol=1e-5)
        assert found.data_ptr() == argument.data_ptr()


@pytest.mark.parametrize("mode", ["half", "interleave"])
def test_rotation_of_one_tensor(mode: str) -> None:
    x, angle = rand(2, 3, 4, SIZE), torch.rand(1, 3, 1, SIZE // 2, dtype=torch.float64) * 6
    apart = (lambda t: t) if mode == "half" else (lambda t: torch.cat((t[..., ::2], t[..., 1::2]), -1))
    double = torch.cat((angle, angle), -1) if mode == "half" else angle.repeat_interleave(2, -1)
    found = npu.npu_rotary_mul(x, double.cos().float().npu(), double.sin().float().npu(), mode)
    torch.testing.assert_close(apart(found).cpu().double(), turn(apart(x), angle), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["half", "interleave"])
@pytest.mark.parametrize("rotary", [SIZE, SIZE // 2])
def test_rotation_by_angles_that_the_operator_looks_up(rotary: int, mode: str) -> None:
    query, key = rand(3, HEADS * SIZE), rand(3, KEY_HEADS * SIZE)
    angle, positions = torch.rand(9, rotary // 2, dtype=torch.float64) * 6, torch.tensor([8, 0, 3])
    cache = torch.cat((angle.cos(), angle.sin()), -1).float().npu()
    turned = npu.npu_mrope(positions.npu(), query, key, cache, SIZE, rotary_mode=mode)
    apart = (lambda t: t) if mode == "half" else (lambda t: torch.cat((t[..., ::2], t[..., 1::2]), -1))
    for found, given in zip(turned, (query, key), strict=True):
        found, given = (each.unflatten(1, (-1, SIZE)) for each in (found, given))  # noqa: PLW2901
        expected = turn(apart(given[..., :rotary]), angle[positions].unsqueeze(1))
        torch.testing.assert_close(apart(found[..., :rotary]).cpu().double(), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(found[..., rotary:], given[..., rotary:])


def test_grouped_products() -> None:
    rows, matrices = rand(10, 16), rand(3, 8, 16)
    ends = torch.tensor([4, 4, 10], device="npu")
    for kind, groups in enumerate((ends, ends.diff(prepend=ends.new_zeros(1)))):
        (found,) = npu.npu_grouped_matmul(
            [rows], [matrices.transpose(1, 2)], group_list=groups, split_item=2, group_type=0, group_list_type=kind
        )
        expected = torch.cat([rows[:4] @ matrices[0].t(), rows[4:] @ matrices[2].t()])
        torch.testing.assert_close(found, expected)
    arguments = [rows], [matrices.transpose(1, 2)]
    (found,) = npu.npu_grouped_matmul(*arguments, group_list=ends - 2, split_item=2, group_type=0)
    torch.testing.assert_close(found[:8], torch.cat([rows[:2] @ matrices[0].t(), rows[2:8] @ matrices[2].t()]))
    assert found[8:].isnan().all(), "what no group has is undefined"
    with pytest.raises(RuntimeError, match=r"end of group_list is 12.*at most the rows of x, 10"):
        npu.npu_grouped_matmul(*arguments, group_list=ends + 2, split_item=2, group_type=0)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float32], ids=str)
def test_softmax_chooses_experts(dtype: torch.dtype) -> None:
    x = rand(5, 16, dtype=dtype)
    x[0] = 0  # of equal values, the first are taken
    for renorm in (0, 1):
        weights, experts, nothing = npu.npu_moe_gating_top_k_softmax_v2(x, k=3, renorm=renorm)
        softmax = x.cpu().float().softmax(-1).gather(1, experts.cpu().long())
        expected = softmax / softmax.sum(-1, keepdim=True) if renorm else softmax
        torch.testing.assert_close(weights.cpu().float(), expected.to(dtype).float())
        assert experts[0].tolist() == [0, 1, 2]
        assert experts[1:].cpu().tolist() == x[1:].cpu().float().sort(descending=True, stable=True)[1][:, :3].tolist()
        assert (weights.dtype, nothing.numel()) == (dtype, 0)


def test_groups_of_experts_are_chosen_first() -> None:
    """Of three groups of three, the last has the best expert, and the middle one the best two."""
    x = torch.tensor([[1.0, 0, 0, 2, 2, 0, 3, -9, -9]]).npu()
    scores = x.cpu().sigmoid()[0]
    for mode, best in {0: 6, 1: 3}.items():
        weights, experts, _ = npu.npu_moe_gating_top_k(x, 1, group_count=3, group_select_mode=mode, norm_type=1)
        assert (experts.tolist(), weights.tolist()) == ([[best]], [[1.0]])

    bias = torch.tensor([0, 0, 0, 0, 0, 0, -1.0, 0, 0]).npu()
    weights, experts, _ = npu.npu_moe_gating_top_k(
        x, 3, bias=bias, k_group=2, group_count=3, norm_type=1, routed_scaling_factor=2.0
    )
    assert experts.tolist() == [[3, 4, 0]]
    torch.testing.assert_close(weights.cpu()[0], 2 * scores[[3, 4, 0]] / scores[[3, 4, 0]].sum())
    weights, experts, _ = npu.npu_moe_gating_top_k(x, 2)
    torch.testing.assert_close(weights.cpu(), x.cpu().softmax(-1)[:, [6, 3]])


ROUTES = torch.tensor([[3, 1], [2, 3], [0, 3]], dtype=torch.int32)


def route(x: torch.Tensor, begin: int = 0, end: int = 4, **changed: object) -> tuple[torch.Tensor, ...]:
    arguments = {"active_num": 6, "expert_num": 4, "expert_tokens_num_type": 1, "expert_tokens_num_flag": True}
    found: tuple[torch.Tensor, ...] = npu.npu_moe_init_routing_v2(
        x, ROUTES.npu(), **{**arguments, "active_expert_range": [begin, end], **changed}
    )
    return found


def test_rows_go_to_their_experts_and_back() -> None:
    x, weights = rand(3, 5), rand(3, 2)
    rows, positions, counts, _ = route(x)
    assert torch.equal(rows, x[[2, 0, 1, 0, 1, 2]])
    assert (positions.tolist(), counts.tolist()) == ([3, 1, 2, 4, 0, 5], [1, 1, 1, 3])
    torch.testing.assert_close(npu.npu_moe_token_unpermute(rows, positions, weights), x * weights.sum(1, keepdim=True))
    assert torch.equal(npu.npu_moe_token_unpermute(rows, positions), rows[positions.long()])


def test_rows_of_other_devices_experts_are_undefined_and_not_read() -> None:
    x, weights = rand(3, 5), rand(3, 2)
    rows, positions, counts, _ = route(x, 1, 3)
    assert torch.equal(rows[:2], x[[0, 1]])
    assert rows[2:].isnan().all()
    assert (positions.tolist(), counts.tolist()) == ([-1, 0, 1, -1, -1, -1], [1, 1])
    weights = weights.masked_fill(positions.view(3, 2) < 0, 0)
    found = npu.npu_moe_token_unpermute(rows, positions.clamp_min(0), weights)
    torch.testing.assert_close(found, x * weights.sum(1, keepdim=True))


def test_rows_are_quantised_on_their_way() -> None:
    x, smooth = rand(3, 5, dtype=torch.bfloat16), rand(2, 5)
    rows, _, _, scales = route(x, 1, 3, quant_mode=1)
    quantised, scales_of_x = npu.npu_dynamic_quant(x)
    assert torch.equal(rows[:2], quantised[[0, 1]])
    assert torch.equal(scales[:2], scales_of_x[[0, 1]])
    assert scales[2:].isnan().all()
    rows, _, _, scales = route(x, 1, 3, quant_mode=1, scale=smooth)
    smoothed = x[[0, 1]].float() * smooth
    assert torch.equal(scales[:2], smoothed.abs().amax(1) / 127)
    assert torch.equal(rows[:2].float(), (smoothed / scales[:2, None]).round())
    rows, _, _, scales = route(quantised, 1, 3, scale=scales_of_x)
    assert torch.equal(rows[:2], quantised[[0, 1]])
    assert torch.equal(scales[:2], scales_of_x[[0, 1]])


WRONG_ROUTES: dict[str, tuple[Callable[[], object], str]] = {
    "too many chosen": (lambda: npu.npu_moe_gating_top_k_softmax_v2(rand(2, 8), k=9), "k is 9.*from 1 to 8"),
    "neither order": (lambda: npu.npu_moe_gating_top_k_softmax_v2(rand(2, 8), renorm=2), "renorm is 2"),
    "finished": (
        lambda: npu.npu_moe_gating_top_k_softmax_v2(rand(2, 8), finished=torch.ones(2).bool().npu()),
        "finished=a tensor",
    ),
    "normalised": (lambda: npu.npu_moe_gating_top_k(rand(2, 8), 2, renorm=1), "renorm=1 is not simulated"),
    "small groups": (lambda: npu.npu_moe_gating_top_k(rand(2, 8), 2, group_count=4), "group_count is 4"),
    "many groups": (lambda: npu.npu_moe_gating_top_k(rand(2, 512), 2, group_count=128), "128 groups of 4 is 4096"),
    "chosen groups": (lambda: npu.npu_moe_gating_top_k(rand(2, 8), 2, k_group=2), "k_group is 2.*from 1 to 1"),
    "fewer in the groups": (lambda: npu.npu_moe_gating_top_k(rand(2, 8), 5, group_count=2), "k is 5.*from 1 to 4"),
    "other bias": (lambda: npu.npu_moe_gating_top_k(rand(2, 8), 2, bias=rand(8).half()), "dtype of bias is torch.f"),
    "wide experts": (lambda: npu.npu_moe_init_routing_v2(rand(3, 5), ROUTES.long().npu()), "torch.int64.*int32"),
    "fewer routes": (lambda: route(rand(3, 5), active_num=4), "active_num is 4.*6"),
    "running totals": (lambda: route(rand(3, 5), expert_tokens_num_type=0), "expert_tokens_num_type is 0"),
    "no totals": (lambda: route(rand(3, 5), expert_tokens_num_flag=False), "expert_tokens_num_flag is False"),
    "no range": (lambda: route(rand(3, 5), active_expert_range=[]), r"active_expert_range is \[\]"),
    "range beyond": (lambda: route(rand(3, 5), 2, 5), r"active_expert_range is \[2, 5\].*within 4"),
    "expert beyond": (lambda: route(rand(3, 5), 0, 2, expert_num=3), r"an expert is \[3, 3, 3\].*from 0 to 2"),
    "static": (lambda: route(rand(3, 5), quant_mode=0), "quant_mode is 0.*-1 or 1"),
    "quantised twice": (lambda: route(rand(3, 5).to(torch.int8), quant_mode=1), "dtype of x is torch.int8"),
    "smooth scales of rows": (lambda: route(rand(3, 5), scale=rand(3), quant_mode=1), r"scale is \(3,\).*\(4, 5\)"),
    "half scales of rows": (lambda: route(rand(3, 5), scale=rand(3).half()), "dtype of scale is torch.float16"),
    "minus one": (lambda: npu.npu_moe_token_unpermute(rand(2, 5), torch.tensor([-1, 0]).int().npu()), r"index is \[-1"),
    "read twice": (lambda: npu.npu_moe_token_unpermute(rand(2, 5), torch.zeros(2).int().npu()), r"\[0, 0\].*repetit"),
    "wide indices": (lambda: npu.npu_moe_token_unpermute(rand(2, 5), torch.zeros(2).long().npu()), "torch.int64"),
}


@pytest.mark.parametrize(("call", "complaint"), WRONG_ROUTES.values(), ids=WRONG_ROUTES.keys())
def test_routing_refuses_what_documentation_forbids(call: Callable[[], object], complaint: str) -> None:
    with pytest.raises(RuntimeError, match=complaint):
        call()


def look_up(**changed: object) -> object:
    arguments = {"positions": torch.zeros(2).long().npu(), "query": rand(2, 128), "key": rand(2, 64)}
    arguments |= {"cache": rand(4, 64), "head_size": 64} | changed
    return npu.npu_mrope(*arguments.values())


WRONG_LAYERS: dict[str, tuple[Callable[[], object], str]] = {
    "integers": (lambda: npu.npu_rms_norm(rand(2, 8).int(), rand(8).int()), "dtype of the input is torch.int32"),
    "other gamma": (lambda: npu.npu_rms_norm(rand(2, 8), rand(8).half()), "dtype of gamma is torch.float16"),
    "long gamma": (lambda: npu.npu_rms_norm(rand(2, 8), rand(9)), r"shape of gamma is \(9,\)"),
    "residual": (lambda: npu.npu_add_rms_norm(rand(2, 8), rand(1, 8), rand(8)), r"shape of x2 is \(1, 8\)"),
    "odd": (lambda: npu.npu_swiglu(rand(2, 7)), "size of dimension -1 is 7"),
    "head size": (
        lambda: npu.npu_apply_rotary_pos_emb(*(rand(2, 1, 32) for _ in range(4)), "TND"),
        "last dimension of query is 32.*64 or 128",
    ),
    "rotary mode": (
        lambda: npu.npu_apply_rotary_pos_emb(*(rand(2, 1, 64) for _ in range(4)), "TND", "interleave"),
        "rotary_mode is interleave",
    ),
    "layout": (lambda: npu.npu_apply_rotary_pos_emb(*(rand(1, 2, 1, 64) for _ in range(4)), "SBND"), "layout is SBND"),
    "angles": (
        lambda: npu.npu_apply_rotary_pos_emb(rand(2, 3, 64), rand(2, 1, 64), rand(2, 3, 64), rand(2, 1, 64), "TND"),
        "heads of cos is 3",
    ),
    "dimensions": (lambda: npu.npu_rotary_mul(rand(2, 3, 64), rand(2, 3, 64), rand(2, 3, 64)), "of 4 dimensions"),
    "narrow positions": (lambda: look_up(positions=torch.zeros(2).int().npu()), "dtype of positions is torch.int32"),
    "positions beyond": (lambda: look_up(positions=torch.tensor([0, 4]).npu()), r"a position is \[4\].*from 0 to 3"),
    "multimodal positions": (lambda: look_up(positions=torch.zeros(3, 2).long().npu()), "not simulated"),
    "heads in the query": (lambda: look_up(query=rand(2, 2, 64)), r"shape of query is \(2, 2, 64\)"),
    "strided query": (lambda: look_up(query=rand(2, 256)[:, :128]), "query is strided"),
    "other angles": (lambda: look_up(cache=rand(4, 64).half()), "dtype of cos_sin_cache is torch.float16"),
    "more than a head": (lambda: look_up(cache=rand(4, 80)), "rotary dim is 80.*at most head_size"),
    "uneven head": (lambda: look_up(head_size=40), "head_size is 40.*a multiple of 16"),
    "many heads": (
        lambda: look_up(query=rand(2, 64 * 128), cache=rand(4, 128), head_size=128),
        "64 heads.*at most 196608",
    ),
}


@pytest.mark.parametrize(("call", "complaint"), WRONG_LAYERS.values(), ids=WRONG_LAYERS.keys())
def test_layers_refuse_what_documentation_forbids(call: Callable[[], object], complaint: str) -> None:
    with pytest.raises(RuntimeError, match=complaint):
        call()


def attention_arguments() -> tuple[tuple[torch.Tensor, ...], dict[str, object]]:
    cache = Paged([200, 70])
    tensors = rand(10, HEADS, SIZE, dtype=torch.bfloat16), cache.key_cache.flatten(2), cache.value_cache.flatten(2)
    return tensors, cache.arguments | {"actual_seq_lengths": [6, 10]}


CALLS: dict[str, tuple[Callable[..., object], Callable[[], tuple[tuple[object, ...], dict[str, object]]]]] = {
    "npu_rms_norm": (npu.npu_rms_norm, lambda: ((rand(3, 5, 8), rand(5, 8)), {})),
    "npu_add_rms_norm": (npu.npu_add_rms_norm, lambda: ((rand(3, 8), rand(3, 8), rand(8)), {})),
    "npu_swiglu": (npu.npu_swiglu, lambda: ((rand(3, 8, 2), 1), {})),
    "npu_rotary_mul": (npu.npu_rotary_mul, lambda: (tuple(rand(2, 3, 4, 8) for _ in range(3)), {})),
    "npu_apply_rotary_pos_emb": (
        npu.npu_apply_rotary_pos_emb,
        lambda: ((rand(2, 3, 64), rand(2, 1, 64), rand(2, 1, 64), rand(2, 1, 64), "TND"), {}),
    ),
    "attention": (npu.npu_fused_infer_attention_score, attention_arguments),
    "attention with sums": (
        npu.npu_fused_infer_attention_score,
        lambda: (attention_arguments()[0], attention_arguments()[1] | {"softmax_lse_flag": True}),
    ),
    "attention of encoders": (
        npu.npu_fusion_attention,
        lambda: (
            (*(rand(10, heads, SIZE, dtype=torch.bfloat16) for heads in HEADS_OF.values()), HEADS, "TND"),
            {"actual_seq_qlen": [4, 10], "actual_seq_kvlen": [4, 10]},
        ),
    ),
    "npu_grouped_matmul": (
        npu.npu_grouped_matmul,
        lambda: (
            ([rand(4, 8)], [rand(2, 8, 6)]),
            {"group_list": torch.tensor([1, 4], device="npu"), "split_item": 2, "group_type": 0},
        ),
    ),
    "npu_mrope": (
        npu.npu_mrope,
        lambda: ((torch.zeros(2).long().npu(), rand(2, 128), rand(2, 64), rand(4, 64), 64), {}),
    ),
    "npu_moe_gating_top_k_softmax_v2": (npu.npu_moe_gating_top_k_softmax_v2, lambda: ((rand(3, 8).half(),), {"k": 2})),
    "npu_moe_gating_top_k": (npu.npu_moe_gating_top_k, lambda: ((rand(3, 8).half(), 2), {})),
    "npu_moe_init_routing_v2": (
        npu.npu_moe_init_routing_v2,
        lambda: (
            (rand(3, 5), ROUTES.npu()),
            {
                "expert_num": 4,
                "expert_tokens_num_type": 1,
                "expert_tokens_num_flag": True,
                "active_expert_range": [1, 3],
            },
        ),
    ),
    "npu_moe_token_unpermute": (
        npu.npu_moe_token_unpermute,
        lambda: ((rand(6, 5), torch.arange(6, dtype=torch.int32, device="npu"), rand(3, 2)), {}),
    ),
}


@pytest.mark.parametrize(("operator", "make_arguments"), CALLS.values(), ids=CALLS.keys())
def test_results_are_shaped_as_the_wheels_meta_kernels_say(
    operator: Callable[..., object],
    make_arguments: Callable[[], tuple[tuple[object, ...], dict[str, object]]],
    require_meta_shapes: Callable[..., None],
) -> None:
    require_meta_shapes(operator, *make_arguments())


@pytest.mark.usefixtures("errors_told_at_once")
def test_an_operator_without_implementation_names_what_is_missing() -> None:
    with pytest.raises(RuntimeError, match=r"aclnnFastGelu|FastGelu"):
        torch_npu.fast_gelu(rand(4))
