"""Layers of ModelSlim's checkpoints on an NPU, loaded by vLLM's layers, against their arithmetic in plain torch.

Products of int8 are exact in all of them. In float32 the rest is computed in the same order, so that results are equal;
in 16 bits, results are rounded once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from support.quantised.comparison import assert_same, random
from support.quantised.files import tensors_of
from support.quantised.kinds import make_quantised
from support.vllm import checkpoints
from vllm_ascend.quantization.description import Description, MixedKinds

NPU = "npu:0"
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MLP, ATTENTION = "model.layers.0.mlp", "model.layers.0.self_attn"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module", autouse=True)
def _vllm_is_configured() -> Iterator[None]:
    from vllm.config import VllmConfig, set_current_vllm_config

    from vllm_ascend.ops.layout import allow_fractal_nz

    allow_fractal_nz(True)
    with set_current_vllm_config(VllmConfig()):
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(params=TYPES.values(), ids=list(TYPES))
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


class Ranks:
    """As whose rank, of how many, vLLM's layers are made."""

    rank, size = 0, 1


@pytest.fixture(autouse=True)
def ranks(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    from vllm.model_executor import parameter
    from vllm.model_executor.layers import linear, vocab_parallel_embedding

    ranks = Ranks()
    for module in (parameter, linear, vocab_parallel_embedding):
        monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: ranks.rank)
        monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: ranks.size)
    return ranks


def config(checkpoint: str) -> Any:
    from vllm.model_executor.models.llama import LlamaForCausalLM

    from vllm_ascend.quantization.modelslim import ModelSlimConfig

    made = ModelSlimConfig()
    made.maybe_update_config(checkpoint)
    made.packed_modules_mapping.update(LlamaForCausalLM.packed_modules_mapping)
    return made


def tensors(checkpoint: str, layer: str) -> Tensors:
    found = dict(tensors_of(Path(checkpoint)))
    return {name.removeprefix(f"{layer}."): each for name, each in found.items() if name.startswith(f"{layer}.")}


def gate_up(checkpoint: str, described: Description | None = None) -> Any:
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear

    options: dict[str, Any] = {"bias": False, "prefix": f"{MLP}.gate_up_proj", "described": described}
    layer = made(MergedColumnParallelLinear, checkpoint, 256, [512, 512], **options)
    for shard, name in enumerate(("gate_proj", "up_proj")):
        for part, tensor in tensors(checkpoint, f"{MLP}.{name}").items():
            parameter = getattr(layer, part)
            parameter.weight_loader(parameter, tensor, shard)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def down(checkpoint: str) -> Any:
    from vllm.model_executor.layers.linear import RowParallelLinear

    options: dict[str, Any] = {"bias": False, "reduce_results": False, "prefix": f"{MLP}.down_proj"}
    layer = made(RowParallelLinear, checkpoint, 512, 256, **options)
    for part, tensor in tensors(checkpoint, f"{MLP}.down_proj").items():
        parameter = getattr(layer, part)
        parameter.weight_loader(parameter, tensor)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def made(kind: type, checkpoint: str, *sizes: Any, described: Description | None = None, **options: Any) -> Any:
    quant_config = config(checkpoint)
    quant_config.description = described or quant_config.description
    with torch.device(NPU):
        return kind(*sizes, quant_config=quant_config, return_bias=False, **options)


def dynamic(x: torch.Tensor, layer: Tensors) -> torch.Tensor:
    of_row = x.float().abs().amax(-1, keepdim=True) / 127
    products = (x.float() / of_row).round().double() @ layer["weight"].double().T
    return products.float() * layer["weight_scale"].flatten() * of_row


def static(x: torch.Tensor, layer: Tensors, *, biased: bool = True) -> torch.Tensor:
    """In the way that `ops.quantized` tells: what rounding adds to the scale of the input, the product takes off."""
    reciprocal = layer["input_scale"].reciprocal().to(x.dtype)
    integers = ((x.float() * reciprocal.float()).round() + layer["input_offset"]).clamp(-128, 127)
    products = integers.double() @ layer["weight"].double().T + (layer["quant_bias"] if biased else 0)
    scale = layer["deq_scale"]
    scale = scale.to(torch.int32).view(torch.float32) if scale.dtype == torch.int64 else scale
    return products.float() * (scale / layer["input_scale"] * reciprocal.float().reciprocal())


