from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from vllm_ascend.model_loader.netloader.checkpoint import fingerprint
from vllm_ascend.model_loader.netloader.checkpoint.fingerprint import checkpoint_fingerprint, files_in
from vllm_ascend.model_loader.netloader.checkpoint.record import ReadRecord
from vllm_ascend.model_loader.netloader.engine.vllm_identity import require_checkpoint
from vllm_ascend.model_loader.netloader.errors import CheckpointChanged, ConfigError
from vllm_ascend.model_loader.netloader.instance.filling import as_read
from vllm_ascend.model_loader.netloader.weights.identity import ModelIdentity

OLD, NEW = b"old weights", b"new weights"
NAMES = ("model-1.safetensors", "model-2.safetensors")


def checkpoint(folder: Path, content: bytes = OLD) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        (folder / name).write_bytes(content)
    return folder


def begun(folder: Path) -> ReadRecord:
    record = ReadRecord()
    record.begin(str(folder), [str(folder / name) for name in NAMES])
    return record


def replace(file: Path) -> None:
    beside = file.with_suffix(".new")
    beside.write_bytes(NEW)
    os.replace(beside, file)


def overwrite(file: Path) -> None:
    """In place, with the old time, as some tools that copy do."""
    times = os.stat(file)
    with file.open("r+b") as stream:
        stream.write(NEW)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def append(file: Path) -> None:
    with file.open("ab") as stream:
        stream.write(NEW)


def truncate(file: Path) -> None:
    os.truncate(file, 3)


def write_again(file: Path) -> None:
    """The same bytes: who knows what was between them."""
    file.write_bytes(OLD)


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "replaced": (replace, "was replaced"),
    "overwritten in place": (overwrite, "was written to"),
    "written again": (write_again, "was written to"),
    "appended to": (append, "went from 11 to 22 bytes"),
    "truncated": (truncate, "went from 11 to 3 bytes"),
}


