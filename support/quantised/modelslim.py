"""ModelSlim's format (its saver "ascendv1", version 1.0.0), read from the package msmodelslim 26.1.

Every tensor has a kind in quant_model_description.json, under its own name, beside a few keys about the whole; the
configuration of the model says nothing about quantisation. `older` writes what tools before 1.0.0 wrote: no version,
scales of the weights in statically quantised layers too, and norms that add a bias to what they give, which the layers
after them take off in theirs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from support.quantised.arithmetic import pack_pairs_of_rows, sums_for_low_halves
from support.quantised.files import PartsWriter, change_json, copy_other_files, tensors_of
from support.quantised.plan import FLOAT, FOUR_BITS, STATIC, Layer, Plan, Source

DESCRIPTION = "quant_model_description.json"
PARTS_OF_ROWS = 16
"""As many devices a layer can be divided among whose sums are of parts of rows."""
SHIFTED = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
"""Norms, and the layers after them."""


def write_modelslim(source: Path, target: Path, plan: Plan, *, older: bool = False) -> Path:
    """Writes a quantised copy of the checkpoint `source` into the new directory `target`, and returns that."""
    shifts = _shifts(source, plan) if older else {}
    layers = Source(source, plan, {layer: shift for norm, shift in shifts.items() for layer in _layers_after(norm)})
    target.mkdir(parents=True)
    copy_other_files(source, target)
    change_json(target / "config.json", {}, without="quantization_config")

    writer = PartsWriter(target, "quant_model_weights")
    kinds: dict[str, str] = {}
    for item in layers.items():
        tensors = _tensors(item, layers.dtype(), older=older) if isinstance(item, Layer) else [(*item, FLOAT)]
        for name, tensor, kind in tensors:
            writer.add(name, tensor)
            kinds[name] = kind
    for norm, shift in shifts.items():
        writer.add(f"{norm}.bias", shift)
        kinds[f"{norm}.bias"] = FLOAT
    writer.finish()

    whole = {"model_quant_type": plan.dense, "metadata": {}, "group_size": 0, "optional": {}}
    description = {**kinds, **({"model_quant_type": plan.dense} if older else {"version": "1.0.0", **whole})}
    (target / DESCRIPTION).write_text(json.dumps(description, indent=4))
    return target


def _tensors(layer: Layer, dtype: str, *, older: bool) -> Iterator[tuple[str, torch.Tensor, str]]:
    integers, scales = layer.rows
    parts: dict[str, torch.Tensor] = {"weight": integers}
    if layer.kind == FOUR_BITS:
        divided = layer.name.endswith("down_proj")
        parts["weight"] = pack_pairs_of_rows(integers)
        parts["scale_bias"] = sums_for_low_halves(layer.rows, PARTS_OF_ROWS if divided else 1)
    if layer.kind != STATIC or older:
        parts |= {"weight_scale": scales, "weight_offset": torch.zeros_like(scales)}
    if layer.activation is not None:
        scale, offset = torch.tensor([layer.activation.scale]), torch.tensor([float(layer.activation.offset)])
        products = scale * scales.flatten()
        bias = torch.zeros_like(products) if layer.bias is None else layer.bias.float()
        parts |= {
            "input_scale": scale,
            "input_offset": offset,
            "quant_bias": (bias / products - integers.float().sum(1) * offset).round().to(torch.int32),
            "deq_scale": products if dtype == "bfloat16" else products.view(torch.int32).to(torch.int64),
        }
    yield from ((f"{layer.name}.{part}", tensor, layer.kind) for part, tensor in parts.items())
    if layer.bias is not None and not older:
        yield f"{layer.name}.bias", layer.bias.float(), FLOAT


def _shifts(source: Path, plan: Plan) -> dict[str, torch.Tensor]:
    """For the norms whose layers have a `quant_bias` that can take it off."""
    generator = torch.Generator().manual_seed(0)
    norms = {
        name.removesuffix(".weight"): tensor for name, tensor in tensors_of(source) if name.endswith("norm.weight")
    }
    return {
        norm: torch.randn(weight.shape, generator=generator) * 0.5
        for norm, weight in norms.items()
        if {plan.kind(layer) for layer in _layers_after(norm)} == {STATIC}
    }


def _layers_after(norm: str) -> list[str]:
    block, _, name = norm.rpartition(".")
    return [f"{block}.{layer}" for layer in SHIFTED.get(name, ())]
