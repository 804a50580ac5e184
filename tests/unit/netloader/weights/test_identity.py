from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from vllm_ascend.model_loader.netloader.weights.identity import (
    Difference,
    ModelIdentity,
    RankCoordinates,
    canonical_digest,
)

MODEL = ModelIdentity(
    name="org/model",
    architecture="LlamaForCausalLM",
    config_digest="c0ffee",
    dtype="bfloat16",
    name_is_path=False,
    revision="main",
    quantization="fp8",
    fingerprint="f00d",
    role="target",
    load_options="",
    versions={"vllm": "0.32.0", "torch": "2.13.0"},
)

OTHER_MODEL: dict[str, tuple[Any, str, str]] = {
    "name": ("org/other", "org/model", "org/other"),
    "architecture": ("Qwen3ForCausalLM", "LlamaForCausalLM", "Qwen3ForCausalLM"),
    "config_digest": ("decaf", "c0ffee", "decaf"),
    "dtype": ("float16", "bfloat16", "float16"),
    "revision": ("v2", "main", "v2"),
    "quantization": ("", "fp8", ""),
    "fingerprint": ("beef", "f00d", "beef"),
    "role": ("draft", "target", "draft"),
    "load_options": ("redundant experts", "", "redundant experts"),
    "versions": (
        {"vllm": "0.31.0", "torch": "2.13.0"},
        "torch 2.13.0, vllm 0.32.0",
        "torch 2.13.0, vllm 0.31.0",
    ),
}

OTHER_RANK: dict[str, tuple[Any, str, str]] = {
    "tp_rank": (1, "0", "1"),
    "tp_size": (2, "1", "2"),
    "pp_rank": (1, "0", "1"),
    "pp_size": (2, "1", "2"),
    "pcp_rank": (1, "0", "1"),
    "pcp_size": (2, "1", "2"),
    "ep_rank": (1, "0", "1"),
    "ep_size": (2, "1", "2"),
    "expert_placement": ("linear", "", "linear"),
}


def other_model(**changes: Any) -> ModelIdentity:
    return msgspec.structs.replace(MODEL, **changes)


def test_the_tables_of_this_module_cover_every_field() -> None:
    assert {*OTHER_MODEL, "name_is_path"} == set(ModelIdentity.__struct_fields__)
    assert set(OTHER_RANK) == set(RankCoordinates.__struct_fields__)


@pytest.mark.parametrize("field", OTHER_MODEL)
def test_one_differing_field_of_a_model_is_reported_by_exactly_its_name(field: str) -> None:
    value, ours, theirs = OTHER_MODEL[field]
    there = other_model(**{field: value})
    assert MODEL.mismatch(there) == (Difference(field, ours, theirs),)
    assert there.mismatch(MODEL) == (Difference(field, theirs, ours),)


@pytest.mark.parametrize("field", OTHER_RANK)
def test_one_differing_coordinate_is_reported_by_exactly_its_name(field: str) -> None:
    value, ours, theirs = OTHER_RANK[field]
    there = RankCoordinates(**{field: value})
    assert RankCoordinates().mismatch(there) == (Difference(field, ours, theirs),)
    assert there.mismatch(RankCoordinates()) == (Difference(field, theirs, ours),)


def test_all_differing_fields_are_reported_at_once() -> None:
    there = other_model(**{field: value for field, (value, _, _) in OTHER_MODEL.items()})
    assert [difference.field for difference in MODEL.mismatch(there)] == [
        field for field in ModelIdentity.__struct_fields__ if field != "name_is_path"
    ]
    rank = RankCoordinates(**{field: value for field, (value, _, _) in OTHER_RANK.items()})
    assert [difference.field for difference in RankCoordinates().mismatch(rank)] == list(
        RankCoordinates.__struct_fields__
    )


def test_a_model_and_a_rank_do_not_differ_from_themselves() -> None:
    assert MODEL.mismatch(other_model()) == ()
    assert RankCoordinates(3, 4).mismatch(RankCoordinates(3, 4)) == ()


def test_the_same_weights_under_another_path_are_accepted() -> None:
    here = other_model(name="/data/model", name_is_path=True, revision="")
    there = other_model(name="/mnt/copy", name_is_path=True, revision="")
    assert here.mismatch(there) == ()


def test_the_same_weights_in_a_directory_and_from_the_hub_are_accepted() -> None:
    here = other_model(name="/data/model", name_is_path=True, revision="")
    assert here.mismatch(MODEL) == ()
    assert MODEL.mismatch(here) == ()


def test_other_weights_under_the_same_path_are_refused() -> None:
    here = other_model(name="/data/model", name_is_path=True)
    there = other_model(name="/data/model", name_is_path=True, fingerprint="beef")
    assert here.mismatch(there) == (Difference("fingerprint", "f00d", "beef"),)


@pytest.mark.parametrize(
    ("here", "there"), [("", "f00d"), ("f00d", ""), ("", "")], ids=["none here", "none there", "none at all"]
)
def test_the_names_decide_where_a_fingerprint_is_missing_and_the_difference_says_where(here: str, there: str) -> None:
    mine = other_model(fingerprint=here)
    missing = Difference("fingerprint", here, there)
    assert mine.mismatch(other_model(fingerprint=there)) == ()
    assert mine.mismatch(other_model(fingerprint=there, name="org/other")) == (
        Difference("name", "org/model", "org/other"),
        missing,
    )
    assert mine.mismatch(other_model(fingerprint=there, revision="v2")) == (
        Difference("revision", "main", "v2"),
        missing,
    )
    assert mine.mismatch(other_model(fingerprint=there, dtype="float16")) == (
        Difference("dtype", "bfloat16", "float16"),
    )


def test_paths_decide_where_nothing_better_is_known() -> None:
    here = other_model(name="/data/model", name_is_path=True, fingerprint="")
    assert here.mismatch(other_model(name="/data/model", name_is_path=True)) == ()
    assert here.mismatch(other_model(name="/mnt/copy", name_is_path=True)) == (
        Difference("name", "/data/model", "/mnt/copy"),
        Difference("fingerprint", "", "f00d"),
    )


def test_a_difference_reads_the_other_way_from_the_other_side() -> None:
    difference = Difference("dtype", "bfloat16", "float16")
    assert str(difference) == "dtype (here bfloat16, there float16)"
    assert str(difference.flipped()) == "dtype (here float16, there bfloat16)"
    assert difference.flipped().flipped() == difference


def test_a_difference_calls_an_empty_value_none() -> None:
    assert str(Difference("tensor w", "", "float32 [2]")) == "tensor w (here none, there float32 [2])"
    assert str(Difference("quantization", "fp8", "")) == "quantization (here fp8, there none)"


CANONICAL = "e0f3a638312150168edf46a1abc6f89450159a74bf01cde74b4c838dfa7d90f9"


def test_a_canonical_digest_does_not_depend_on_the_order_of_keys() -> None:
    assert canonical_digest({"a": 1, "b": [1, {"c": None, "d": "é"}]}) == CANONICAL
    assert canonical_digest({"b": [1, {"d": "é", "c": None}], "a": 1}) == CANONICAL


def test_a_canonical_digest_takes_what_json_lacks_by_its_text() -> None:
    assert canonical_digest({"path": Path("/data")}) == canonical_digest({"path": "/data"})
