"""quant_model_description.json: which kinds of layers there are, and what is refused of them."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ascend.quantization.description import (
    DYNAMIC,
    FLOAT,
    FOUR_BITS,
    MIXED,
    STATIC,
    TENSORS,
    Description,
    MixedKinds,
)

ATTENTION = "model.layers.0.self_attn"
EXPERTS = "model.layers.0.mlp.experts"
DENSE_KINDS, EXPERT_KINDS = (FLOAT, STATIC, DYNAMIC, MIXED), (FLOAT, DYNAMIC, FOUR_BITS)


def described(layers: dict[str, str], **whole: Any) -> Description:
    kinds = {f"{layer}.weight": kind for layer, kind in layers.items()}
    kinds |= {f"{layer}.{part}": kind for layer, kind in layers.items() for part in TENSORS.get(kind, ())}
    return Description.read(json.dumps({**whole, **kinds}))


layers = st.dictionaries(
    st.from_regex(r"\Amodel\.layers\.[0-9]\.(q|k|v|o|up)_proj\Z"), st.sampled_from(DENSE_KINDS), min_size=1
)
experts = st.dictionaries(
    st.from_regex(r"\Amodel\.layers\.[0-9]\.experts\.[0-9]\.(up|down)_proj\Z"), st.sampled_from(EXPERT_KINDS)
)
leaves = st.none() | st.booleans() | st.integers() | st.text(max_size=5)
anything = st.recursive(
    leaves, lambda each: st.lists(each, max_size=3) | st.dictionaries(st.text(max_size=9), each, max_size=3)
)


@given(layers, experts)
def test_layers_keep_their_kinds_and_complete_ones_are_not_refused(
    layers: dict[str, str], experts: dict[str, str]
) -> None:
    description = described({**layers, **experts}, version="1.0.0", group_size=0, metadata={}, model_quant_type=DYNAMIC)
    assert {layer: description.kind(layer) for layer in (layers | experts)} == layers | experts
    assert not list(description.refusals())


def is_description(content: Any) -> bool:
    names = [name for name in content if "." in name] if isinstance(content, dict) else []
    return bool(names) and all(isinstance(content[name], str) for name in names)


@given(anything | st.dictionaries(st.sampled_from(["a.weight", "b.weight", "version", "metadata"]), anything))
def test_a_file_is_a_description_or_refused_with_its_name(content: Any) -> None:
    if is_description(content):
        description = Description.read(json.dumps(content))
        assert set(description.kinds) | set(description.whole) == set(content)
        list(description.refusals())
    else:
        with pytest.raises(ValueError, match=r"quant_model_description\.json"):
            Description.read(json.dumps(content))


@given(st.text())
def test_what_is_no_json_is_refused_with_the_name_of_the_file(text: str) -> None:
    with pytest.raises(ValueError, match=r"quant_model_description\.json"):
        Description.read(text)


@given(layers, st.sampled_from(["W4A16", "W8A16", "C8", FOUR_BITS]))
def test_other_kinds_are_refused_with_their_layers(layers: dict[str, str], kind: str) -> None:
    refused = list(described({**layers, "model.layers.77.odd_proj": kind}).refusals())
    assert refused == [
        f"ModelSlim's kind {kind} for layers (model.layers.77.odd_proj; there are FLOAT, W8A8, W8A8_DYNAMIC, W8A8_MIX)"
    ]


def test_experts_and_other_layers_have_kinds_of_their_own() -> None:
    static = list(described({f"{EXPERTS}.{number}.up_proj": STATIC for number in range(5)}).refusals())
    assert static == [
        f"ModelSlim's kind W8A8 for experts ({EXPERTS}.0.up_proj, {EXPERTS}.1.up_proj, {EXPERTS}.2.up_proj and 2 more; "
        f"there are FLOAT, W4A8_DYNAMIC, W8A8_DYNAMIC)"
    ]
    assert not list(described({f"{EXPERTS}.0.up_proj": FOUR_BITS}).refusals())
    shared = f"{EXPERTS.replace('experts', 'shared_experts')}.up_proj"
    assert "W4A8_DYNAMIC for layers" in next(described({shared: FOUR_BITS}).refusals())


@pytest.mark.parametrize(("kind", "tensors"), TENSORS.items())
def test_a_layer_that_lacks_tensors_is_refused(kind: str, tensors: tuple[str, ...]) -> None:
    layer = f"{EXPERTS}.0.up_proj" if kind == FOUR_BITS else f"{ATTENTION}.q_proj"
    content = {f"{layer}.{part}": kind for part in ("weight", *tensors)}
    assert not list(Description(content).refusals())
    for missing in tensors:
        without = {name: kind for name in content if name != f"{layer}.{missing}"}
        (refused,) = Description(without).refusals()
        assert refused.startswith(f"{layer} in {kind} without {missing} ")


@pytest.mark.parametrize(
    "whole",
    [
        {"kv_cache_type": "C8"},
        {"fa_quant_type": "FAKQuant"},
        {"reduce_quant_type": "per_channel"},
        {"group_size": 256},
        {"metadata": {"quarot": {"max_tp_size": 4}}},
    ],
    ids=lambda whole: next(iter(whole)),
)
def test_what_is_quantised_besides_layers_is_refused(whole: dict[str, Any]) -> None:
    (refused,) = described({f"{ATTENTION}.q_proj": DYNAMIC}, **whole).refusals()
    assert next(iter(whole)) in refused


def test_parts_of_one_layer_must_be_of_one_kind() -> None:
    parts = [f"{ATTENTION}.{name}_proj" for name in "qkv"]
    alike = described(dict.fromkeys(parts, DYNAMIC))
    assert alike.kind_of(f"{ATTENTION}.qkv_proj", parts) == DYNAMIC
    mixed = described({**dict.fromkeys(parts, DYNAMIC), parts[1]: FLOAT})
    expected = f"W8A8_DYNAMIC: {parts[0]}.weight, {parts[2]}.weight; FLOAT: {parts[1]}.weight"
    with pytest.raises(MixedKinds, match="different kinds") as refusal:
        mixed.kind_of(f"{ATTENTION}.qkv_proj", parts)
    assert expected in str(refusal.value)


def test_what_is_not_described_is_float() -> None:
    description = described({f"{ATTENTION}.q_proj": DYNAMIC})
    assert description.kind("lm_head") == FLOAT
    with pytest.raises(MixedKinds, match=r"FLOAT: .*k_proj\.weight"):
        description.kind_of("qkv", [f"{ATTENTION}.q_proj", f"{ATTENTION}.k_proj"])


def test_norms_may_add_a_bias() -> None:
    plain = {f"{ATTENTION}.q_proj.weight": FLOAT, f"{ATTENTION}.q_proj.bias": FLOAT}
    assert not Description(plain).norms_add_bias
    assert Description({**plain, "model.layers.0.input_layernorm.bias": FLOAT}).norms_add_bias
    assert Description({**plain, "model.norm.bias": FLOAT}).norms_add_bias


def test_norms_with_a_bias_are_refused_where_only_the_static_half_of_a_layer_takes_it_off() -> None:
    layer = f"{ATTENTION}.q_proj"
    for kind in (STATIC, DYNAMIC, MIXED):
        description = described({layer: kind}, version="1.0.0")
        description.kinds["model.layers.0.input_layernorm.bias"] = FLOAT
        refused = list(description.refusals())
        expected = f"before layers in W8A8_MIX, whose quant_bias alone takes it off again, .* products \\({layer}"
        assert len(refused) == (kind == MIXED)
        assert all(re.search(expected, each) for each in refused)
