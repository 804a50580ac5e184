"""Quantised operators: exact products, scales in single precision, strict as CANN's sources and documentation are."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch_npu
from torch.npu import NPUGraph

npu = torch.ops.npu
FRACTAL_NZ = torch_npu.Format.FRACTAL_NZ
ROWS, DEPTH, COLUMNS = 5, 48, 40


@pytest.fixture(autouse=True)
def internal_formats() -> Iterator[None]:
    torch.npu.config.allow_internal_format = True
    yield
    torch.npu.config.allow_internal_format = False


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, device="npu").to(dtype)


def int8(*shape: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8).npu()


def fractal(tensor: torch.Tensor) -> torch.Tensor:
    return torch_npu.npu_format_cast(tensor.contiguous(), FRACTAL_NZ)


def integers(*values: int) -> torch.Tensor:
    return torch.tensor(values, device="npu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rows_are_quantised_by_their_largest_value(dtype: torch.dtype) -> None:
    x = rand(3, 7, 16, dtype=dtype)
    x[0, 0] = 0
    quantised, scales = npu.npu_dynamic_quant(x, dst_type=torch.int8)
    single = x.cpu().float()
    assert torch.equal(scales.cpu(), single.abs().amax(-1) / 127)
    expected = (single / scales.cpu().unsqueeze(-1)).nan_to_num(0).round()
    assert torch.equal(quantised.cpu().float(), expected)
    assert quantised.abs().amax(-1).cpu().flatten().tolist() == [0] + [127] * 20


def test_halves_go_to_the_even_integer() -> None:
    x = torch.tensor([[127, 0.5, 1.5, -2.5, -3.5]]).half().npu()
    assert npu.npu_dynamic_quant(x)[0].tolist() == [[127, 0, 2, -2, -4]]


def test_groups_of_rows_have_smooth_scales_of_their_own() -> None:
    x, smooth = rand(5, 16, dtype=torch.bfloat16), rand(2, 16, dtype=torch.bfloat16)
    for found, part, row in (
        (npu.npu_dynamic_quant(x, smooth_scales=smooth[0]), x, smooth[0]),
        (npu.npu_dynamic_quant(x, smooth_scales=smooth, group_index=integers(2, 5).int()), x[:2], smooth[0]),
        (npu.npu_dynamic_quant(x, smooth_scales=smooth, group_index=integers(0, 5).int()), x, smooth[1]),
    ):
        smoothed = part.float() * row.float()
        assert torch.equal(found[1][: len(part)], smoothed.abs().amax(-1) / 127)
        assert torch.equal(found[0][: len(part)].float(), (smoothed / found[1][: len(part), None]).round())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_static_quantising(dtype: torch.dtype) -> None:
    x, scales = rand(2, 3, COLUMNS, dtype=dtype), rand(COLUMNS, dtype=dtype) * 60
    zeros = (rand(COLUMNS) * 20).round().to(dtype)
    call = torch.qint8, -1, False
    for scale, zero in ((scales, zeros), (scales[:1], zeros[:1]), (scales.view(1, 1, -1), zeros.view(1, 1, -1))):
        expected = (x.float() * scale.float() + zero.float()).round().clamp(-128, 127)
        assert torch.equal(npu.npu_quantize(x, scale, zero, *call).float(), expected)
    expected = (x.float() * scales.float()).round().clamp(-128, 127)
    assert torch.equal(npu.npu_quantize(x, scales, None, *call).float(), expected)


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_products_of_experts_become_int8_again(left: bool) -> None:
    x, weight_scale, by_token = int8(ROUTED + 1, 128).int() * 100, rand(EXPERTS, 128) / 99, rand(ROUTED + 1)
    arguments = {"weight_scale": weight_scale, "activation_scale": by_token, "group_index": integers(*LENGTHS)}
    arguments |= {"activate_left": left, "quant_mode": 1}
    scaled = x[:ROUTED].float() * by_row(weight_scale) * by_token[:ROUTED, None]
    gate, up = scaled.chunk(2, -1) if left else scaled.chunk(2, -1)[::-1]
    activated = torch.nn.functional.silu(gate) * up
    for smooth in (None, rand(EXPERTS, 64)):
        expected = activated if smooth is None else activated * by_row(smooth)
        quantised, scales = npu.npu_dequant_swiglu_quant(x, quant_scale=smooth, **arguments)
        torch.testing.assert_close(scales[:ROUTED], expected.abs().amax(1) / 127)
        restored = quantised[:ROUTED] * scales[:ROUTED, None]
        assert ((restored - expected).abs() <= scales[:ROUTED, None] * 0.5001).all()
        assert scales[ROUTED:].isnan().all()


Weight = Callable[[torch.Tensor], torch.Tensor]
WEIGHTS: dict[str, Weight] = {
    "plain": lambda matrix: matrix,
    "transposed": lambda matrix: matrix.t().contiguous().t(),
    "fractal": fractal,
}


@pytest.mark.parametrize("prepare", WEIGHTS.values(), ids=WEIGHTS.keys())
def test_products_by_token(prepare: Weight) -> None:
    x, matrix, scale, by_token = int8(ROWS, DEPTH), int8(DEPTH, COLUMNS), rand(COLUMNS), rand(ROWS)
    product = (x.cpu().long() @ matrix.cpu().long()).npu()
    call = {"pertoken_scale": by_token, "output_dtype": torch.bfloat16}
    assert torch.equal(
        npu.npu_quant_matmul(x, prepare(matrix), scale, **call),
        (product.float() * scale * by_token[:, None]).bfloat16(),
    )
    for bias in (int8(COLUMNS).int() * 999, rand(COLUMNS), rand(COLUMNS, dtype=torch.bfloat16)):
        whole = (product + bias if bias.dtype == torch.int32 else product).float()
        expected = whole * scale * by_token[:, None] + (0 if bias.dtype == torch.int32 else bias.float())
        assert torch.equal(npu.npu_quant_matmul(x, prepare(matrix), scale, bias=bias, **call), expected.bfloat16())


def test_products_of_a_static_scale() -> None:
    """With bfloat16 the scale is float32, with float16 it has 19 bits; int32 is not scaled."""
    x, matrix, scale = int8(ROWS, DEPTH), fractal(int8(DEPTH, COLUMNS)), rand(COLUMNS) / 512
    bias = int8(COLUMNS).int() * 99
    whole = (x.cpu().long() @ matrix.cpu().long() + bias.cpu()).npu()
    call = {"bias": bias, "output_dtype": torch.bfloat16}
    assert torch.equal(npu.npu_quant_matmul(x, matrix, scale, **call), (whole.float() * scale).bfloat16())
    found = npu.npu_quant_matmul(x, matrix, scale, bias=bias, output_dtype=torch.int32)
    assert torch.equal(found, whole.int())
    coarse = (scale.cpu().view(torch.int32) & ~0x1FFF).view(torch.float32).npu()
    checkpoint = scale.cpu().view(torch.int32).long().npu()  # as ModelSlim writes it for float16
    for parameter in (scale, npu.npu_trans_quant_param(scale), checkpoint):
        found = npu.npu_quant_matmul(x, matrix, parameter, bias=bias, output_dtype=torch.float16)
        assert torch.equal(found, (whole.float() * coarse).half())
    offset = (rand(COLUMNS) * 50).round()
    for arguments in ({"scale": scale, "offset": offset}, {"scale": npu.npu_trans_quant_param(scale, offset)}):
        found = npu.npu_quant_matmul(x, matrix, bias=bias, **arguments)
        assert torch.equal(found.float(), ((whole.float() * coarse).round() + offset).clamp(-128, 127))


def test_the_parameter_of_a_matrix_unit() -> None:
    found = npu.npu_trans_quant_param(torch.tensor([1.0001, -2]).npu(), torch.tensor([-3.5, 999]).npu())
    flag, scales = 1 << 46, (0x3F800000, 0xC0000000)
    assert found.tolist() == [flag | (-4 & 0x1FF) << 37 | scales[0], flag | 255 << 37 | scales[1]]


def test_products_of_batches() -> None:
    x, matrices, scale = int8(3, ROWS, DEPTH), int8(3, DEPTH, COLUMNS), rand(1)
    bias = int8(3, 1, COLUMNS).int()
    found = npu.npu_quant_matmul(x, matrices.mT.contiguous().mT, scale, bias=bias, output_dtype=torch.bfloat16)
    whole = (x.cpu().long() @ matrices.cpu().long() + bias.cpu()).npu()
    assert torch.equal(found, (whole.float() * scale).bfloat16())


def test_sums_beyond_single_precision_are_exact() -> None:
    x = torch.full((1, 4001), 127, dtype=torch.int8).npu()
    found = npu.npu_quant_matmul(x, torch.ones(4001, 1).to(torch.int8).npu() * 127, rand(1), output_dtype=torch.int32)
    assert found.tolist() == [[4001 * 127 * 127]]


def test_single_precision_is_for_comparisons_only(monkeypatch: pytest.MonkeyPatch) -> None:
    x, matrix, scale = rand(ROWS, DEPTH), int8(DEPTH, COLUMNS), rand(COLUMNS)
    monkeypatch.delenv("CANN_SIM_FP32", raising=False)
    with pytest.raises(RuntimeError, match=r"dtype of x is torch.float32.*float16, bfloat16"):
        npu.npu_dynamic_quant(x)
    monkeypatch.setenv("CANN_SIM_FP32", "1")
    quantised, by_token = npu.npu_dynamic_quant(x)
    arguments = quantised, matrix, scale
    found = npu.npu_quant_matmul(*arguments, pertoken_scale=by_token, bias=scale, output_dtype=torch.float32)
    product = (quantised.cpu().long() @ matrix.cpu().long()).npu()
    assert torch.equal(found, product.float() * scale * by_token[:, None] + scale)
    monkeypatch.delenv("CANN_SIM_FP32")
    with pytest.raises(RuntimeError, match=r"output dtype is torch.float32.*int8, float16, bfloat16, int32"):
        npu.npu_quant_matmul(*arguments, output_dtype=torch.float32)


def test_a_graph_reads_a_fractal_weight_at_each_replay() -> None:
    x, matrix, scale = rand(ROWS, DEPTH, dtype=torch.bfloat16), int8(DEPTH, COLUMNS), rand(COLUMNS)
    weight, graph = fractal(matrix), NPUGraph()

    def layer() -> torch.Tensor:
        quantised, by_token = npu.npu_dynamic_quant(x)
        product: torch.Tensor = npu.npu_quant_matmul(
            quantised, weight, scale, pertoken_scale=by_token, output_dtype=torch.bfloat16
        )
        return product

    with torch.npu.graph(graph):
        captured = layer()
    for changed in (matrix, int8(DEPTH, COLUMNS)):
        x.normal_()
        weight.copy_(changed)
        graph.replay()
        assert torch.equal(captured, layer())
        assert captured.abs().sum() > 0


EXPERTS, LENGTHS = 3, [2, 0, 2]  # and one row behind the last group
ROUTED = sum(LENGTHS)


def grouped(x: torch.Tensor, weight: torch.Tensor, **arguments: object) -> torch.Tensor:
    """Calls the operator in the way of inference engines."""
    groups = {"group_list": arguments.pop("group_list", integers(*LENGTHS)), "group_list_type": 1}
    lists = {name: [value] if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    (found,) = npu.npu_grouped_matmul([x], [weight], split_item=2, group_type=0, **groups | lists)
    product: torch.Tensor = found
    return product


def products_of_groups(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    parts = x[:ROUTED].cpu().long().split(LENGTHS)
    return torch.cat([part @ matrix for part, matrix in zip(parts, weight.cpu().long(), strict=True)]).npu()


def by_row(of_experts: torch.Tensor) -> torch.Tensor:
    return of_experts.cpu().repeat_interleave(torch.tensor(LENGTHS), 0).npu()


EXPERT_WEIGHTS: dict[str, Weight] = {
    "plain": lambda matrices: matrices,
    "transposed": lambda matrices: matrices.mT.contiguous().mT,
    "fractal": fractal,
}


@pytest.mark.parametrize("prepare", EXPERT_WEIGHTS.values(), ids=EXPERT_WEIGHTS.keys())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_of_experts(dtype: torch.dtype, prepare: Weight) -> None:
    x, weight, by_token = int8(ROUTED + 1, DEPTH), int8(EXPERTS, DEPTH, 64), rand(ROUTED + 1)
    scale = rand(EXPERTS, 64, dtype={torch.bfloat16: torch.bfloat16, torch.float16: torch.float32}[dtype]) / 512
    call = {"scale": scale, "output_dtype": dtype}
    found = grouped(x, prepare(weight), per_token_scale=by_token, **call)
    product = products_of_groups(x, weight)
    assert torch.equal(found[:ROUTED], (product.float() * by_row(scale.float()) * by_token[:ROUTED, None]).to(dtype))
    assert found[ROUTED:].isnan().all()
    bias = int8(EXPERTS, 64).int() * 9
    found = grouped(x, prepare(weight), bias=bias, **call)
    assert torch.equal(found[:ROUTED], ((product + by_row(bias)).float() * by_row(scale.float())).to(dtype))


def test_products_of_experts_that_are_scaled_later() -> None:
    x, weight = int8(ROUTED + 1, DEPTH), int8(EXPERTS, DEPTH, 64)
    found = grouped(x, fractal(weight), output_dtype=torch.int32)
    assert torch.equal(found[:ROUTED].long(), products_of_groups(x, weight))
    assert (found[ROUTED:] == 2**31 - 1).all()
    scale = npu.npu_trans_quant_param((rand(1, 64) / 512).abs()).repeat(EXPERTS, 1)
    found = grouped(x, weight, scale=scale)
    coarse = (scale.cpu() & 0xFFFFFFFF).int().view(torch.float32).npu()
    expected = (products_of_groups(x, weight).float() * by_row(coarse)).round().clamp(-128, 127)
    assert torch.equal(found[:ROUTED].float(), expected)


def packed_experts(depth: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns int4 numbers, and the same in FRACTAL_NZ as checkpoints become it: two in a byte, seen as int32."""
    numbers = torch.randint(-8, 8, (EXPERTS, depth, columns), dtype=torch.int8)
    low, high = numbers[..., ::2], numbers[..., 1::2]
    return numbers, fractal((high << 4 | low & 15).npu()).view(torch.int32)


