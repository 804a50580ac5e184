from __future__ import annotations

import io
import json
import os
import random
import resource
import shutil
import struct
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from vllm_ascend.model_loader.netloader.checkpoint.fingerprint import (
    HEADER_LIMIT,
    SAMPLE_BYTES,
    SAMPLES_PER_CHECKPOINT,
    File,
    checkpoint_fingerprint,
    files_in,
    require_complete,
)

WEIGHTS = (".safetensors", ".bin", ".pt")


def fingerprint_in(directory: Path) -> str:
    """Of all weights right in there."""
    return checkpoint_fingerprint(files_in(directory, (file for file in directory.iterdir() if file.suffix in WEIGHTS)))


def safetensors(header: str, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header.encode() + data


FIRST_HEADER = (
    '{"__metadata__":{"format":"pt"},'
    '"embed.weight":{"dtype":"F32","shape":[16,64],"data_offsets":[0,4096]},'
    '"norm.weight":{"dtype":"BF16","shape":[8],"data_offsets":[4096,4112]}}'
)
FIRST_DATA = bytes(index % 251 for index in range(4112))
SECOND_HEADER = '{"head.bias":{"dtype":"I8","shape":[3],"data_offsets":[0,3]}}'


def fingerprint_of(content: bytes | bytearray, file: Path) -> str:
    file.write_bytes(content)
    return fingerprint_in(file.parent)


def write_checkpoint(directory: Path, header: str = FIRST_HEADER, data: bytes = FIRST_DATA) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "model-00001-of-00002.safetensors").write_bytes(safetensors(header, data))
    (directory / "model-00002-of-00002.safetensors").write_bytes(safetensors(SECOND_HEADER, b"\x01\x02\x03"))
    return directory


GOLDEN = "9207f9a0a86d78af431ee3fff9772005bbc5b2807c56e284359b2ed092dc47bb"


def test_the_fingerprint_of_a_checkpoint_stays_the_same_across_releases(tmp_path: Path) -> None:
    assert fingerprint_in(write_checkpoint(tmp_path)) == GOLDEN


def test_one_changed_weight_in_the_middle_of_a_tensor_changes_the_fingerprint(tmp_path: Path) -> None:
    data = bytearray(FIRST_DATA)
    data[2048 + 7] ^= 1
    assert fingerprint_in(write_checkpoint(tmp_path, data=bytes(data))) != GOLDEN


def test_a_renamed_tensor_changes_the_fingerprint(tmp_path: Path) -> None:
    renamed = FIRST_HEADER.replace("norm.weight", "gate.weight")
    assert fingerprint_in(write_checkpoint(tmp_path, header=renamed)) != GOLDEN


def test_another_type_of_the_same_width_changes_the_fingerprint(tmp_path: Path) -> None:
    retyped = FIRST_HEADER.replace('"F32"', '"I32"')
    assert fingerprint_in(write_checkpoint(tmp_path, header=retyped)) != GOLDEN


def test_another_file_size_changes_the_fingerprint(tmp_path: Path) -> None:
    assert fingerprint_in(write_checkpoint(tmp_path, data=FIRST_DATA + b"\0")) != GOLDEN


