"""The quantised checkpoints of tests, demo and benchmarks: what is in them, and that they mean their source."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from support.quantised.arithmetic import quantise_rows
from support.quantised.files import tensors_of
from support.quantised.kinds import make_quantised
from support.vllm import checkpoints

GATE = "model.layers.0.mlp.gate_proj"
EXPERT = "model.layers.0.mlp.experts.3"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def layer(checkpoint: str | Path, name: str) -> dict[str, torch.Tensor]:
    """The tensors of this layer, by their last names."""
    found = {each: tensor for each, tensor in tensors_of(Path(checkpoint)) if each.rpartition(".")[0] == name}
    return {each.removeprefix(f"{name}."): tensor for each, tensor in found.items()}


def kinds(checkpoint: str) -> dict[str, object]:
    described: dict[str, object] = json.loads((Path(checkpoint) / "quant_model_description.json").read_text())
    return described


def shapes(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, list[int]]]:
    return {name: (tensor.dtype, list(tensor.shape)) for name, tensor in tensors.items()}


def test_both_formats_hold_the_same_numbers(root: Path) -> None:
    ours, theirs = layer(checkpoints.modelslim(root), GATE), layer(checkpoints.w8a8(root), GATE)
    scale = torch.float32, [512, 1]
    assert shapes(ours) == {"weight": (torch.int8, [512, 256]), "weight_scale": scale, "weight_offset": scale}
    assert torch.equal(ours["weight"], theirs["weight"])
    assert torch.equal(ours["weight_scale"], theirs["weight_scale"])
    source = layer(checkpoints.dense(root), GATE)["weight"].float()
    error = (ours["weight"] * ours["weight_scale"] - source).abs()
    assert (error <= ours["weight_scale"] * 0.51).all()


def test_every_tensor_is_described_and_the_configuration_says_nothing(root: Path) -> None:
    checkpoint = checkpoints.modelslim_experts(root)
    described = kinds(checkpoint)
    names = {name for name, _ in tensors_of(Path(checkpoint))}
    assert set(described) - names == {"version", "model_quant_type", "metadata", "group_size", "optional"}
    assert described[f"{EXPERT}.down_proj.weight_scale"] == "W8A8_DYNAMIC"
    assert described["model.layers.0.mlp.gate.weight"] == described["lm_head.weight"] == "FLOAT"
    assert "quantization_config" not in (Path(checkpoint) / "config.json").read_text()
    (index,) = Path(checkpoint).glob("*.index.json")
    assert set(json.loads(index.read_text())["weight_map"]) == names


def test_static_layers_compute_what_the_source_does(root: Path) -> None:
    """The norm before adds something, and the layer takes it off again."""
    static = layer(checkpoints.modelslim_static(root), GATE)
    norm = layer(checkpoints.modelslim_static(root), "model.layers.0.post_attention_layernorm")
    assert kinds(checkpoints.modelslim_static(root))["model.layers.1.mlp.down_proj.weight"] == "FLOAT"
    assert set(static) - {"weight", "weight_scale", "weight_offset"} == {
        "input_scale",
        "input_offset",
        "quant_bias",
        "deq_scale",
    }
    x = torch.randn(20, 256, generator=torch.Generator().manual_seed(0)).clamp(-2.5, 2.5)
    shifted = ((x + norm["bias"]) / static["input_scale"]).round() + static["input_offset"]
    products = shifted.clamp(-128, 127) @ static["weight"].float().T + static["quant_bias"]
    source = layer(checkpoints.dense(root), GATE)["weight"].float()
    torch.testing.assert_close(products * static["deq_scale"], x @ source.T, atol=0.02, rtol=0)


def test_scales_for_float16_are_bits_in_int64(root: Path) -> None:
    source = Path(checkpoints.dense(root))
    halves = root / "float16"
    halves.mkdir()
    for path in source.iterdir():
        (halves / path.name).write_bytes(path.read_bytes())
    config = json.loads((source / "config.json").read_text())
    (halves / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    ours = layer(make_quantised("modelslim-w8a8", halves, root / "static_float16"), GATE)["deq_scale"]
    theirs = layer(make_quantised("modelslim-w8a8", source, root / "static_bfloat16"), GATE)["deq_scale"]
    assert ours.dtype == torch.int64
    assert torch.equal(ours.to(torch.int32).view(torch.float32), theirs)


@pytest.mark.parametrize(("name", "parts"), [("up_proj", 1), ("down_proj", 16)])
def test_four_bits_lie_in_pairs_of_rows(name: str, parts: int, root: Path) -> None:
    expert = layer(checkpoints.modelslim_four_bits(root), f"{EXPERT}.{name}")
    source = layer(checkpoints.mixture_of_experts(root), f"{EXPERT}.{name}")["weight"]
    packed, (integers, scales) = expert["weight"], quantise_rows(source, bits=4)
    assert packed.shape == (source.shape[0] // 2, source.shape[1])
    low, high = (packed << 4) >> 4, packed >> 4  # of int8, so that signs are kept
    assert torch.equal(torch.stack([low, high], 1).flatten(0, 1), integers)
    assert torch.equal(expert["weight_scale"], scales)
    assert expert["scale_bias"].shape == (source.shape[0], parts)
    sums = 8 * (integers.float() * scales).sum(1)
    torch.testing.assert_close(expert["scale_bias"].sum(1), sums)
    assert kinds(checkpoints.modelslim_four_bits(root))["model.layers.0.self_attn.q_proj.weight"] == "W8A8_DYNAMIC"


def test_layers_after_a_norm_with_a_bias_must_be_able_to_take_it_off(root: Path) -> None:
    source = Path(checkpoints.dense(root))
    plain = make_quantised(
        "modelslim-w8a8", source, root / "plain_norm", older=True, left_out=("layers.0.mlp.up_proj",)
    )
    assert "model.layers.0.post_attention_layernorm.bias" not in kinds(plain)
    assert "model.layers.1.post_attention_layernorm.bias" in kinds(plain)