@pytest.mark.parametrize("parts", [1, 2])
def test_products_of_experts_in_four_bits(parts: int) -> None:
    x, by_token = int8(ROUTED + 1, 128), rand(ROUTED + 1)
    numbers, weight = packed_experts(128, 64)
    single = torch.rand(EXPERTS, parts, 64) / 512
    scale = single.view(torch.int32).long().npu()
    coarse = (single.view(torch.int32) & ~0x1FFF).view(torch.float32).double().repeat_interleave(128 // parts, 1)
    scaled = numbers.double() * coarse
    bias = (8 * scaled.sum(1)).float().npu()
    call = {"scale": scale, "bias": bias, "per_token_scale": by_token, "output_dtype": torch.bfloat16}
    parts_of_x = x[:ROUTED].cpu().double().split(LENGTHS)
    plain = torch.cat([part @ matrix for part, matrix in zip(parts_of_x, scaled, strict=True)])
    expected = plain * by_token[:ROUTED, None].cpu()
    for each in (weight, (weight + 0)):  # in FRACTAL_NZ, and not
        found = grouped(x, each, **call)
        torch.testing.assert_close(found[:ROUTED].cpu().double(), expected, rtol=2**-8, atol=1e-3)
        assert found[ROUTED:].isnan().all()


def product(**changed: object) -> object:
    arguments = {"x1": int8(ROWS, DEPTH), "x2": int8(DEPTH, COLUMNS), "scale": rand(COLUMNS)}
    return npu.npu_quant_matmul(**{**arguments, "output_dtype": torch.bfloat16, **changed})


WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "one dimension": (lambda: npu.npu_dynamic_quant(rand(8).half()), r"shape of x is \(8,\).*2 to 8 dimensions"),
    "integers": (lambda: npu.npu_dynamic_quant(int8(2, 8)), "dtype of x is torch.int8"),
    "other smooth scales": (
        lambda: npu.npu_dynamic_quant(rand(2, 8).half(), smooth_scales=rand(8)),
        "smooth_scales is",
    ),
    "groups without scales": (
        lambda: npu.npu_dynamic_quant(rand(2, 8).half(), group_index=integers(2)),
        "group_index is given, but must be absent",
    ),
    "groups of fewer rows": (
        lambda: npu.npu_dynamic_quant(rand(3, 8).half(), smooth_scales=rand(1, 8).half(), group_index=integers(2)),
        r"group_index is \[2\].*end with the number of rows, 3",
    ),
    "four bits": (lambda: npu.npu_dynamic_quant(rand(2, 8).half(), dst_type=torch.quint4x2), "output dtype is 16"),
    "by tensor": (lambda: npu.npu_dynamic_quant(rand(2, 8).half(), quant_mode="pertensor"), "quant_mode is pertensor"),
    "of fractal": (lambda: npu.npu_dynamic_quant(fractal(rand(16, 16).half())), "format of input is FRACTAL_NZ"),
    "half scales": (lambda: npu.npu_trans_quant_param(rand(8).half()), "dtype of scale is torch.float16"),
    "rounded scales": (lambda: npu.npu_trans_quant_param(rand(8), round_mode=1), "round_mode=1 is not simulated"),
    "floats": (lambda: product(x1=rand(ROWS, DEPTH)), "dtype of x1 is torch.float32"),
    "packed": (lambda: product(x2=int8(DEPTH, 5).int()), "dtype of x2 is torch.int32"),
    "other depth": (lambda: product(x2=int8(DEPTH + 1, COLUMNS)), r"shape of x2 is \(49, 40\).*48, n"),
    "no rows": (lambda: product(x1=int8(0, DEPTH)), r"shape of x1 is \(0, 48\).*none of them 0"),
    "a part": (lambda: product(x2=int8(DEPTH, 2 * COLUMNS)[:, :COLUMNS]), r"x2 is strided \(80, 1\)"),
    "wide": (lambda: product(x2=int8(DEPTH, 65536), scale=rand(1)), "inner dimension of x2 is 65536.*at most 65535"),
    "fractal x1": (lambda: product(x1=fractal(int8(ROWS, DEPTH))), "format of x1 is FRACTAL_NZ"),
    "transposed fractal": (lambda: product(x2=fractal(int8(COLUMNS, DEPTH)).t()), "FRACTAL_NZ, is transposed"),
    "a part of fractal": (lambda: product(x2=fractal(int8(2 * DEPTH, COLUMNS))[:DEPTH]), "FRACTAL_NZ, is a part"),
    "thin fractal": (lambda: product(x2=fractal(int8(DEPTH, 1)), scale=rand(1)), r"FRACTAL_NZ, is \(48, 1\)"),
    "scale as a column": (lambda: product(scale=rand(COLUMNS, 1)), r"shape of scale is \(40, 1\).*\(40,\) or \(1,\)"),
    "half scale": (lambda: product(scale=rand(COLUMNS).half()), "dtype of scale is torch.float16"),
    "brain scale for half": (
        lambda: product(scale=rand(COLUMNS).bfloat16(), pertoken_scale=rand(ROWS), output_dtype=torch.float16),
        "dtype of scale is torch.bfloat16",
    ),
    "parameter for bfloat16": (lambda: product(scale=npu.npu_trans_quant_param(rand(COLUMNS))), "dtype of scale is t"),
    "tokens of int8": (lambda: product(pertoken_scale=rand(ROWS), output_dtype=None), "output dtype is torch.int8"),
    "half tokens": (lambda: product(pertoken_scale=rand(ROWS).half()), "dtype of pertoken_scale is torch.float16"),
    "other tokens": (lambda: product(pertoken_scale=rand(ROWS + 1)), r"shape of pertoken_scale is \(6,\).*\(5,\)"),
    "half bias": (lambda: product(bias=rand(COLUMNS).half()), "dtype of bias is torch.float16"),
    "float bias of half": (
        lambda: product(bias=rand(COLUMNS), output_dtype=torch.float16),
        "dtype of bias is torch.float32",
    ),
    "bias of 2 dimensions": (lambda: product(bias=rand(1, COLUMNS)), r"shape of bias is \(1, 40\)"),
    "offset": (lambda: product(offset=rand(COLUMNS)), "offset is given for torch.bfloat16"),
    "groups": (lambda: product(group_sizes=[1, 128, 128]), "group_sizes=.*not simulated"),
}