@pytest.mark.parametrize("nz", ["0", "1"], ids=["ND", "NZ"])
def test_dynamic_layers(nz: str, root: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_ascend.ops.layout import is_fractal_nz

    monkeypatch.setenv("VLLM_ASCEND_ENABLE_NZ", nz)
    checkpoint, x = checkpoints.modelslim(root), random(7, 256, dtype=dtype)
    layer = gate_up(checkpoint)
    parts = [dynamic(x, tensors(checkpoint, f"{MLP}.{name}")) for name in ("gate_proj", "up_proj")]
    assert_same(layer(x.to(NPU)), torch.cat(parts, -1))
    assert is_fractal_nz(layer.weight) == (nz == "1")


@pytest.mark.parametrize("make", [checkpoints.modelslim_static, "newer"], ids=["older", "newer"])
def test_static_layers(make: Any, root: Path, dtype: torch.dtype) -> None:
    if make == "newer":
        checkpoint = make_quantised("modelslim-w8a8", Path(checkpoints.dense(root)), root / "newer")
        assert "weight_scale" not in tensors(checkpoint, f"{MLP}.down_proj")
    else:
        checkpoint = make(root)
    x = random(7, 256, dtype=dtype)
    parts = [static(x, tensors(checkpoint, f"{MLP}.{name}")) for name in ("gate_proj", "up_proj")]
    assert_same(gate_up(checkpoint)(x.to(NPU)), torch.cat(parts, -1))


def test_mixed_layers_compute_as_dynamic_ones(root: Path, dtype: torch.dtype) -> None:
    """Older static layers have the tensors of both kinds."""
    checkpoint, x = checkpoints.modelslim_static(root), random(7, 256, dtype=dtype)
    parts = [dynamic(x, tensors(checkpoint, f"{MLP}.{name}")) for name in ("gate_proj", "up_proj")]
    described = config(checkpoint).description
    mixed = Description({name: "W8A8_MIX" if kind == "W8A8" else kind for name, kind in described.kinds.items()})
    assert_same(gate_up(checkpoint, mixed)(x.to(NPU)), torch.cat(parts, -1))


def test_static_layers_made_for_float16(root: Path) -> None:
    """Their scales are in the bits of int64, in whatever type the model is."""
    halves = root / "float16"
    halves.mkdir()
    for path in Path(checkpoints.dense(root)).iterdir():
        (halves / path.name).write_bytes(path.read_bytes())
    original = json.loads((halves / "config.json").read_text())
    (halves / "config.json").write_text(json.dumps({**original, "dtype": "float16"}))
    checkpoint, x = make_quantised("modelslim-w8a8", halves, root / "static_float16"), random(7, 512)
    layer = tensors(checkpoint, f"{MLP}.down_proj")
    assert layer["deq_scale"].dtype == torch.int64
    assert_same(down(checkpoint)(x.to(NPU)), static(x, layer))


def test_one_of_two_devices_adds_the_bias_of_a_divided_layer(root: Path, ranks: Ranks) -> None:
    checkpoint, x = checkpoints.modelslim_static(root), random(7, 512)
    ranks.size, results = 2, []
    for ranks.rank in range(2):
        half = x[:, ranks.rank * 256 :][:, :256].contiguous()
        results.append(down(checkpoint)(half.to(NPU)).cpu())
    torch.testing.assert_close(results[0] + results[1], static(x, tensors(checkpoint, f"{MLP}.down_proj")))
    assert tensors(checkpoint, f"{MLP}.down_proj")["quant_bias"].any()


def experts_layer(devices: int = 1, rank: int = 0) -> Any:
    """As much of vLLM's layer as loads weights: of 8 experts, from 256 inputs over 128 values, which devices divide."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    layer: Any = RoutedExperts.__new__(RoutedExperts)
    nn.Module.__init__(layer)
    layer.layer_name, layer.activation, layer.quant_config = f"{MLP}.experts", MoEActivation.SILU, None
    layer.apply_router_weight_on_input = False
    layer.swiglu_limit = layer._fused_shared_expert_quantizer = None
    layer.expert_placement_strategy = "linear"
    layer.expert_map_manager = SimpleNamespace(map_global_to_local=lambda expert: expert)
    layer._loaded_expert_biases = set()
    divided = {"tp_size": devices, "tp_rank": rank}
    layer.moe_config = SimpleNamespace(
        use_ep=False,
        has_bias=False,
        tp_shard_with_padding=False,
        is_act_and_mul=True,
        moe_parallel_config=SimpleNamespace(**divided),
        **divided,
    )
    return layer


def experts(checkpoint: str, dtype: torch.dtype, devices: int = 1, rank: int = 0) -> tuple[Any, Any]:
    """The layer and its method, loaded and processed."""
    from vllm.model_executor.model_loader.reload import record_metadata_for_reloading

    from vllm_ascend.quantization import modelslim_experts

    layer = experts_layer(devices, rank)
    layer.moe_config.in_dtype = dtype
    layer.quant_method = modelslim_experts.method(
        layer, config(checkpoint).description.kind(f"{MLP}.experts.0.up_proj")
    )
    with torch.device(NPU):
        layer.quant_method.create_weights(layer, 8, 256, 128 // devices, dtype, weight_loader=layer.weight_loader)
        record_metadata_for_reloading(layer)
    load_experts(layer, checkpoint)
    assert not layer._loaded_expert_biases
    layer.quant_method.process_weights_after_loading(layer)
    return layer, layer.quant_method


def load_experts(layer: Any, checkpoint: str) -> None:
    for expert in range(8):
        for name, shard in {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}.items():
            for part, tensor in tensors(checkpoint, f"{MLP}.experts.{expert}.{name}").items():
                full = f"{'w2' if shard == 'w2' else 'w13'}_{part}"
                parameter = getattr(layer, full)
                names = {"weight_name": f"{MLP}.experts.{full}", "shard_id": shard, "expert_id": expert}
                parameter.weight_loader(param=parameter, loaded_weight=tensor, **names)


@pytest.mark.parametrize("nz", ["0", "1"], ids=["ND", "NZ"])
@pytest.mark.parametrize("make", [checkpoints.modelslim_experts, checkpoints.modelslim_four_bits], ids=["int8", "int4"])
def test_experts(make: Any, nz: str, root: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_ascend.ops.layout import is_fractal_nz

    monkeypatch.setenv("VLLM_ASCEND_ENABLE_NZ", nz)
    checkpoint, x = make(root), random(9, 256, dtype=dtype)
    weights, chosen = random(9, 8).softmax(-1).topk(2)
    layer, method = experts(checkpoint, dtype)
    assert is_fractal_nz(layer.w13_weight) == is_fractal_nz(layer.w2_weight) == (nz == "1")
    found = method.apply(layer, x.to(NPU), weights.to(NPU), chosen.int().to(NPU))
    tolerance = 2e-4 if dtype == torch.float32 else 4e-2  # a value between the products may be rounded to its neighbour
    expected = sum_of_experts(checkpoint, x, weights, chosen)
    torch.testing.assert_close(found.cpu().float(), expected, rtol=tolerance, atol=tolerance)


def test_experts_in_four_bits_have_sizes_that_devices_take() -> None:
    from vllm_ascend.quantization.modelslim_experts import FourBitExpertsMethod

    layer = experts_layer()
    method = FourBitExpertsMethod(SimpleNamespace(has_bias=False, tp_size=1))
    with pytest.raises(ValueError, match=r"from 256 values over 96 to 256, is not supported .* multiples of 64"):
        method.create_weights(layer, 8, 256, 96, torch.bfloat16, weight_loader=layer.weight_loader)
    method = FourBitExpertsMethod(SimpleNamespace(has_bias=False, tp_size=3))
    with pytest.raises(ValueError, match="is made for 1, 2, 4, 8 or 16 devices that divide each expert, not 3"):
        method.create_weights(layer, 8, 256, 128, torch.bfloat16, weight_loader=layer.weight_loader)


@pytest.mark.parametrize("make", [checkpoints.modelslim_experts, checkpoints.modelslim_four_bits], ids=["int8", "int4"])
def test_experts_take_new_weights_in_place(make: Any, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a matrix in FRACTAL_NZ, torch-npu copies as many bytes as its cast and its type say, which may be too many."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    monkeypatch.setenv("VLLM_ASCEND_ENABLE_NZ", "1")
    checkpoint = make(root)
    layer, _ = experts(checkpoint, torch.float32)
    before = {name: (parameter.data_ptr(), parameter.data.cpu()) for name, parameter in layer.named_parameters()}
    for parameter in layer.parameters():
        parameter.data.copy_(torch.ones_like(parameter.data.cpu()))
        assert bool((parameter.data.cpu() == 1).all())

    initialize_layerwise_reload(layer)
    load_experts(layer, checkpoint)
    finalize_layerwise_reload(layer, SimpleNamespace(dtype=torch.float32))
    for name, parameter in layer.named_parameters():
        address, contents = before[name]
        assert parameter.data_ptr() == address
        assert torch.equal(parameter.data.cpu(), contents), name


def test_two_devices_divide_experts_in_four_bits(root: Path) -> None:
    """Each has half of the sums that belong to w2. What quantises between the products is each one's own."""
    checkpoint, x = checkpoints.modelslim_four_bits(root), random(9, 256)
    weights, chosen = random(9, 8).softmax(-1).topk(2)
    halves = []
    for rank in range(2):
        layer, method = experts(checkpoint, torch.float32, devices=2, rank=rank)
        assert layer.w2_scale_bias.shape == (8, 256)
        halves.append(method.apply(layer, x.to(NPU), weights.to(NPU), chosen.int().to(NPU)).cpu())
    expected = sum_of_experts(checkpoint, x, weights, chosen)
    torch.testing.assert_close(halves[0] + halves[1], expected, rtol=2e-2, atol=2e-3)


def sum_of_experts(checkpoint: str, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    total = torch.zeros(x.shape, dtype=torch.float32)
    for token in range(len(x)):
        for weight, expert in zip(weights[token], chosen[token].tolist(), strict=True):
            of_expert = {
                name: unpacked(tensors(checkpoint, f"{MLP}.experts.{expert}.{name}_proj"))
                for name in ("gate", "up", "down")
            }
            row = x[token : token + 1]
            gate, up = (dynamic(row, of_expert[name]).to(x.dtype).float() for name in ("gate", "up"))
            hidden = (nn.functional.silu(gate) * up).to(x.dtype)
            total[token] += weight * dynamic(hidden, of_expert["down"])[0]
    return total


def unpacked(expert: Tensors) -> Tensors:
    if "scale_bias" in expert:
        packed = expert["weight"]
        expert = {**expert, "weight": torch.stack([(packed << 4) >> 4, packed >> 4], 1).flatten(0, 1)}
    return expert


def test_a_head_may_be_quantised_and_is_padded(root: Path) -> None:
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    from support.quantised.arithmetic import quantise_rows

    rows = quantise_rows(random(1000, 256))
    described = Description({f"{layer}.weight": "W8A8_DYNAMIC" for layer in ("lm_head", "embed")})
    quant_config = config(checkpoints.modelslim(root))
    quant_config.description = described
    with torch.device(NPU):
        head = ParallelLMHead(1000, 256, quant_config=quant_config, prefix="lm_head")
    parts = {"weight": rows.integers, "weight_scale": rows.scales, "weight_offset": torch.zeros_like(rows.scales)}
    for name, tensor in parts.items():
        parameter = getattr(head, name)
        parameter.weight_loader(parameter, tensor)
    head.quant_method.process_weights_after_loading(head)
    x = random(3, 256)
    logits = head.quant_method.apply(head, x.to(NPU)).cpu()
    assert logits.shape == (3, 1024)
    assert torch.equal(logits[:, :1000], dynamic(x, parts))
    with pytest.raises(ValueError, match=r"lm_head has 128000 outputs on a device, .* at most 65535"):
        ParallelLMHead(128000, 256, quant_config=quant_config, prefix="lm_head")
    with pytest.raises(ValueError, match="embed in W8A8_DYNAMIC is not supported"):
        VocabParallelEmbedding(1000, 256, quant_config=quant_config, prefix="embed")


def test_what_is_not_described_must_be_float(root: Path) -> None:
    """Whatever layer it is: torch would turn integers into floats."""
    checkpoint = checkpoints.modelslim(root)
    parts = tensors(checkpoint, f"{MLP}.down_proj")
    quant_config = config(checkpoint)
    quant_config.description = Description({"model.norm.weight": "FLOAT"})
    from vllm.model_executor.layers.linear import RowParallelLinear

    layer = RowParallelLinear(512, 256, bias=False, quant_config=quant_config, prefix=f"{MLP}.down_proj")
    with pytest.raises(ValueError, match=r"down_proj: the checkpoint has torch\.int8 \(256, 512\) where floats"):
        layer.weight.weight_loader(layer.weight, parts["weight"])
    layer.weight.weight_loader(layer.weight, parts["weight"].float())
    described = made(RowParallelLinear, checkpoint, 512, 256, bias=False, prefix=f"{MLP}.down_proj")
    with pytest.raises(ValueError, match=r"the checkpoint has torch\.float32 .* where integers"):
        described.weight.weight_loader(described.weight, parts["weight"].float())


def test_parts_that_do_not_fit_together_are_refused_by_name(root: Path) -> None:
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear

    checkpoint = checkpoints.modelslim(root)
    mixed = config(checkpoint)
    mixed.description = Description({f"{MLP}.gate_proj.weight": "FLOAT", f"{MLP}.up_proj.weight": "W8A8_DYNAMIC"})
    with pytest.raises(MixedKinds, match=rf"FLOAT: {MLP}\.gate_proj\.weight; W8A8_DYNAMIC: {MLP}\.up_proj\.weight"):
        MergedColumnParallelLinear(256, [512, 512], bias=False, quant_config=mixed, prefix=f"{MLP}.gate_up_proj")

    layer = made(MergedColumnParallelLinear, checkpoint, 256, [512, 512], bias=False, prefix=f"{MLP}.gate_up_proj")
    offsets = torch.zeros(512, 1)
    layer.weight_offset.weight_loader(layer.weight_offset, offsets, 1)
    offsets[3] = 1
    with pytest.raises(ValueError, match="gate_up_proj has weights with offsets"):
        layer.weight_offset.weight_loader(layer.weight_offset, offsets, 1)


def test_a_bias_that_vllm_would_leave_out_is_refused(root: Path) -> None:
    from vllm.model_executor.layers.linear import RowParallelLinear

    checkpoint = config(checkpoints.modelslim(root))
    kinds = {**checkpoint.description.kinds, f"{MLP}.down_proj.bias": "FLOAT"}
    checkpoint.description = Description(kinds)
    with pytest.raises(ValueError, match="down_proj has a bias in the checkpoint, and none in vLLM's model"):
        RowParallelLinear(512, 256, bias=False, quant_config=checkpoint, prefix=f"{MLP}.down_proj")
    RowParallelLinear(512, 256, bias=True, quant_config=checkpoint, prefix=f"{MLP}.down_proj")


def test_a_static_layer_whose_caller_adds_its_bias_is_refused(root: Path) -> None:
    from vllm.model_executor.layers.linear import RowParallelLinear

    options: dict[str, Any] = {"bias": True, "skip_bias_add": True, "prefix": f"{MLP}.down_proj"}
    with pytest.raises(
        ValueError, match=r"down_proj in W8A8 has a bias that its caller adds, which quant_bias contains"
    ):
        made(RowParallelLinear, checkpoints.modelslim_static(root), 512, 256, **options)


@pytest.mark.parametrize("kind", ["W8A8_DYNAMIC", "W4A8_DYNAMIC"])
def test_experts_that_compute_in_another_way_are_refused_by_name(kind: str) -> None:
    from vllm_ascend.quantization import modelslim_experts

    layer = experts_layer()
    layer.swiglu_limit = 7.0
    method = modelslim_experts.method(layer, kind)
    with pytest.raises(ValueError, match=rf"{MLP}\.experts: experts with a limit of the activation are not supported"):
        method.create_weights(layer, 8, 256, 128, torch.bfloat16, weight_loader=layer.weight_loader)


def test_experts_with_biases_in_the_checkpoint_are_refused(root: Path) -> None:
    quant_config, layer = config(checkpoints.modelslim_experts(root)), experts_layer()
    names = {f"ckpt_{name}_proj_name": f"{name}_proj" for name in ("gate", "up", "down")}
    vars(layer).update(names, global_num_experts=8)
    assert quant_config.get_quant_method(layer, f"{MLP}.experts") is not None
    biases = {f"{MLP}.experts.{expert}.up_proj.bias": "FLOAT" for expert in range(3)}
    quant_config.description = Description({**quant_config.description.kinds, **biases})
    with pytest.raises(
        ValueError, match=rf"with biases are not supported on NPUs: {MLP}\.experts\.0\.up_proj and 2 more"
    ):
        quant_config.get_quant_method(layer, f"{MLP}.experts")


def test_parts_must_quantise_their_input_in_one_way(root: Path) -> None:
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear

    checkpoint = checkpoints.modelslim_static(root)
    layer = made(MergedColumnParallelLinear, checkpoint, 256, [512, 512], bias=False, prefix=f"{MLP}.gate_up_proj")
    for name in ("weight_offset", "input_offset"):
        getattr(layer, name).data.zero_()
    layer.deq_scale.data.fill_(1)
    layer.input_scale.data.copy_(torch.tensor([0.5, 0.25]))
    with pytest.raises(ValueError, match=r"gate_up_proj .* different input_scale, \[0\.5, 0\.25\]"):
        layer.quant_method.process_weights_after_loading(layer)
