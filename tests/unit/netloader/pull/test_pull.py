"""What `netloader pull` writes, what it fetches again, and what it refuses."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file

from support.sources import IDENTITY, SMALL, Tensors, publication, serving
from support.wait import wait_until
from vllm_ascend.model_loader.netloader import cli
from vllm_ascend.model_loader.netloader.checkpoint.note import note_in
from vllm_ascend.model_loader.netloader.checkpoint.small_files import SmallFiles
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import SourcesExhausted
from vllm_ascend.model_loader.netloader.pull.directory import open_directory
from vllm_ascend.model_loader.netloader.pull.pull import Pull
from vllm_ascend.model_loader.netloader.server.answers import Peer
from vllm_ascend.model_loader.netloader.server.publications import Publication
from vllm_ascend.model_loader.netloader.server.server import WeightServer
from vllm_ascend.model_loader.netloader.transport import digests
from vllm_ascend.model_loader.netloader.transport.registry import transports
from vllm_ascend.model_loader.netloader.weights.identity import ModelIdentity, RankCoordinates

TCP = transports(["tcp"])
CHUNK = 1024
LARGE = Tensors.of_shapes((40, 33), (7,), (2, 3, 5), dtype=torch.bfloat16)
OTHERS = Tensors.of_shapes((40, 33), (7,), (2, 3, 5), seed=1, dtype=torch.bfloat16)
"""Other contents of the same shapes."""
FILE = "model-rank-0-part-0.safetensors"

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model's directory, with files that are told and files that are not."""
    folder = tmp_path / "model"
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama", "dtype": "bfloat16"}')
    (folder / "tokenizer.json").write_bytes(b"t" * 3_000_000)
    (folder / "chat_template.jinja").write_text("")
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "modeling_llama.py").write_text("raise SystemExit")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@contextlib.contextmanager
def source_of(
    tensors: Tensors, model: Path, resolved: dict[str, bool | str] | None = None, **options: Any
) -> Iterator[tuple[WeightServer, Endpoint]]:
    with serving(tensors, TCP, **options) as (server, endpoint):
        server.tell_files(SmallFiles(model, resolved or {}))
        yield server, endpoint


def pull(*arguments: object, expected: int = 0) -> None:
    assert cli.main(["pull", *map(str, arguments)]) == expected


def assert_holds(path: Path, tensors: Tensors) -> None:
    found = load_file(path)
    assert found.keys() == tensors.by_name.keys()
    for name, tensor in tensors.by_name.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def files_in(folder: Path) -> set[str]:
    return {str(each.relative_to(folder)) for each in folder.rglob("*") if each.is_file()}