def experts(**changed: object) -> object:
    arguments = {"x": int8(ROUTED, DEPTH), "weight": int8(EXPERTS, DEPTH, 64), "scale": rand(EXPERTS, 64).bfloat16()}
    return grouped(**{**arguments, "output_dtype": torch.bfloat16, **changed})


def packed(**changed: object) -> object:
    arguments = {"x": int8(ROUTED, 64), "weight": packed_experts(64, 64)[1], "per_token_scale": rand(ROUTED)}
    arguments |= {"scale": torch.zeros(EXPERTS, 1, 64).long().npu(), "bias": rand(EXPERTS, 64)}
    return grouped(**{**arguments, "output_dtype": torch.bfloat16, **changed})


def swiglu(columns: int = 128, **changed: object) -> object:
    x = torch.zeros(ROUTED, columns, dtype=torch.int32, device="npu")
    arguments = {"weight_scale": rand(EXPERTS, columns), "activation_scale": rand(ROUTED), "quant_mode": 1}
    return npu.npu_dequant_swiglu_quant(x, **{**arguments, "group_index": integers(*LENGTHS), **changed})


STATIC = torch.qint8, -1, False

WRONG |= {
    "dividing": (lambda: npu.npu_quantize(rand(2, 8), rand(8), None, torch.qint8), "div_mode=True, axis=1 is not sim"),
    "integers at rest": (lambda: npu.npu_quantize(int8(2, 8), rand(8), None, *STATIC), "dtype of input is torch.int8"),
    "single scales of halves": (
        lambda: npu.npu_quantize(rand(2, 8).half(), rand(8), None, *STATIC),
        "dtype of scales is torch.float32.*float16",
    ),
    "fewer scales": (lambda: npu.npu_quantize(rand(2, 8), rand(4), None, *STATIC), r"shape of scales is \(4,\)"),
    "integer zero": (
        lambda: npu.npu_quantize(rand(2, 8), rand(8), int8(8), *STATIC),
        "dtype of zero_points is torch.int8.*float32",
    ),
    "one zero": (lambda: npu.npu_quantize(rand(2, 8), rand(8), rand(1), *STATIC), r"shape of zero_points is \(1,\)"),
    "unsigned": (lambda: npu.npu_quantize(rand(2, 8), rand(8), None, torch.quint8, -1, False), "output dtype is 13"),
    "uneven halves": (lambda: swiglu(96), "last dimension of x is 96.*twice a multiple of 64"),
    "not scaled": (lambda: swiglu(weight_scale=None), "weight_scale is absent"),
    "flat scale": (lambda: swiglu(weight_scale=rand(128)), r"weight_scale is \(128,\).*\(3, 128\)"),
    "groups beyond": (lambda: swiglu(group_index=integers(3, 3, 0)), r"group_index is \[3, 3, 0\].*at most 4"),
    "one group": (lambda: swiglu(group_index=None), "group_index absent.*not simulated"),
    "experts in floats": (lambda: experts(weight=rand(EXPERTS, DEPTH, 64)), "dtype of weight is torch.float32.*int8"),
    "fractal rows": (lambda: experts(x=fractal(int8(ROUTED, DEPTH))), "format of x is FRACTAL_NZ"),
    "float32 in fractal": (
        lambda: grouped(rand(ROUTED, DEPTH), fractal(rand(EXPERTS, DEPTH, 64))),
        "dtype of weight, which is in FRACTAL_NZ, is torch.float32",
    ),
    "transposed experts in fractal": (
        lambda: experts(weight=fractal(int8(EXPERTS, 64, DEPTH)).mT),
        "FRACTAL_NZ, is transposed",
    ),
    "padded experts": (
        lambda: experts(weight=fractal(int8(EXPERTS, DEPTH, 48)), scale=rand(EXPERTS, 48).bfloat16()),
        r"FRACTAL_NZ, is \(3, 48, 48\).*multiples of 16 and 32",
    ),
    "no scale of experts": (lambda: experts(scale=None), "scale is absent"),
    "single scale of experts": (lambda: experts(scale=rand(EXPERTS, 64)), "dtype of scale is torch.float32.*bfloat16"),
    "one scale of experts": (lambda: experts(scale=rand(64).bfloat16()), r"shape of scale is \(64,\).*\(3, 64\)"),
    "scaled int32": (lambda: experts(output_dtype=torch.int32), "scale is given for int32"),
    "int8 from fractal": (
        lambda: experts(weight=fractal(int8(EXPERTS, DEPTH, 64)), output_dtype=None),
        "output dtype is torch.int8",
    ),
    "float bias of experts": (lambda: experts(bias=rand(EXPERTS, 64)), "dtype of bias is torch.float32"),
    "column of tokens": (lambda: experts(per_token_scale=rand(ROUTED, 1)), r"per_token_scale is \(4, 1\)"),
    "activation": (lambda: experts(act_type=1), "act_type=1 is not simulated"),
    "quantised floats": (
        lambda: grouped(rand(ROUTED, DEPTH), rand(EXPERTS, DEPTH, 64), scale=rand(EXPERTS, 64)),
        "scale is given for torch.float32",
    ),
    "wide blocks of int4": (
        lambda: packed(weight=fractal(torch.zeros(EXPERTS, 64, 16).int().npu())),
        "width of the blocks.*is 64.*cast it to FRACTAL_NZ in int8",
    ),
    "totals for int4": (
        lambda: packed(group_list_type=0, group_list=integers(1, 2, 3)),
        "group_list_type is 0.*1 for weights in int4",
    ),
    "flat scale of int4": (lambda: packed(scale=torch.zeros(EXPERTS, 64).long().npu()), r"scale is \(3, 64\).*parts"),
    "single scale of int4": (lambda: packed(scale=rand(EXPERTS, 1, 64)), "dtype of scale is torch.float32"),
    "no bias of int4": (lambda: packed(bias=None), "bias is absent"),
    "depth of int4": (lambda: packed(x=int8(ROUTED, 48), weight=packed_experts(48, 64)[1]), "depth of x is 48.*of 64"),
}


