"""compressed-tensors' format "int-quantized", as LLM Compressor writes it: the configuration describes all layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from support.quantised.files import PartsWriter, change_json, copy_other_files
from support.quantised.plan import STATIC, Layer, Plan, Source

WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
PER_TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
PER_TENSOR = {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "tensor", "dynamic": False}
NOT_QUANTISED = ["lm_head", "re:.*mlp.gate$"]


def write_compressed_tensors(source: Path, target: Path, plan: Plan) -> Path:
    """Writes a quantised copy of the checkpoint `source` into the new directory `target`, and returns that.

    All layers are quantised in the same way, that of the dense ones, but for those that the plan leaves out.
    """
    layers = Source(source, plan)
    target.mkdir(parents=True)
    copy_other_files(source, target)

    writer = PartsWriter(target, "model")
    for item in layers.items():
        for name, tensor in _tensors(item) if isinstance(item, Layer) else [item]:
            writer.add(name, tensor)
    writer.finish()

    change_json(target / "config.json", {"quantization_config": _configuration(plan)})
    return target


def _tensors(layer: Layer) -> list[tuple[str, torch.Tensor]]:
    parts = {"weight": layer.rows.integers, "weight_scale": layer.rows.scales}
    if layer.activation is not None:
        parts["input_scale"] = torch.tensor([layer.activation.scale])
        parts["input_zero_point"] = torch.tensor([layer.activation.offset], dtype=torch.int8)
    if layer.bias is not None:
        parts["bias"] = layer.bias
    return [(f"{layer.name}.{part}", tensor) for part, tensor in parts.items()]


def _configuration(plan: Plan) -> dict[str, Any]:
    activations = PER_TENSOR if plan.dense == STATIC else PER_TOKEN
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": [*NOT_QUANTISED, *(f"re:.*{part}.*" for part in plan.left_out)],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": activations}},
    }