def test_a_renamed_file_changes_the_fingerprint(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").rename(tmp_path / "model-00003-of-00002.safetensors")
    assert fingerprint_in(tmp_path) != GOLDEN


def test_a_missing_file_changes_the_fingerprint(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    assert fingerprint_in(tmp_path) != GOLDEN


def test_a_copy_at_another_path_has_the_same_fingerprint(tmp_path: Path) -> None:
    original = write_checkpoint(tmp_path / "original")
    shutil.copytree(original, tmp_path / "copy")
    assert fingerprint_in(tmp_path / "copy") == GOLDEN


def test_a_directory_of_links_has_the_fingerprint_of_what_it_links_to(tmp_path: Path) -> None:
    original = write_checkpoint(tmp_path / "blobs")
    links = tmp_path / "snapshot"
    links.mkdir()
    for file in original.iterdir():
        (links / file.name).symlink_to(file)
    assert fingerprint_in(links) == GOLDEN


def test_the_same_names_in_different_folders_are_different_files(tmp_path: Path) -> None:
    for part, byte in (("encoder", b"1"), ("decoder", b"2")):
        (tmp_path / part).mkdir()
        (tmp_path / part / "model.safetensors").write_bytes(safetensors("{}", byte))
    swapped = {"encoder": "decoder", "decoder": "encoder"}
    here = files_in(tmp_path, tmp_path.glob("*/*"))
    assert [file.name for file in here] == ["decoder/model.safetensors", "encoder/model.safetensors"]
    there = [File(file.name, str(tmp_path / swapped[file.name.split("/")[0]] / "model.safetensors")) for file in here]
    assert checkpoint_fingerprint(here) != checkpoint_fingerprint(there)


INDEX = "pytorch_model.bin.index.json"
FIRST_PART, SECOND_PART = "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"


def index_of(*files: str) -> str:
    return json.dumps({"metadata": {}, "weight_map": {f"w{n}": file for n, file in enumerate(files)}})


def test_an_interrupted_download_is_noticed(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(index_of(FIRST_PART, SECOND_PART))
    files = [File(name, str(tmp_path / name)) for name in (FIRST_PART, SECOND_PART)]
    require_complete(tmp_path, files)
    with pytest.raises(FileNotFoundError, match=f"1 of its files are missing, among them: '{SECOND_PART}'"):
        require_complete(tmp_path, files[:1])


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"weight_map": null}', '{"weight_map": 1}', "[" * 100_000],
    ids=lambda text: text[:30] or "empty",
)
def test_an_index_that_says_nothing_does_not_count(content: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(content)
    require_complete(tmp_path, [File(FIRST_PART, str(tmp_path / FIRST_PART))])


def test_an_index_of_files_of_another_kind_does_not_count(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(index_of(FIRST_PART))
    require_complete(tmp_path, [File("model.safetensors", str(tmp_path / "model.safetensors"))])


@pytest.mark.parametrize("name", ["model.bin", "model.pt"])
def test_a_checkpoint_of_another_kind_is_sampled_all_over(tmp_path: Path, name: str) -> None:
    content = bytearray(SAMPLES_PER_CHECKPOINT * SAMPLE_BYTES * 4)
    fingerprints = {fingerprint_of(content, tmp_path / name)}
    for part in range(8):
        changed = bytearray(content)
        begin = part * len(content) // 8
        changed[begin : begin + 8 * SAMPLE_BYTES] = b"\xff" * 8 * SAMPLE_BYTES
        fingerprints.add(fingerprint_of(changed, tmp_path / name))
    assert len(fingerprints) == 9


def test_no_files_have_no_fingerprint() -> None:
    assert checkpoint_fingerprint([]) == ""


@pytest.mark.timeout(20)
def test_what_is_no_regular_file_is_an_os_error_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(OSError, match=r"no regular file: '.*model\.safetensors'"):
        fingerprint_in(tmp_path)


def test_weights_that_cannot_be_read_are_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blob-that-was-deleted")
    with pytest.raises(FileNotFoundError):
        fingerprint_in(tmp_path)


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
    fingerprint = fingerprint_in(tmp_path)
    bytes_read = bytes_read_by_this_process() - before
    assert bytes_read < len(header) + (SAMPLES_PER_CHECKPOINT + 1) * SAMPLE_BYTES + ALLOWANCE

    with open(file, "r+b") as stream:
        stream.seek(8 + len(header) + 150 * step + step // 2)
        stream.write(b"\x01")
    assert fingerprint_in(tmp_path) != fingerprint


def test_a_header_that_announces_gigabytes_is_read_up_to_the_limit(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes((5 << 30).to_bytes(8, "little"))
    os.truncate(file, 10 << 30)
    before = bytes_read_by_this_process()
    assert len(fingerprint_in(tmp_path)) == 64
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
    assert len(fingerprint_in(tmp_path)) == 64
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
    fingerprint = fingerprint_in(tmp_path)
    bytes_read = bytes_read_by_this_process() - before
    assert SAMPLES_PER_CHECKPOINT // shards * shards * SAMPLE_BYTES < bytes_read < 2 << 20

    for file in (files[0], files[-1]):
        with open(file, "r+b") as stream:
            data_begins = 8 + int.from_bytes(stream.read(8), "little")
            for n in range(tensors_per_shard):
                stream.seek(data_begins + n * step + step // 2)
                stream.write(b"\x01")
        changed = fingerprint_in(tmp_path)
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
    original = fingerprint_in(directory)
    name, position = place
    content = bytearray((directory / name).read_bytes())
    content[position] ^= flipped_bits
    (directory / name).write_bytes(content)
    assert fingerprint_in(directory) != original


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
    base = fingerprint_in(checkpoint_of_many_experts(tmp_path / "base"))
    in_all_layers = checkpoint_of_many_experts(tmp_path / "all", retrained=kind)
    in_one_layer = checkpoint_of_many_experts(tmp_path / "one", retrained=kind, layers=range(7, 8))
    assert len({base, fingerprint_in(in_all_layers), fingerprint_in(in_one_layer)}) == 3


def test_hundreds_of_files_need_few_descriptors(tmp_path: Path) -> None:
    for number in range(300):
        (tmp_path / f"model-{number:03}.safetensors").write_bytes(safetensors(SECOND_HEADER, b"123"))
    expected = fingerprint_in(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + 40, limits[1]))
    try:
        assert fingerprint_in(tmp_path) == expected
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


EXPERTS_IN_ARCHIVE, NORMS_IN_ARCHIVE = 4 * SAMPLES_PER_CHECKPOINT, 2


def zeros(order: int) -> dict[str, torch.Tensor]:
    """Far more tensors than there are samples, in an order that `order` decides."""
    weights = {f"experts.{n}.weight": torch.zeros(1024, dtype=torch.uint8) for n in range(EXPERTS_IN_ARCHIVE)}
    weights |= {f"norms.{n}.weight": torch.zeros(64, dtype=torch.uint8) for n in range(NORMS_IN_ARCHIVE)}
    return dict(random.Random(order).sample(list(weights.items()), len(weights)))


def saved(weights: dict[str, torch.Tensor], *, crc: bool = True) -> bytearray:
    """What `torch.save` writes, without its own digest of the contents, which older versions did not write."""
    stream = io.BytesIO()
    torch.serialization.set_crc32_options(crc)
    try:
        torch.save(weights, stream)
    finally:
        torch.serialization.set_crc32_options(True)
    archive = bytearray(stream.getbuffer())
    digest = slice(archive.index(b"serialization_id"), archive.index(b"PK\1\2"))
    archive[digest] = bytes(len(archive[digest]))
    return archive


def checksums(archive: bytearray) -> dict[str, int]:
    return {entry.filename: entry.CRC for entry in zipfile.ZipFile(io.BytesIO(archive)).infolist()}


def test_torch_keeps_a_checksum_of_each_tensor_unless_it_is_told_not_to() -> None:
    weights = {"a": torch.zeros(3), "b": torch.ones(3)}
    found = checksums(saved(weights))
    assert (found["archive/data/0"], found["archive/data/1"]) == (
        zlib.crc32(weights["a"].numpy().data),
        zlib.crc32(weights["b"].numpy().data),
    )
    assert set(checksums(saved(weights, crc=False)).values()) == {0}


@pytest.mark.parametrize("name", ["experts.0", "experts.2999", "norms.1"])
def test_a_change_of_one_element_of_any_tensor_of_an_archive_shows(name: str, tmp_path: Path) -> None:
    weights = zeros(order=0)
    before = fingerprint_of(saved(weights), tmp_path / "pytorch_model.bin")
    weights[f"{name}.weight"][-1 if "norm" in name else 0] = 1
    assert fingerprint_of(saved(weights), tmp_path / "pytorch_model.bin") != before


@pytest.mark.parametrize("order", range(4))
def test_without_checksums_a_fine_tune_of_few_tensors_of_one_size_shows(order: int, tmp_path: Path) -> None:
    """An archive does not tell names, so one kind are the tensors of one size."""
    weights = zeros(order)
    before = saved(weights, crc=False)
    for n in range(NORMS_IN_ARCHIVE):
        weights[f"norms.{n}.weight"] += 1
    after = saved(weights, crc=False)
    assert fingerprint_of(before, tmp_path / "pytorch_model.bin") != fingerprint_of(
        after, tmp_path / "pytorch_model.bin"
    )


def test_what_torch_wrote_before_it_wrote_archives_is_sampled_all_over(tmp_path: Path) -> None:
    stream = io.BytesIO()
    torch.save({"w": torch.zeros(SAMPLES_PER_CHECKPOINT * SAMPLE_BYTES)}, stream, _use_new_zipfile_serialization=False)
    content = bytearray(stream.getbuffer())
    before = fingerprint_of(content, tmp_path / "pytorch_model.bin")
    content[len(content) // 2 : len(content) // 2 + 8 * SAMPLE_BYTES] = b"\xff" * 8 * SAMPLE_BYTES
    assert fingerprint_of(content, tmp_path / "pytorch_model.bin") != before


def test_a_record_beyond_four_gigabytes_is_found(tmp_path: Path) -> None:
    """Sizes and places that need more than 32 bits are kept in a field of their own."""
    size, place, name = 5 << 30, 6 << 30, b"archive/data/0"
    extra = struct.pack("<HHQQQ", 1, 24, size, size, place)
    entry = struct.pack("<4s16xLLHHH8xL", b"PK\1\2", *(0xFFFFFFFF,) * 2, len(name), len(extra), 0, 0xFFFFFFFF)
    directory = entry + name + extra
    begins = place + 30 + len(name) + size
    end_64 = struct.pack("<4sQ28xQQ", b"PK\6\6", 44, len(directory), begins)
    locator = struct.pack("<4s4xQL", b"PK\6\7", begins + len(directory), 1)
    end = struct.pack("<4s4xHHLLH", b"PK\5\6", 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    file = tmp_path / "pytorch_model.bin"
    with file.open("wb") as stream:
        stream.seek(begins)
        stream.write(directory + end_64 + locator + end)
    assert zipfile.ZipFile(file).getinfo(name.decode()).header_offset == place
    before = fingerprint_in(tmp_path)
    with file.open("r+b") as stream:
        stream.seek(begins - size // 2)
        stream.write(b"\1")
    assert fingerprint_in(tmp_path) != before


ARCHIVE = bytes(saved({"a": torch.zeros(3), "b": torch.ones(3)}))
TAIL_BYTES = 700
"""At the end of ARCHIVE: the directory and what tells where it is."""


@given(
    position=st.integers(1, TAIL_BYTES),
    replacement=st.binary(min_size=1, max_size=16) | st.just(b"\xff" * 8),
    cut=st.integers(0, 3),
)
@example(position=16, replacement=b"\xff\xff\xff\x7f", cut=0)
def test_any_damage_to_a_directory_is_survived(
    position: int, replacement: bytes, cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.getbasetemp() / "any-archive"
    directory.mkdir(exist_ok=True)
    content = bytearray(ARCHIVE)
    begin = len(content) - position
    content[begin : begin + len(replacement)] = replacement
    before = bytes_read_by_this_process()
    assert len(fingerprint_of(bytes(content[: len(content) - cut]), directory / "model.bin")) == 64
    assert bytes_read_by_this_process() - before < 2 * SAMPLES_PER_CHECKPOINT * SAMPLE_BYTES + ALLOWANCE


def test_a_directory_that_announces_gigabytes_is_read_up_to_the_limit(tmp_path: Path) -> None:
    file = tmp_path / "model.bin"
    with file.open("wb") as stream:
        stream.truncate(10 << 30)
        stream.seek(0, os.SEEK_END)
        stream.write(bytes(20) + struct.pack("<4s4xHHLLH", b"PK\5\6", 1, 1, (4 << 30) - 2, 0, 0))
    before = bytes_read_by_this_process()
    assert len(fingerprint_in(tmp_path)) == 64
    bytes_read = bytes_read_by_this_process() - before
    assert HEADER_LIMIT <= bytes_read < HEADER_LIMIT + (SAMPLES_PER_CHECKPOINT + 1) * SAMPLE_BYTES + ALLOWANCE