@pytest.mark.parametrize(("call", "complaint"), WRONG.values(), ids=WRONG.keys())
def test_what_a_device_refuses_is_refused(call: Callable[[], object], complaint: str) -> None:
    with pytest.raises(RuntimeError, match=complaint):
        call()


CALLS: dict[str, tuple[Callable[..., object], Callable[[], tuple[tuple[object, ...], dict[str, object]]]]] = {
    "npu_dynamic_quant": (npu.npu_dynamic_quant, lambda: ((rand(2, 3, 16).half(),), {})),
    "npu_quantize": (npu.npu_quantize, lambda: ((rand(2, 3, 16).half(), rand(16).half(), None, *STATIC), {})),
    "npu_dequant_swiglu_quant": (
        npu.npu_dequant_swiglu_quant,
        lambda: (
            (torch.zeros(ROUTED, 128, dtype=torch.int32, device="npu"),),
            {"weight_scale": rand(EXPERTS, 128), "activation_scale": rand(ROUTED), "quant_mode": 1}
            | {"group_index": integers(*LENGTHS)},
        ),
    ),
    "npu_trans_quant_param": (npu.npu_trans_quant_param, lambda: ((rand(1, 8), rand(1, 8)), {})),
    "npu_quant_matmul": (
        npu.npu_quant_matmul,
        lambda: (
            (int8(2, ROWS, DEPTH), int8(DEPTH, COLUMNS), rand(COLUMNS)),
            {"bias": rand(COLUMNS), "output_dtype": torch.bfloat16},
        ),
    ),
    "experts": (
        npu.npu_grouped_matmul,
        lambda: (
            ([int8(ROUTED, DEPTH)], [int8(EXPERTS, DEPTH, 64)]),
            {"group_list": integers(*LENGTHS), "split_item": 2, "group_type": 0, "group_list_type": 1}
            | {"output_dtype": torch.int32},
        ),
    ),
    "packed experts": (
        npu.npu_grouped_matmul,
        lambda: (
            ([int8(ROUTED, 64)], [packed_experts(64, 64)[1] + 0]),
            {"group_list": integers(*LENGTHS), "split_item": 2, "group_type": 0, "group_list_type": 1}
            | {"scale": [torch.zeros(EXPERTS, 1, 64).long().npu()], "bias": [rand(EXPERTS, 64)]}
            | {"per_token_scale": [rand(ROUTED)], "output_dtype": torch.float16},
        ),
    ),
}


@pytest.mark.parametrize(("operator", "make_arguments"), CALLS.values(), ids=CALLS.keys())
def test_results_are_shaped_as_the_wheels_meta_kernels_say(
    operator: Callable[..., object],
    make_arguments: Callable[[], tuple[tuple[object, ...], dict[str, object]]],
    require_meta_shapes: Callable[..., None],
) -> None:
    require_meta_shapes(operator, *make_arguments())
