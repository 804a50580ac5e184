"""What quant_model_description.json says: the kind of every tensor of a checkpoint that ModelSlim quantised.

Tensors have their full names, so that a name with a dot is one; the other keys are about the whole checkpoint. The kind
of a layer is that of its weight. A layer that is not described is taken for FLOAT, as the description of a checkpoint
may leave parts out that were never looked at; the methods of FLOAT layers refuse integers.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

FILE: Final = "quant_model_description.json"
FLOAT: Final = "FLOAT"
STATIC: Final = "W8A8"
DYNAMIC: Final = "W8A8_DYNAMIC"
MIXED: Final = "W8A8_MIX"
FOUR_BITS: Final = "W4A8_DYNAMIC"

TENSORS: Final = {
    STATIC: ("input_scale", "input_offset", "quant_bias", "deq_scale"),
    DYNAMIC: ("weight_scale", "weight_offset"),
    MIXED: ("weight_scale", "weight_offset", "input_scale", "input_offset", "quant_bias", "deq_scale"),
    FOUR_BITS: ("weight_scale", "weight_offset", "scale_bias"),
}
"""What a layer has beside its weight."""
ALLOWED: Final = {False: {FLOAT, STATIC, DYNAMIC, MIXED}, True: {FLOAT, DYNAMIC, FOUR_BITS}}
"""For layers outside of experts, and inside."""
QUANTISED_ELSEWHERE: Final = {
    "kv_cache_type": "a quantised KV cache",
    "kv_quant_type": "a quantised KV cache",
    "fa_quant_type": "quantised attention",
    "indexer_quant_type": "a quantised indexer",
    "reduce_quant_type": "quantised communication",
    "group_size": "scales for groups of inputs",
}
_EXPERT: Final = re.compile(r"\.experts\.\d+\.")
_NORM_BIAS: Final = re.compile(r"norm\w*\.bias$")
_NAMED: Final = 3


class MixedKinds(ValueError):
    """The parts of one layer are quantised in different ways."""


class Description:
    """`kinds` are those of tensors, by their names. Raises ValueError for what no such file has."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.whole = {name: value for name, value in content.items() if "." not in name}
        self.kinds: dict[str, str] = {name: kind for name, kind in content.items() if "." in name}
        if wrong := [f"{name}: {kind!r}" for name, kind in self.kinds.items() if not isinstance(kind, str)]:
            raise ValueError(f"{FILE} has kinds that are no text: {_some(wrong)}")
        if not self.kinds:
            raise ValueError(f"{FILE} describes no tensor")

    @classmethod
    def read(cls, text: str) -> Description:
        """From the content of the file. Raises ValueError if that is not such a description."""
        try:
            content = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{FILE} is no JSON: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{FILE} holds a {type(content).__name__} in place of an object")
        return cls(content)

    def renamed(self, rename: Callable[[dict[str, str]], dict[str, str]]) -> Description:
        return Description({**self.whole, **rename(self.kinds)})

    def kind(self, layer: str) -> str:
        return self.kinds.get(f"{layer}.weight", FLOAT)

    def kind_of(self, layer: str, parts: Sequence[str]) -> str:
        """The kind of a layer that is made of these layers of the checkpoint. Raises MixedKinds."""
        kinds = {part: self.kind(part) for part in parts}
        if len(set(kinds.values())) > 1:
            by_kind: dict[str, list[str]] = defaultdict(list)
            for part, kind in kinds.items():
                by_kind[kind].append(f"{part}.weight")
            told = "; ".join(f"{kind}: {_some(names)}" for kind, names in by_kind.items())
            raise MixedKinds(
                f"{layer} is one layer in vLLM, and the checkpoint has its parts in different kinds ({told}): quantise "
                f"all of them in the same way, or none"
            )
        return next(iter(kinds.values()))

    def has(self, tensor: str) -> bool:
        return tensor in self.kinds

    @property
    def norms_add_bias(self) -> bool:
        """Whether there are norms which add something to what they give, as layers after them expect."""
        return any(_NORM_BIAS.search(name) for name in self.kinds)

    def has_no_bias_of_norm(self, tensor: str) -> bool:
        """Whether `tensor` is the bias of a norm, and this one has none."""
        return bool(_NORM_BIAS.search(tensor)) and not self.has(tensor)

    def refusals(self) -> Iterator[str]:
        """What this platform does not do of it, by name."""
        yield from self._refused_kinds()
        yield from self._incomplete_layers()
        if self.norms_add_bias and (mixed := [name for name, kind in self.kinds.items() if kind == MIXED]):
            yield (
                f"norms with a bias before layers in {MIXED}, whose quant_bias alone takes it off again, which is not "
                f"added to dynamic products ({_some(mixed)})"
            )
        for key, what in QUANTISED_ELSEWHERE.items():
            if value := self.whole.get(key):
                yield f"{what} ({FILE} has {key}={value!r})"
        metadata = self.whole.get("metadata")
        if isinstance(metadata, dict) and metadata.get("quarot"):
            yield f"activations that are rotated while a model runs ({FILE} has metadata.quarot)"

    def _refused_kinds(self) -> Iterator[str]:
        layers: dict[tuple[str, bool], list[str]] = defaultdict(list)
        for name, kind in self.kinds.items():
            in_experts = bool(_EXPERT.search(name))
            if kind not in ALLOWED[in_experts]:
                layer = name.rpartition(".")[0]
                if layer not in (known := layers[kind, in_experts]):
                    known.append(layer)
        for (kind, in_experts), names in layers.items():
            where, allowed = "experts" if in_experts else "layers", ", ".join(sorted(ALLOWED[in_experts]))
            yield f"ModelSlim's kind {kind} for {where} ({_some(names)}; there are {allowed})"

    def _incomplete_layers(self) -> Iterator[str]:
        """vLLM would leave the tensors that are missing as they happen to be."""
        for name, kind in self.kinds.items():
            layer, _, part = name.rpartition(".")
            if part == "weight":
                missing = [each for each in TENSORS.get(kind, ()) if not self.has(f"{layer}.{each}")]
                if missing:
                    yield f"{layer} in {kind} without {', '.join(missing)} ({FILE} does not describe them)"


def _some(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
