"""W8A8 layers on an NPU, made and post-processed by vLLM's hooks, against the same arithmetic in plain torch.

Products of int8 are exact in all of them. In float32 the rest is computed in the same order, so that results are equal;
in 16 bits, results are rounded once, and the scales of experts before.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from support.operators import operators_of
from support.quantised.comparison import assert_same, random

NPU = "npu:0"
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
INPUTS, OUTPUTS = 64, 96
FORMATS = {"0": False, "1": True}


@pytest.fixture(scope="module", autouse=True)
def _vllm_is_configured() -> Iterator[None]:
    from vllm.config import VllmConfig, set_current_vllm_config

    import vllm_ascend.quantization.compressed_tensors  # noqa: F401
    from vllm_ascend.ops.layout import allow_fractal_nz

    allow_fractal_nz()
    with set_current_vllm_config(VllmConfig()):
        yield


@pytest.fixture(params=TYPES.values(), ids=list(TYPES))
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """As while vLLM makes a model, which is when kernels are chosen."""
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=FORMATS, ids=["ND", "NZ"])
def fractal(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setenv("VLLM_ASCEND_ENABLE_NZ", request.param)
    return FORMATS[request.param]


def integers(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)


def scales(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float32) / 500 + 1e-3


def linear(*, channels: bool = True, static: bool = False, symmetric: bool = True, inputs: int = INPUTS) -> Any:
    """A layer of two matrices with one input, as vLLM makes it for compressed-tensors, with random contents."""
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import CompressedTensorsW8A8Int8

    layer: Any = nn.Module()
    layer.bias = None
    layer.scheme = CompressedTensorsW8A8Int8("channel" if channels else "tensor", static, symmetric)
    with torch.device(NPU):
        layer.scheme.create_weights(layer, [OUTPUTS - 32, 32], inputs, torch.get_default_dtype(), lambda *_: None)
    layer.weight.data.copy_(integers(OUTPUTS, inputs))
    layer.weight_scale.data.copy_(scales(*layer.weight_scale.shape))
    if static:
        layer.input_scale.data.fill_(0.021)
        if not symmetric:
            layer.input_zero_point.data.fill_(-11)
    return layer


@pytest.fixture(autouse=True)
def _there_is_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor import parameter
    from vllm.model_executor.layers import linear as linear_layers

    for module in (parameter, linear_layers):
        monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: 0)
        monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: 1)


def assert_computes(layer: Any, x: torch.Tensor, bias: torch.Tensor | None, expected: torch.Tensor) -> None:
    """That `layer`, once processed, computes `expected`, without the bias, from `x`."""
    layer.scheme.process_weights_after_loading(layer)
    found = layer.scheme.apply_weights(layer, x.to(NPU), None if bias is None else bias.to(NPU))
    assert found.dtype == x.dtype
    assert_same(found, expected if bias is None else expected + bias.float())


def quantised(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row as integers in float64, and its scale."""
    of_row = x.float().abs().amax(-1, keepdim=True) / 127
    return (x.float() / of_row).round().double(), of_row


@pytest.mark.parametrize("channels", [True, False], ids=["channels", "matrices"])
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
def test_dynamic_linear(biased: bool, channels: bool, fractal: bool, dtype: torch.dtype) -> None:
    layer, x = linear(channels=channels), random(2, 5, INPUTS, dtype=dtype)
    weight, scale = layer.weight.data.double().cpu(), layer.weight_scale.data.float().cpu().flatten()
    scale = scale if channels else scale.repeat_interleave(torch.tensor([OUTPUTS - 32, 32]))
    bias = random(OUTPUTS, dtype=dtype) if biased else None
    rows, of_row = quantised(x)
    expected = (rows @ weight.T).float() * scale * of_row
    assert_computes(layer, x, bias, expected)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero point"])
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
def test_static_linear(biased: bool, symmetric: bool, fractal: bool, dtype: torch.dtype) -> None:
    """The reciprocal of the input's scale is rounded to the type of the input, and what it stands for with it."""
    layer, x = linear(static=True, symmetric=symmetric), random(5, INPUTS, dtype=dtype)
    weight, scale = layer.weight.data.double().cpu(), layer.weight_scale.data.float().cpu().flatten()
    bias = random(OUTPUTS, dtype=dtype) if biased else None
    reciprocal = torch.tensor(0.021, dtype=torch.float32).reciprocal().to(dtype).float()
    zero_point = 0 if symmetric else -11
    rows = ((x.float() * reciprocal).round() + zero_point).clamp(-128, 127).double()
    expected = ((rows - zero_point) @ weight.T).float() * (scale * reciprocal.reciprocal())
    assert_computes(layer, x, bias, expected)