def test_a_directory_has_the_weights_and_the_small_files_and_nothing_else(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "out"
    with source_of(LARGE, model) as (_, source):
        pull(source, "--out", out, "--json")
    assert_holds(out / FILE, LARGE)
    small = {"config.json", "tokenizer.json", "chat_template.jinja", "1_Pooling/config.json"}
    assert files_in(out) == {FILE, "netloader-pull.json", *small}
    assert all((out / name).read_bytes() == (model / name).read_bytes() for name in small)

    told = json.loads(capsys.readouterr().out)
    assert set(told["files"]) == small
    assert told["ranks"][0]["fetched"] == told["ranks"][0]["bytes"] == LARGE.manifest.nbytes
    note = note_in(out)
    assert note is not None
    assert (note.fingerprint, note.name, note.roots) == ("f00d", "org/model", {FILE: told["ranks"][0]["root"]})


def fetched_again(
    change: Callable[[Path], object], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> int:
    """The bytes of weights that a second run fetches after `change` of the file with the weights."""
    out = tmp_path / "out"
    with source_of(LARGE, model) as (_, source):
        pull(source, "--out", out)
        change(out / FILE)
        capsys.readouterr()
        pull(source, "--out", out, "--json")
    assert_holds(out / FILE, LARGE)
    assert not list(out.glob("*.part"))
    assert files_in(out) >= {"config.json", "netloader-pull.json"}
    (rank,) = json.loads(capsys.readouterr().out)["ranks"]
    return int(rank["fetched"])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def lose_the_second_half(path: Path) -> None:
    data = bytearray(path.read_bytes())
    path.unlink()
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    path.with_name(path.name + ".part").write_bytes(data)


CHANGES: dict[str, tuple[Callable[[Path], object], int, int]] = {
    "nothing": (lambda path: None, 0, 0),
    "a byte": (flip, 1, CHUNK),
    "it was interrupted": (lose_the_second_half, 1, LARGE.manifest.nbytes // 2 + CHUNK),
    "it was cut": (lambda path: path.write_bytes(path.read_bytes()[:-1]), 1, CHUNK),
    "it is another file": (lambda path: path.write_bytes(b"something else"), CHUNK, LARGE.manifest.nbytes),
    "it is gone": (lambda path: path.unlink(), CHUNK, LARGE.manifest.nbytes),
}
"""What happens to the file, and how many bytes at least and at most are fetched again."""


@pytest.mark.parametrize("change", CHANGES)
def test_a_second_run_fetches_what_is_missing_or_damaged(
    change: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    happens, least, most = CHANGES[change]
    assert least <= fetched_again(happens, model, tmp_path, capsys) <= most


def test_a_pull_that_was_killed_goes_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(digests, "CHUNK_BYTES", 4 << 20)  # the size in the process that is killed
    tensors, out = Tensors.of_shapes((6, 1 << 20)), tmp_path / "out"
    with source_of(tensors, model, max_bandwidth=16 << 20) as (_, source):
        command = [sys.executable, "-m", cli.__name__, "pull", str(source), "--out", str(out)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_until(lambda: process.poll() is not None or has_a_chunk(out / f"{FILE}.part", tensors))
        finally:
            process.kill()
            process.wait()
        pull(source, "--out", out, "--json")
    assert_holds(out / FILE, tensors)
    (rank,) = json.loads(capsys.readouterr().out)["ranks"]
    assert rank["fetched"] < tensors.manifest.nbytes


def has_a_chunk(path: Path, tensors: Tensors) -> bool:
    """Whether the last bytes of the first chunk have come."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        header = path.stat().st_size - tensors.manifest.nbytes
        return header > 0 and any(os.pread(file.fileno(), 64, header + (4 << 20) - 64))
    return False


def test_a_second_run_does_not_touch_what_is_right(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with source_of(LARGE, model) as (_, source):
        pull(source, "--out", out)
        before = {name: (out / name).stat().st_ino for name in files_in(out) - {"netloader-pull.json"}}
        (out / "tokenizer.json").write_text("damaged")
        pull(source, "--out", out)
    assert {name for name, inode in before.items() if (out / name).stat().st_ino != inode} == {"tokenizer.json"}
    assert (out / "tokenizer.json").stat().st_size == 3_000_000


def test_another_model_takes_the_place_of_an_earlier_one(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with source_of(LARGE, model) as (_, source):
        pull(source, "--out", out)
    (out / "model-rank-1-part-0.safetensors").write_text("of a larger partition")
    with source_of(OTHERS, model) as (_, source):
        pull(source, "--out", out)
    assert_holds(out / FILE, OTHERS)
    assert {name for name in files_in(out) if name.startswith("model-")} == {FILE}


@pytest.mark.parametrize("tensors", [OTHERS, SMALL], ids=["of the same shapes", "of other shapes"])
def test_who_reads_a_complete_file_never_sees_it_change(tensors: Tensors, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with source_of(LARGE, model) as (_, source):
        pull(source, "--out", out)
    before = (out / FILE).read_bytes()
    with (out / FILE).open("rb") as reader:
        with source_of(tensors, model) as (_, source):
            pull(source, "--out", out)
        assert reader.read() == before
    assert_holds(out / FILE, tensors)


RANKS = tuple(RankCoordinates(tp_rank=rank, tp_size=2) for rank in range(2))


@contextlib.contextmanager
def instance(model: Path) -> Iterator[tuple[tuple[WeightServer, WeightServer], Endpoint]]:
    with (
        source_of(LARGE, model, coordinates=RANKS[0]) as (first, endpoint),
        source_of(OTHERS, model, coordinates=RANKS[1]) as (second, _),
    ):
        ranks = [Peer(rank, "", server.port) for rank, server in zip(RANKS, (first, second), strict=True)]
        for server in (first, second):
            server.refer_to(ranks)
        yield (first, second), endpoint


def test_all_ranks_of_an_instance_come_from_one_address(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with instance(model) as (_, source):
        pull(source, "--out", tmp_path / "out")
    assert_holds(tmp_path / "out" / FILE, LARGE)
    assert_holds(tmp_path / "out" / "model-rank-1-part-0.safetensors", OTHERS)
    assert "--tensor-parallel-size 2" in capsys.readouterr().out


def test_stages_of_a_pipeline_have_files_of_their_own(model: Path, tmp_path: Path) -> None:
    with instance(model) as ((first, second), source):
        for number, server in enumerate((first, second)):
            place = RankCoordinates(pp_rank=number, pp_size=2)
            server.publish(Publication(IDENTITY, place, LARGE.store(3)))
        pull(source, "--out", tmp_path / "out")
    assert_holds(tmp_path / "out" / "model-pp-1-tp-0-part-0.safetensors", LARGE)


def test_a_rank_that_is_missing_is_named(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with source_of(LARGE, model, coordinates=RANKS[0]) as (_, source):
        pull(source, "--out", tmp_path / "out", expected=1)
    assert "tensor parallel rank 1 of 2" in capsys.readouterr().err


def test_weights_that_are_replaced_between_two_ranks_never_lie_beside_each_other(model: Path, tmp_path: Path) -> None:
    with instance(model) as ((first, _), source):

        @contextlib.contextmanager
        def replacing(name: str, _: int) -> Iterator[Callable[[int], None]]:
            if "rank-1" in name:
                first.publish(Publication(IDENTITY, RANKS[0], OTHERS.store(5)))
            yield lambda _: None

        with pytest.raises(SourcesExhausted, match="does not have any more what was fetched"):
            Pull([source], tmp_path / "out", bar=replacing).run()
        assert not list((tmp_path / "out").glob("*.safetensors"))
        pull(source, "--out", tmp_path / "out")
    assert_holds(tmp_path / "out" / FILE, OTHERS)


def test_what_is_replaced_by_another_checkpoint_is_not_taken(model: Path, tmp_path: Path) -> None:
    with instance(model) as ((_, second), source):
        changed = msgspec.structs.replace(IDENTITY, fingerprint="another")
        second.publish(Publication(changed, RANKS[1], LARGE.store(5)))
        pull(source, "--out", tmp_path / "out", expected=1)


def test_several_sources_share_the_work_and_must_hold_the_same(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with source_of(LARGE, model) as (_, one), source_of(LARGE, model) as (_, other):
        pull(one, other, "--out", tmp_path / "out")
        named = msgspec.structs.replace(IDENTITY, name="org/other")
        with source_of(LARGE, model, identity=named) as (_, third):
            pull(one, third, "--out", tmp_path / "out", expected=1)
    assert "hold different models" in capsys.readouterr().err


def identity(**changes: Any) -> ModelIdentity:
    return msgspec.structs.replace(IDENTITY, **changes)


@pytest.mark.parametrize(
    ("options", "expected"),
    {
        "experts over replicas": ({"coordinates": RankCoordinates(ep_size=2)}, "experts that are spread over 2 ranks"),
        "load options": ({"identity": identity(load_options="expert load balancing")}, "expert load balancing"),
    }.values(),
    ids=str,
)
def test_what_the_format_has_no_place_for_is_refused_by_name(
    options: dict[str, Any], expected: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with source_of(LARGE, model, **options) as (_, source):
        pull(source, "--out", tmp_path / "out", expected=3)
    assert expected in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("model-*"))


def test_what_loading_sets_beside_the_tensors_is_refused_by_name(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with source_of(SMALL, model) as (server, source):
        server.publish(
            Publication(IDENTITY, RankCoordinates(), replace(SMALL.store(3), attributes={"model.own_embed": True}))
        )
        pull(source, "--out", tmp_path / "out", expected=3)
    assert "model.own_embed, which loading sets" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_draft_is_left_out_by_name(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with source_of(SMALL, model) as (server, source):
        server.publish(publication("draft"))
        pull(source, "--out", tmp_path / "out")
    assert "left out: the draft weights" in capsys.readouterr().out


def test_a_tensor_that_lies_otherwise_is_refused_by_name(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with source_of(Tensors({"plain": torch.ones(3), "turned": torch.ones(2, 3).t()}), model) as (_, source):
        pull(source, "--out", tmp_path / "out", expected=3)
    assert "turned, whose elements lie in another order" in capsys.readouterr().err


def test_only_an_empty_directory_or_that_of_a_pull_is_written(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with source_of(SMALL, model) as (_, source):
        pull(source, "--out", model, expected=4)
        pull(source, "--out", model / "config.json", expected=4)
        with open_directory(tmp_path / "busy"):
            pull(source, "--out", tmp_path / "busy", expected=4)
    assert "has files that are not of a pull" in capsys.readouterr().err
    assert (model / "model.safetensors").read_bytes() == b"weights"


def test_files_only_leaves_no_weights_and_a_note(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with source_of(LARGE, model, {"tie_word_embeddings": False}, coordinates=RANKS[0]) as (_, source):
        pull(source, "--out", out, "--files-only")
    assert not list(out.glob("model-*"))
    assert json.loads((out / "config.json").read_text()) == {
        "model_type": "llama",
        "dtype": "bfloat16",
        "tie_word_embeddings": False,
    }
    note = note_in(out)
    assert note is not None
    assert (note.fingerprint, note.name) == ("f00d", "org/model")


def test_files_only_needs_to_know_which_model_it_is(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unknown = identity(fingerprint="", name="/models/one", name_is_path=True)
    with source_of(SMALL, model, identity=unknown) as (_, source):
        pull(source, "--out", tmp_path / "out", "--files-only", expected=3)
    assert "knows its model by a path only" in capsys.readouterr().err


def test_a_source_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(SMALL, TCP) as (_, source):
        pull(source, "--out", tmp_path / "out", expected=1)
    assert "does not tell the files of a model" in capsys.readouterr().err
    pull(source, "--out", tmp_path / "out", expected=1)
    assert f"{source}: no connection" in capsys.readouterr().err
    pull(source, "--out", tmp_path / "out", "--json", expected=1)
    assert json.loads(capsys.readouterr().out)["status"] == 1
