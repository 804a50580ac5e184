from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vllm_ascend.model_loader.netloader.identity import (
    HEADER_LIMIT,
    SAMPLE_BYTES,
    SAMPLES_PER_CHECKPOINT,
    Difference,
    ModelIdentity,
    RankCoordinates,
    canonical_digest,
    checkpoint_fingerprint,
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
def test_the_names_decide_where_a_fingerprint_is_missing(here: str, there: str) -> None:
    mine = other_model(fingerprint=here)
    assert mine.mismatch(other_model(fingerprint=there)) == ()
    assert mine.mismatch(other_model(fingerprint=there, name="org/other")) == (
        Difference("name", "org/model", "org/other"),
    )
    assert mine.mismatch(other_model(fingerprint=there, revision="v2")) == (Difference("revision", "main", "v2"),)


def test_paths_decide_where_nothing_better_is_known() -> None:
    here = other_model(name="/data/model", name_is_path=True, fingerprint="")
    assert here.mismatch(other_model(name="/data/model", name_is_path=True)) == ()
    assert here.mismatch(other_model(name="/mnt/copy", name_is_path=True)) == (
        Difference("name", "/data/model", "/mnt/copy"),
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


def safetensors(header: str, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header.encode() + data


FIRST_HEADER = (
    '{"__metadata__":{"format":"pt"},'
    '"embed.weight":{"dtype":"F32","shape":[16,64],"data_offsets":[0,4096]},'
    '"norm.weight":{"dtype":"BF16","shape":[8],"data_offsets":[4096,4112]}}'
)
FIRST_DATA = bytes(index % 251 for index in range(4112))
SECOND_HEADER = '{"head.bias":{"dtype":"I8","shape":[3],"data_offsets":[0,3]}}'


def fingerprint_of(content: bytes, file: Path) -> str:
    file.write_bytes(content)
    return checkpoint_fingerprint(file.parent)


def write_checkpoint(directory: Path, header: str = FIRST_HEADER, data: bytes = FIRST_DATA) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "model-00001-of-00002.safetensors").write_bytes(safetensors(header, data))
    (directory / "model-00002-of-00002.safetensors").write_bytes(safetensors(SECOND_HEADER, b"\x01\x02\x03"))
    return directory


GOLDEN = "9207f9a0a86d78af431ee3fff9772005bbc5b2807c56e284359b2ed092dc47bb"


def test_the_fingerprint_of_a_checkpoint_stays_the_same_across_releases(tmp_path: Path) -> None:
    assert checkpoint_fingerprint(write_checkpoint(tmp_path)) == GOLDEN


def test_one_changed_weight_in_the_middle_of_a_tensor_changes_the_fingerprint(tmp_path: Path) -> None:
    data = bytearray(FIRST_DATA)
    data[2048 + 7] ^= 1
    assert checkpoint_fingerprint(write_checkpoint(tmp_path, data=bytes(data))) != GOLDEN


def test_a_renamed_tensor_changes_the_fingerprint(tmp_path: Path) -> None:
    renamed = FIRST_HEADER.replace("norm.weight", "gate.weight")
    assert checkpoint_fingerprint(write_checkpoint(tmp_path, header=renamed)) != GOLDEN


def test_another_type_of_the_same_width_changes_the_fingerprint(tmp_path: Path) -> None:
    retyped = FIRST_HEADER.replace('"F32"', '"I32"')
    assert checkpoint_fingerprint(write_checkpoint(tmp_path, header=retyped)) != GOLDEN


def test_another_file_size_changes_the_fingerprint(tmp_path: Path) -> None:
    assert checkpoint_fingerprint(write_checkpoint(tmp_path, data=FIRST_DATA + b"\0")) != GOLDEN


def test_a_renamed_file_changes_the_fingerprint(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").rename(tmp_path / "model-00003-of-00002.safetensors")
    assert checkpoint_fingerprint(tmp_path) != GOLDEN


def test_a_missing_file_changes_the_fingerprint(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    assert checkpoint_fingerprint(tmp_path) != GOLDEN


def test_a_copy_at_another_path_has_the_same_fingerprint(tmp_path: Path) -> None:
    original = write_checkpoint(tmp_path / "original")
    shutil.copytree(original, tmp_path / "copy")
    assert checkpoint_fingerprint(tmp_path / "copy") == GOLDEN
    assert checkpoint_fingerprint(str(tmp_path / "copy")) == GOLDEN


def test_a_directory_of_links_has_the_fingerprint_of_what_it_links_to(tmp_path: Path) -> None:
    original = write_checkpoint(tmp_path / "blobs")
    links = tmp_path / "snapshot"
    links.mkdir()
    for file in original.iterdir():
        (links / file.name).symlink_to(file)
    assert checkpoint_fingerprint(links) == GOLDEN


def test_files_that_the_loader_would_not_read_do_not_count(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    for name in ("pytorch_model.bin", "model.pt", "model.gguf", "config.json", "model.safetensors.index.json"):
        (tmp_path / name).write_bytes(b"anything")
    write_checkpoint(tmp_path / "below", data=b"")
    assert checkpoint_fingerprint(tmp_path) == GOLDEN


def index_of(*files: str) -> str:
    return json.dumps({"metadata": {}, "weight_map": {f"w{n}": file for n, file in enumerate(files)}})


def test_an_interrupted_download_has_no_fingerprint(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(index_of("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"))
    assert checkpoint_fingerprint(tmp_path) == GOLDEN
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    assert checkpoint_fingerprint(tmp_path) == ""


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"weight_map": null}', '{"weight_map": {"w": [1]}}', "[" * 100_000],
    ids=lambda text: text[:30] or "empty",
)
def test_an_index_that_says_nothing_does_not_count(content: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    assert checkpoint_fingerprint(tmp_path) == GOLDEN


def test_an_interrupted_download_of_another_kind_has_no_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model-00001-of-00002.bin").write_bytes(b"weights")
    assert checkpoint_fingerprint(tmp_path) != ""
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(index_of("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"))
    assert checkpoint_fingerprint(tmp_path) == ""


def test_an_index_of_files_of_another_kind_does_not_count(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin.index.json").write_text(index_of("pytorch_model-00001-of-00001.bin"))
    assert checkpoint_fingerprint(tmp_path) == GOLDEN


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "model.gguf"])
def test_a_checkpoint_of_another_kind_is_sampled_all_over(tmp_path: Path, name: str) -> None:
    content = bytearray(SAMPLES_PER_CHECKPOINT * SAMPLE_BYTES * 4)
    fingerprints = {fingerprint_of(content, tmp_path / name)}
    for part in range(8):
        changed = bytearray(content)
        begin = part * len(content) // 8
        changed[begin : begin + 8 * SAMPLE_BYTES] = b"\xff" * 8 * SAMPLE_BYTES
        fingerprints.add(fingerprint_of(changed, tmp_path / name))
    assert len(fingerprints) == 9


def test_a_directory_without_weights_has_no_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    write_checkpoint(tmp_path / "below")
    assert checkpoint_fingerprint(tmp_path) == ""


def test_what_is_no_directory_has_no_fingerprint(tmp_path: Path) -> None:
    assert checkpoint_fingerprint(tmp_path / "missing") == ""
    assert checkpoint_fingerprint(os.devnull) == ""


def test_weights_that_cannot_be_read_are_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blob-that-was-deleted")
    with pytest.raises(FileNotFoundError):
        checkpoint_fingerprint(tmp_path)


@given(content=st.binary(max_size=200))
@example(content=b"")
@example(content=b"\xff" * 8)
@example(content=b"\xff" * 7 + b"\x7f")
@example(content=safetensors("{}", b""))
@example(content=safetensors("{", b"12345678"))
def test_any_bytes_have_a_fingerprint(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.getbasetemp() / "any-bytes"
    directory.mkdir(exist_ok=True)
    assert len(fingerprint_of(content, directory / "model.safetensors")) == 64


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(0, 300) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
almost_entries = st.dictionaries(
    st.text(max_size=4), json_values | st.fixed_dictionaries({"data_offsets": json_values})
)


@given(header=json_values | almost_entries, cut=st.integers(0, 10))
@example(header={"w": {"data_offsets": [0, 10**12]}}, cut=0)
@example(header={"w": {"data_offsets": [10, 2]}}, cut=0)
@example(header={"w": {"data_offsets": "12"}}, cut=0)
@example(header={"w": {"data_offsets": [1]}}, cut=0)
def test_any_header_has_a_fingerprint(header: object, cut: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.getbasetemp() / "any-header"
    directory.mkdir(exist_ok=True)
    content = safetensors(json.dumps(header), b"weights")
    assert len(fingerprint_of(content[: len(content) - cut], directory / "model.safetensors")) == 64


@pytest.mark.parametrize(
    "header",
    [
        '{"w":{"data_offsets":[0.5,3]}}',
        '{"w":{"data_offsets":[0,NaN]}}',
        '{"w":{"data_offsets":[0,1e999]}}',
        '{"w":{"data_offsets":[-4000,0]}}',
        '{"w":{"data_offsets":[0,1000000000000000000000000000000]}}',
        "[" * 100_000,
    ],
    ids=["fraction", "not a number", "infinite", "negative", "huge", "nested beyond measure"],
)
def test_offsets_that_are_none_do_not_crash(header: str, tmp_path: Path) -> None:
    assert len(fingerprint_of(safetensors(header, b"weights"), tmp_path / "model.safetensors")) == 64


ALLOWANCE = 64 << 10
"""Bytes that the interpreter may read for itself meanwhile."""


def bytes_read_by_this_process() -> int:
    counters = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counters["rchar"])


def test_a_checkpoint_of_ten_gigabytes_costs_kilobytes(tmp_path: Path) -> None:
    count, size = 300, 10 << 30
    step = size // count
    entries = {
        f"layers.{n}.weight": {"dtype": "I8", "shape": [step], "data_offsets": [n * step, (n + 1) * step]}
        for n in range(count)
    }
    header = json.dumps(entries)
    file = tmp_path / "model.safetensors"
    file.write_bytes(safetensors(header, b""))
    os.truncate(file, 8 + len(header) + size)

    before = bytes_read_by_this_process()
    fingerprint = checkpoint_fingerprint(tmp_path)
    bytes_read = bytes_read_by_this_process() - before
    assert bytes_read < len(header) + (SAMPLES_PER_CHECKPOINT + 1) * SAMPLE_BYTES + ALLOWANCE

    with open(file, "r+b") as stream:
        stream.seek(8 + len(header) + 150 * step + step // 2)
        stream.write(b"\x01")
    assert checkpoint_fingerprint(tmp_path) != fingerprint


def test_a_header_that_announces_gigabytes_is_read_up_to_the_limit(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes((5 << 30).to_bytes(8, "little"))
    os.truncate(file, 10 << 30)
    before = bytes_read_by_this_process()
    assert len(checkpoint_fingerprint(tmp_path)) == 64
    bytes_read = bytes_read_by_this_process() - before
    assert HEADER_LIMIT <= bytes_read < HEADER_LIMIT + (SAMPLES_PER_CHECKPOINT + 1) * SAMPLE_BYTES + ALLOWANCE


def test_samples_are_spread_over_all_tensors_of_a_file(tmp_path: Path) -> None:
    count, step = 3 * SAMPLES_PER_CHECKPOINT, 2 * SAMPLE_BYTES
    entries = {f"w{n}": {"dtype": "I8", "data_offsets": [n * step, (n + 1) * step]} for n in range(count)}
    fingerprints = {fingerprint_of(safetensors(json.dumps(entries), bytes(count * step)), tmp_path / "w.safetensors")}
    for part in range(16):
        data = bytearray(count * step)
        begin = part * count * step // 16
        data[begin : begin + 8 * step] = b"\x01" * 8 * step
        fingerprints.add(fingerprint_of(safetensors(json.dumps(entries), bytes(data)), tmp_path / "w.safetensors"))
    assert len(fingerprints) == 17


def test_many_files_share_the_samples_of_one_checkpoint(tmp_path: Path) -> None:
    for n in range(64):
        file = tmp_path / f"model-{n:02}.bin"
        file.touch()
        os.truncate(file, 1 << 30)
    before = bytes_read_by_this_process()
    assert len(checkpoint_fingerprint(tmp_path)) == 64
    assert bytes_read_by_this_process() - before < 2 * SAMPLES_PER_CHECKPOINT * SAMPLE_BYTES + ALLOWANCE


def sparse_checkpoint(directory: Path, *, shards: int, shard_bytes: int, tensors_per_shard: int) -> None:
    """Headers as of a real checkpoint before zeros that take no room on the disk; skips where they would."""
    step = shard_bytes // tensors_per_shard
    for shard in range(shards):
        entries = {
            f"model.layers.{shard}.mlp.experts.{n}.weight": {
                "dtype": "BF16",
                "shape": [step // 2],
                "data_offsets": [n * step, (n + 1) * step],
            }
            for n in range(tensors_per_shard)
        }
        file = directory / f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        content = safetensors(json.dumps(entries), b"")
        file.write_bytes(content)
        try:
            os.truncate(file, len(content) + shard_bytes)
        except OSError as error:
            pytest.skip(f"no file of {shard_bytes} bytes can be made in {directory}: {error}")
        if file.stat().st_blocks * 512 > 1 << 20:
            pytest.skip(f"the filesystem of {directory} knows no sparse files")


def test_a_sharded_checkpoint_of_a_hundred_gigabytes_costs_kilobytes(tmp_path: Path) -> None:
    shards, shard_bytes, tensors_per_shard = 20, 5 * 10**9, 400
    step = shard_bytes // tensors_per_shard
    sparse_checkpoint(tmp_path, shards=shards, shard_bytes=shard_bytes, tensors_per_shard=tensors_per_shard)
    files = sorted(tmp_path.iterdir())
    assert sum(file.stat().st_size for file in files) > 100 * 10**9

    before = bytes_read_by_this_process()
    fingerprint = checkpoint_fingerprint(tmp_path)
    bytes_read = bytes_read_by_this_process() - before
    assert SAMPLES_PER_CHECKPOINT // shards * shards * SAMPLE_BYTES < bytes_read < 2 << 20

    for file in (files[0], files[-1]):
        with open(file, "r+b") as stream:
            data_begins = 8 + int.from_bytes(stream.read(8), "little")
            for n in range(tensors_per_shard):
                stream.seek(data_begins + n * step + step // 2)
                stream.write(b"\x01")
        changed = checkpoint_fingerprint(tmp_path)
        assert changed != fingerprint
        fingerprint = changed


FIRST_FILE, SECOND_FILE = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def sampled_positions() -> list[tuple[str, int]]:
    """Every byte of `write_checkpoint` that counts: prefix and header of each file, and of each tensor the sample.

    There are fewer tensors than samples, so that each tensor has one, from its middle on.
    """
    positions = []
    for file, header in ((FIRST_FILE, FIRST_HEADER), (SECOND_FILE, SECOND_HEADER)):
        data_begins = 8 + len(header)
        counting = set(range(data_begins))
        size = data_begins
        for name, entry in json.loads(header).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                middle = data_begins + (begin + end) // 2
                counting |= set(range(middle, middle + SAMPLE_BYTES))
                size = max(size, data_begins + end)
        positions += [(file, position) for position in sorted(counting) if position < size]
    return positions


SAMPLED = sampled_positions()


@given(place=st.sampled_from(SAMPLED), flipped_bits=st.integers(1, 255))
@example(place=SAMPLED[0], flipped_bits=1)
@example(place=(FIRST_FILE, 7), flipped_bits=0x80)
@example(place=(FIRST_FILE, 8), flipped_bits=1)
@example(place=(FIRST_FILE, 8 + len(FIRST_HEADER) - 1), flipped_bits=1)
@example(place=(FIRST_FILE, 8 + len(FIRST_HEADER) + 2048), flipped_bits=1)
@example(place=(FIRST_FILE, 8 + len(FIRST_HEADER) + 2048 + SAMPLE_BYTES - 1), flipped_bits=1)
@example(place=SAMPLED[-1], flipped_bits=1)
def test_any_changed_byte_of_a_header_or_a_sample_changes_the_fingerprint(
    place: tuple[str, int], flipped_bits: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = write_checkpoint(tmp_path_factory.getbasetemp() / "one-byte")
    original = checkpoint_fingerprint(directory)
    name, position = place
    content = bytearray((directory / name).read_bytes())
    content[position] ^= flipped_bits
    (directory / name).write_bytes(content)
    assert checkpoint_fingerprint(directory) != original


KINDS = (
    "self_attn.q_proj",
    "self_attn.v_proj",
    "mlp.gate",
    "mlp.experts.{expert}.up_proj",
    "mlp.experts.{expert}.down_proj",
)
LAYERS, EXPERTS, TENSOR_BYTES = 24, 128, 4 * SAMPLE_BYTES


def checkpoint_of_many_experts(directory: Path, *, retrained: str = "", layers: range = range(LAYERS)) -> Path:
    """A file for each layer, most of its tensors experts'; `retrained` is a kind whose weights differ in `layers`."""
    directory.mkdir()
    for layer in range(LAYERS):
        entries: dict[str, object] = {}
        data = bytearray()
        for kind in KINDS:
            for expert in range(EXPERTS if "{expert}" in kind else 1):
                value = b"\x01" if kind == retrained and layer in layers else b"\x00"
                begin = len(data)
                data += value * TENSOR_BYTES
                name = f"model.layers.{layer}.{kind.format(expert=expert)}.weight"
                entries[name] = {"dtype": "U8", "shape": [TENSOR_BYTES], "data_offsets": [begin, len(data)]}
        (directory / f"model-{layer:05}.safetensors").write_bytes(safetensors(json.dumps(entries), bytes(data)))
    return directory


@pytest.mark.parametrize("kind", KINDS)
def test_a_fine_tune_of_one_kind_of_tensor_shows_however_few_there_are(kind: str, tmp_path: Path) -> None:
    """There are far more tensors than samples, and a step through them all would miss whole kinds."""
    assert LAYERS * EXPERTS * 2 > SAMPLES_PER_CHECKPOINT
    base = checkpoint_fingerprint(checkpoint_of_many_experts(tmp_path / "base"))
    in_all_layers = checkpoint_of_many_experts(tmp_path / "all", retrained=kind)
    in_one_layer = checkpoint_of_many_experts(tmp_path / "one", retrained=kind, layers=range(7, 8))
    assert len({base, checkpoint_fingerprint(in_all_layers), checkpoint_fingerprint(in_one_layer)}) == 3