def test_a_weight_is_transposed_and_in_the_chosen_format(fractal: bool) -> None:
    from vllm_ascend.ops.layout import is_fractal_nz

    layer = linear()
    weight, scale = layer.weight.data.cpu(), layer.weight_scale.data.cpu()
    layer.scheme.process_weights_after_loading(layer)
    assert is_fractal_nz(layer.weight) == fractal
    assert torch.equal(layer.weight.cpu(), weight.T)
    assert torch.equal(layer.weight_scale.cpu(), scale.flatten())
    assert layer.weight.untyped_storage().nbytes() == weight.nbytes


def test_a_weight_of_broken_blocks_stays_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_ascend.ops.layout import is_fractal_nz

    monkeypatch.setenv("VLLM_ASCEND_ENABLE_NZ", "1")
    layer = linear(inputs=40)
    layer.scheme.process_weights_after_loading(layer)
    assert not is_fractal_nz(layer.weight)


@pytest.mark.parametrize("choice", ["0", "1", "2"])
def test_other_linear_layers_are_in_the_format_if_it_is_chosen_for_all(
    choice: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    import vllm_ascend.ops.layers  # noqa: F401
    from vllm_ascend.ops.layout import is_fractal_nz

    monkeypatch.setenv("VLLM_ASCEND_ENABLE_NZ", choice)
    layer: Any = nn.Linear(INPUTS, OUTPUTS, device=NPU).requires_grad_(False)
    x = random(5, INPUTS, dtype=dtype).to(NPU)
    expected = nn.functional.linear(x, layer.weight, layer.bias)
    method = UnquantizedLinearMethod()
    method.process_weights_after_loading(layer)
    assert is_fractal_nz(layer.weight) == (choice == "2" and dtype != torch.float32)
    assert torch.equal(method.apply(layer, x, layer.bias), expected)


@pytest.mark.parametrize(("choice", "quantization"), [("1", "compressed-tensors"), ("2", None)])
def test_with_sleep_mode_weights_stay_plain(
    choice: str, quantization: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch-npu resizes no storage in another format."""
    from vllm_ascend.ops.layout import choose_formats, in_chosen_format, is_fractal_nz

    monkeypatch.setenv("VLLM_ASCEND_ENABLE_NZ", choice)
    weight = integers(64, 64).to(torch.int8 if quantization else torch.bfloat16).to(NPU)
    for sleeps in (True, False):
        choose_formats(SimpleNamespace(quantization=quantization, enable_sleep_mode=sleeps))
        assert is_fractal_nz(in_chosen_format(weight)) == (not sleeps)
    with pytest.raises(RuntimeError, match="without base format"):
        in_chosen_format(weight).untyped_storage().resize_(0)


def test_a_zero_point_for_each_token_has_no_kernel() -> None:
    with pytest.raises(ValueError, match="activations have a zero point for each token"):
        linear(symmetric=False)


def test_few_operators_compute_a_layer() -> None:
    torch.set_default_dtype(torch.bfloat16)
    x, bias = random(5, INPUTS, dtype=torch.bfloat16).to(NPU), random(OUTPUTS, dtype=torch.bfloat16).to(NPU)
    operators = {
        "npu_dynamic_quant": linear(),
        "npu_quantize": linear(static=True),
    }
    for quantise, layer in operators.items():
        layer.scheme.process_weights_after_loading(layer)
        assert operators_of(lambda: layer.scheme.apply_weights(layer, x, bias)) == [quantise, "npu_quant_matmul"]  # noqa: B023


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_vllms_reload_finds_the_parameters_again(static: bool, fractal: bool) -> None:
    """And fills the memory in which they were before, which graphs have recorded."""
    from vllm.model_executor.model_loader.reload import layerwise

    layer = linear(static=static, symmetric=not static)
    weight = layer.weight.data.cpu()
    given = {name: parameter.data.clone() for name, parameter in layer.named_parameters()}

    class Method(layerwise.QuantizeMethodBase):
        create_weights = apply = None

        def process_weights_after_loading(self, layer: Any) -> None:
            layer.scheme.process_weights_after_loading(layer)

    for parameter in layer.parameters():
        parameter.weight_loader = lambda param, loaded: param.data.copy_(loaded)
    layer.quant_method = Method()
    with torch.device(NPU):
        layerwise.record_metadata_for_reloading(layer)
    layer.quant_method.process_weights_after_loading(layer)
    before = {name: (parameter.data_ptr(), parameter.cpu()) for name, parameter in layer.named_parameters()}
    for parameter in layer.parameters():
        parameter.data.copy_(torch.zeros_like(parameter.data.cpu()))  # torch-npu itself writes into FRACTAL_NZ

    layerwise.initialize_layerwise_reload(layer)
    for name, loaded in given.items():
        parameter = getattr(layer, name)
        parameter.weight_loader(parameter, loaded)
    layerwise.finalize_layerwise_reload(layer, None)
    assert {name: parameter.data_ptr() for name, parameter in layer.named_parameters()} == {
        name: address for name, (address, _) in before.items()
    }
    for name, (_, contents) in before.items():
        assert torch.equal(getattr(layer, name).cpu(), contents), name
    assert torch.equal(layer.weight.cpu(), weight.T)


class Experts(nn.Module):
    """The parameters of a layer of experts, as vLLM's method for compressed-tensors makes them."""

    layer_name = "mlp.experts"

    def __init__(self, count: int, hidden: int, inner: int) -> None:
        super().__init__()
        shapes = {"w13": (count, 2 * inner, hidden), "w2": (count, hidden, inner)}
        for name, shape in shapes.items():
            self.register_parameter(f"{name}_weight", nn.Parameter(integers(*shape).to(NPU), requires_grad=False))
            scale = scales(*shape[:2], 1).to(NPU)
            self.register_parameter(f"{name}_weight_scale", nn.Parameter(scale, requires_grad=False))


CHANNELS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
TOKENS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
STATIC = {"strategy": "tensor", "dynamic": False}
EXPERTS: dict[str, tuple[dict[str, Any], str]] = {
    "static activations": ({"input_activations": {**TOKENS, **STATIC}}, "experts in W8A8 \\(int\\) are not supported"),
    "one scale for each matrix": ({"weights": {**CHANNELS, "strategy": "tensor"}}, "take int8 weights with a scale"),
    "4 bits": ({"weights": {**CHANNELS, "num_bits": 4}}, "experts in W4A8 \\(int\\) are not supported"),
}


def method_of_experts(group: dict[str, Any], **others: Any) -> Any:
    """What the configuration of such a checkpoint makes for a layer of experts."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    from vllm_ascend.quantization.compressed_tensors import NPUCompressedTensorsConfig

    layer: Any = RoutedExperts.__new__(RoutedExperts)
    nn.Module.__init__(layer)
    names = {f"ckpt_{name}_proj_name": f"{name}_proj" for name in ("gate", "up", "down")}
    vars(layer).update(names, moe_config=moe_config(torch.bfloat16, None, 4))
    group = {"targets": ["Linear"], "weights": CHANNELS, "input_activations": TOKENS, **group}
    config = {"format": "int-quantized", "config_groups": {"group_0": group}, **others}
    return NPUCompressedTensorsConfig.from_config(config).get_quant_method(layer, "model.layers.0.mlp.experts")


def test_experts_get_the_method_for_npus() -> None:
    assert type(method_of_experts({})).__name__ == "NPUW8A8Int8MoEMethod"


@pytest.mark.parametrize(("group", "reason"), EXPERTS.values(), ids=EXPERTS.keys())
def test_experts_in_other_schemes_are_refused(group: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=f"model.layers.0.mlp.experts: .*{reason}"):
        method_of_experts(group)


def test_experts_that_compute_in_another_way_are_refused_by_name() -> None:
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    layer = SimpleNamespace(
        layer_name="mlp.experts",
        apply_router_weight_on_input=True,
        activation=MoEActivation.SILU,
        swiglu_limit=None,
        expert_placement_strategy="linear",
    )
    with pytest.raises(ValueError, match=r"mlp\.experts: experts with router weights on the input are not supported"):
        experts_method(SimpleNamespace(has_bias=False)).create_weights(layer)


def test_an_expert_in_two_schemes_is_refused() -> None:
    with pytest.raises(ValueError, match="the projections of an expert have different schemes"):
        method_of_experts({}, ignore=["re:.*down_proj$"])


def config_of(weights: dict[str, Any]) -> Any:
    from vllm_ascend.quantization.compressed_tensors import NPUCompressedTensorsConfig

    group = {"targets": ["Linear"], "weights": {**CHANNELS, **weights}, "input_activations": TOKENS}
    return NPUCompressedTensorsConfig.from_config({"format": "int-quantized", "config_groups": {"group_0": group}})


def test_scales_of_whole_matrices_are_loaded_for_each_part_of_a_layer() -> None:
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear

    with torch.device(NPU):
        sizes, config = (INPUTS, [OUTPUTS, OUTPUTS]), config_of({"strategy": "tensor"})
        layer: Any = MergedColumnParallelLinear(*sizes, bias=False, prefix="gate_up_proj", quant_config=config)
    for part, scale in enumerate((0.25, 0.5)):
        layer.weight_scale.weight_loader(layer.weight_scale, torch.tensor([scale]), part)
        layer.weight.weight_loader(layer.weight, integers(OUTPUTS, INPUTS), part)
    layer.quant_method.process_weights_after_loading(layer)
    assert layer.weight_scale.tolist() == [0.25] * OUTPUTS + [0.5] * OUTPUTS


def test_a_layer_with_longer_rows_than_a_product_takes_is_refused_by_name() -> None:
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear

    named = {"bias": False, "quant_config": config_of({})}
    with pytest.raises(ValueError, match=r"gate_up_proj has 80000 outputs on a device, .* at most 65535: divide"):
        MergedColumnParallelLinear(INPUTS, [40000, 40000], prefix="gate_up_proj", **named)
    with pytest.raises(ValueError, match=r"down_proj has 70000 inputs on a device, .* at most 65535: divide"):
        RowParallelLinear(70000, OUTPUTS, prefix="down_proj", **named)


def experts_method(moe: Any) -> Any:
    from vllm_ascend.quantization.compressed_tensors import NPUW8A8Int8MoEMethod

    return NPUW8A8Int8MoEMethod(None, None, moe)


def moe_config(dtype: torch.dtype, own: tuple[int, int] | None, count: int) -> Any:
    first, end = own or (0, count)
    rank = {"ep_size": count // (end - first), "ep_rank": first // (end - first)}
    return SimpleNamespace(
        in_dtype=dtype, use_ep=own is not None, num_experts=count, num_local_experts=end - first, **rank
    )


@pytest.mark.parametrize("own", [None, (0, 4), (12, 16)], ids=str)
@pytest.mark.parametrize("tokens", [1, 40])
def test_experts(tokens: int, own: tuple[int, int] | None, fractal: bool, dtype: torch.dtype) -> None:
    from vllm_ascend.ops.layout import is_fractal_nz

    count, hidden, inner = 16, 64, 48
    first, end = own or (0, count)
    layer: Any = Experts(end - first, hidden, inner)
    x = random(tokens, hidden, dtype=dtype)
    weights, experts = random(tokens, count).softmax(-1).topk(3)
    expected = torch.zeros(tokens, hidden, dtype=torch.float32)
    for token in range(tokens):
        for weight, expert in zip(weights[token], experts[token].tolist(), strict=True):
            if first <= expert < end:
                expected[token] += weight * expert_of(layer, expert - first, x[token], dtype)

    method = experts_method(moe_config(dtype, own, count))
    method.process_weights_after_loading(layer)
    assert is_fractal_nz(layer.w13_weight) == fractal
    found = method.apply(layer, x.to(NPU), weights.to(NPU), experts.int().to(NPU))
    assert found.dtype == dtype
    torch.testing.assert_close(found.cpu().float(), expected, **tolerance(dtype))


def tolerance(dtype: torch.dtype) -> dict[str, Any]:
    return {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 4e-2, "atol": 4e-2}


def expert_of(layer: Any, expert: int, row: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    of_experts = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32

    def product(row: torch.Tensor, name: str) -> torch.Tensor:
        integers, of_row = quantised(row)
        weight = getattr(layer, f"{name}_weight").data[expert].double().cpu()
        scale = getattr(layer, f"{name}_weight_scale").data[expert].flatten().to(of_experts).float().cpu()
        result: torch.Tensor = ((weight @ integers).float() * scale * of_row).to(dtype).float()
        return result

    gate, up = product(row, "w13").chunk(2)
    return product((nn.functional.silu(gate) * up).to(dtype), "w2")


def test_few_operators_compute_experts() -> None:
    """In bfloat16: as many as without quantisation, and one that quantises between the two products."""
    layer, x = Experts(16, 64, 48), random(9, 64, dtype=torch.bfloat16).to(NPU)
    weights, experts = random(9, 16).softmax(-1).topk(3)
    method = experts_method(moe_config(torch.bfloat16, None, 16))
    method.process_weights_after_loading(layer)
    names = operators_of(lambda: method.apply(layer, x, weights.to(NPU), experts.int().to(NPU)))
    products = ["npu_grouped_matmul", "npu_swiglu", "npu_dynamic_quant", "npu_grouped_matmul"]
    assert [name for name in names if name.startswith("npu_")] == [
        "npu_moe_init_routing_v2",
        *products,
        "npu_moe_token_unpermute",
    ]