def test_what_did_not_change_has_the_fingerprint_of_its_files(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    record = begun(folder)
    expected = checkpoint_fingerprint(files_in(folder, [folder / name for name in NAMES]))
    assert record.finish() == expected != ""


@pytest.mark.parametrize(("change", "told"), CHANGES.values(), ids=CHANGES.keys())
def test_a_file_that_changes_while_it_is_read_is_told_by_name(
    change: Callable[[Path], None], told: str, tmp_path: Path
) -> None:
    record = begun(checkpoint(tmp_path))
    change(tmp_path / NAMES[1])
    with pytest.raises(CheckpointChanged, match=f"^the checkpoint changed while it was read: {NAMES[1]} {told}$"):
        record.finish()


@pytest.mark.parametrize(("change", "told"), CHANGES.values(), ids=CHANGES.keys())
def test_what_changed_before_it_was_read_has_the_fingerprint_that_it_has_then(
    change: Callable[[Path], None], told: str, tmp_path: Path
) -> None:
    folder = checkpoint(tmp_path)
    change(folder / NAMES[1])
    assert begun(folder).finish() == checkpoint_fingerprint(files_in(folder, [folder / name for name in NAMES]))


def test_a_change_within_one_tick_of_the_clock_of_files_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that was written a moment ago, and is written to again as soon as the load begins.

    Newer kernels tell such times apart, older ones do not.
    """
    tick = 10_000_000
    exact = os.fstat

    def of_an_older_kernel(descriptor: int) -> Any:
        found = exact(descriptor)
        times = {name: getattr(found, name) // tick * tick for name in ("st_mtime_ns", "st_ctime_ns")}
        return SimpleNamespace(**{name: getattr(found, name) for name in dir(found) if name[:3] == "st_"} | times)

    monkeypatch.setattr(os, "fstat", of_an_older_kernel)
    for _ in range(5):
        record = begun(checkpoint(tmp_path))
        (tmp_path / NAMES[0]).write_bytes(NEW)
        with pytest.raises(CheckpointChanged):
            record.finish()


def test_a_file_that_vanishes_while_it_is_read_is_told(tmp_path: Path) -> None:
    record = begun(checkpoint(tmp_path))
    (tmp_path / NAMES[0]).unlink()
    with pytest.raises(CheckpointChanged, match=rf"cannot be fingerprinted: .*No such file.*{NAMES[0]}"):
        record.finish()


def test_a_link_to_another_snapshot_does_not_matter_once_reading_has_begun(tmp_path: Path) -> None:
    first, second = checkpoint(tmp_path / "first"), checkpoint(tmp_path / "second", NEW)
    current = tmp_path / "current"
    current.symlink_to("first")
    record = ReadRecord()
    folder, paths = record.begin(str(current), [str(current / name) for name in NAMES])
    current.unlink()
    current.symlink_to("second")
    append(second / NAMES[0])
    assert (folder, paths) == (str(first), [str(first / name) for name in NAMES])
    assert record.finish() == checkpoint_fingerprint(files_in(first, [first / name for name in NAMES]))


def test_contents_that_change_without_a_trace_in_the_file_system_are_noticed(tmp_path: Path) -> None:
    """A write through a shared mapping, which on some file systems leaves all times as they were."""
    checkpoint(tmp_path)
    with (tmp_path / NAMES[1]).open("r+b") as stream, mmap.mmap(stream.fileno(), 0) as mapped:
        mapped[:] = OLD  # the page is dirty already
        record = begun(tmp_path)
        mapped[:] = NEW
        with pytest.raises(CheckpointChanged, match=r"^the checkpoint changed while it was read: .* was written to$"):
            record.finish()


def test_links_to_blobs_are_followed(tmp_path: Path) -> None:
    checkpoint(tmp_path / "blobs")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for name in NAMES:
        (snapshot / name).symlink_to(tmp_path / "blobs" / name)
    first, second = begun(snapshot), begun(snapshot)
    overwrite(tmp_path / "blobs" / NAMES[0])
    with pytest.raises(CheckpointChanged, match=f"{NAMES[0]} was written to$"):
        first.finish()
    (snapshot / NAMES[1]).unlink()
    (snapshot / NAMES[1]).symlink_to(tmp_path / "blobs" / NAMES[0])
    with pytest.raises(CheckpointChanged, match=f"{NAMES[1]} was replaced$"):
        second.finish()


def test_all_places_in_which_parts_of_a_checkpoint_are_count(tmp_path: Path) -> None:
    def read_twice() -> ReadRecord:
        record = begun(checkpoint(tmp_path / "first"))
        record.begin(str(tmp_path / "second"), [str(tmp_path / "second" / NAMES[0])])
        return record

    checkpoint(tmp_path / "second")
    before = read_twice().finish()
    assert before != begun(tmp_path / "first").finish()
    record = read_twice()
    append(tmp_path / "second" / NAMES[0])
    with pytest.raises(CheckpointChanged):
        record.finish()
    assert read_twice().finish() != before


def test_a_part_that_is_read_twice_must_be_the_same_both_times(tmp_path: Path) -> None:
    record = begun(checkpoint(tmp_path))
    replace(tmp_path / NAMES[0])
    record.begin(str(tmp_path), [str(tmp_path / NAMES[0])])
    with pytest.raises(CheckpointChanged, match=f"{NAMES[0]} was replaced"):
        record.finish()


def test_of_many_files_a_few_are_named(tmp_path: Path) -> None:
    paths = [tmp_path / f"model-{number}.bin" for number in range(9)]
    for path in paths:
        path.write_bytes(OLD)
    record = ReadRecord()
    record.begin(str(tmp_path), [str(path) for path in paths])
    for path in paths:
        append(path)
    with pytest.raises(CheckpointChanged, match=r"model-0.bin went .*, model-2.bin went .* and 6 more files$"):
        record.finish()


def test_nobody_vouches_for_files_that_could_not_be_looked_at(tmp_path: Path) -> None:
    """They may well be readable again when the load is over."""
    record = begun(tmp_path)
    checkpoint(tmp_path)
    with pytest.raises(CheckpointChanged, match="cannot be fingerprinted"):
        record.finish()


def test_a_file_that_is_replaced_while_its_fingerprint_is_taken_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = begun(checkpoint(tmp_path))
    original = fingerprint._read_samples

    def read_samples(*arguments: Any) -> Any:
        monkeypatch.setattr(fingerprint, "_read_samples", original)
        replace(tmp_path / NAMES[0])
        return original(*arguments)

    monkeypatch.setattr(fingerprint, "_read_samples", read_samples)
    with pytest.raises(CheckpointChanged, match=f"{NAMES[0]} was replaced"):
        record.finish()


def test_a_load_that_read_no_files_has_no_fingerprint() -> None:
    assert ReadRecord().finish() == ""


ASKED = ModelIdentity("org/model", "LlamaForCausalLM", "c0ffee", "bfloat16", revision="main", fingerprint="old")


def test_what_was_read_is_known_by_its_own_fingerprint(tmp_path: Path) -> None:
    served = as_read(ASKED, begun(checkpoint(tmp_path)), "new")
    assert (served.name, served.revision, served.fingerprint) == ("org/model", "main", "new")


def test_what_was_read_through_a_link_is_known_by_where_it_led_then(tmp_path: Path) -> None:
    current = tmp_path / "current"
    current.symlink_to("second")
    asked = ModelIdentity(str(tmp_path / "first"), "", "", "", name_is_path=True)
    record = begun(checkpoint(tmp_path / "second") and current)
    current.unlink()
    current.symlink_to("third")
    assert as_read(asked, record, "new").name == str(tmp_path / "second")
    assert as_read(asked, ReadRecord(), "").name == asked.name


def test_what_the_hub_sent_is_known_by_its_commit(tmp_path: Path) -> None:
    """The branch that was asked for may point elsewhere by now."""
    snapshot = checkpoint(tmp_path / "models--org--model" / "snapshots" / "c0ffee")
    assert as_read(ASKED, begun(snapshot), "new").revision == "c0ffee"


def test_a_model_that_only_another_loader_reads_is_refused() -> None:
    def configured(**attributes: Any) -> Any:
        return cast(Any, SimpleNamespace(model="org/model", **attributes))

    require_checkpoint(configured(quantization=None, model_weights=""))
    require_checkpoint(configured(quantization="awq", model_weights=""))
    with pytest.raises(ConfigError, match=r"^org/model-gguf:Q4_K_M is a GGUF model.*use --load-format gguf"):
        require_checkpoint(configured(quantization="gguf", model_weights="org/model-gguf:Q4_K_M"))
