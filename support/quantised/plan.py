"""Which layer is quantised in which way, and the layers themselves."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from support.quantised.activations import Range, observe_inputs
from support.quantised.arithmetic import Activation, Rows, quantise_range, quantise_rows
from support.quantised.files import tensors_of

FLOAT, STATIC, DYNAMIC, FOUR_BITS = "FLOAT", "W8A8", "W8A8_DYNAMIC", "W4A8_DYNAMIC"
"""As ModelSlim names them."""
LINEAR = re.compile(r"\.(q|k|v|o|gate|up|down|q_a|q_b|kv_b)_proj$|\.kv_a_proj_with_mqa$")


@dataclass(frozen=True)
class Plan:
    dense: str = DYNAMIC
    experts: str = DYNAMIC
    left_out: Sequence[str] = ()
    """Parts of the names of layers that stay as they are."""

    def kind(self, layer: str) -> str:
        if not LINEAR.search(layer) or any(part in layer for part in self.left_out):
            return FLOAT
        return self.experts if ".experts." in layer else self.dense


@dataclass(frozen=True)
class Layer:
    """A linear layer of the source, quantised."""

    name: str
    kind: str
    rows: Rows
    bias: torch.Tensor | None
    activation: Activation | None
    """In static quantisation."""


class Source:
    """A checkpoint in bfloat16 or another float type, whose layers are taken one at a time."""

    def __init__(self, checkpoint: Path, plan: Plan, shifts: dict[str, torch.Tensor] | None = None) -> None:
        """`shifts` are vectors added to what layers, by their names, are given; these take them off again."""
        self.checkpoint, self.plan, self.shifts = checkpoint, plan, shifts or {}
        self._ranges: dict[str, Range] = observe_inputs(checkpoint) if STATIC in {plan.dense, plan.experts} else {}
        self._biases = {name: tensor for name, tensor in tensors_of(checkpoint) if name.endswith(".bias")}

    def dtype(self) -> str:
        config = json.loads((self.checkpoint / "config.json").read_text())
        return str(config.get("dtype") or config.get("torch_dtype"))

    def items(self) -> Iterator[Layer | tuple[str, torch.Tensor]]:
        """Quantised layers, and the other tensors as they are."""
        for name, tensor in tensors_of(self.checkpoint):
            layer, _, part = name.rpartition(".")
            if self.plan.kind(layer) == FLOAT:
                yield name, tensor
            elif part == "weight":
                yield self._quantised(layer, tensor)

    def _quantised(self, layer: str, weight: torch.Tensor) -> Layer:
        kind, bias = self.plan.kind(layer), self._biases.get(f"{layer}.bias")
        if (shift := self.shifts.get(layer)) is not None:
            bias = (0 if bias is None else bias.float()) - weight.float() @ shift
        rows = quantise_rows(weight, bits=4 if kind == FOUR_BITS else 8)
        return Layer(layer, kind, rows, bias, self._activation(layer, shift) if kind == STATIC else None)

    def _activation(self, layer: str, shift: torch.Tensor | None) -> Activation:
        if layer not in self._ranges:
            raise ValueError(f"{layer} was not seen as a linear layer of transformers: quantise it dynamically")
        low, high = self._ranges[layer]
        added = torch.zeros(()) if shift is None else shift
        return quantise_range(low + added, high + added)
