"""Which small files a source tells, and what a client takes of what it is told."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from support.peers.corpus import SAID_BY, Corpus
from support.peers.impostor import Act, Impostor, answering, sending
from support.peers.messages import payload
from support.peers.strangers import Intruder
from support.sources import IDENTITY, PATIENT, SMALL, serving
from vllm_ascend.model_loader.netloader.checkpoint import small_files
from vllm_ascend.model_loader.netloader.checkpoint.note import note_in
from vllm_ascend.model_loader.netloader.checkpoint.small_files import FILE_LIMIT, SmallFiles
from vllm_ascend.model_loader.netloader.errors import CannotBeWritten, FileRefused, ProtocolError, SourceError
from vllm_ascend.model_loader.netloader.pull.small_files import configured, files_at
from vllm_ascend.model_loader.netloader.server.requests import MAX_PARTS
from vllm_ascend.model_loader.netloader.transport.registry import transports
from vllm_ascend.model_loader.netloader.wire.access import Access
from vllm_ascend.model_loader.netloader.wire.conversation import Role
from vllm_ascend.model_loader.netloader.wire.messages import FilePart, Files, ReadFile, SmallFile

pytestmark = pytest.mark.timeout(60)


def test_only_data_files_of_the_fixed_list_are_told(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "model.py", "configuration.py", "model.safetensors", ".env"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "merges.txt").mkdir()
    os.mkfifo(tmp_path / "vocab.json")
    (tmp_path / "vocab.txt").touch()
    os.truncate(tmp_path / "vocab.txt", FILE_LIMIT + 1)
    files = SmallFiles(tmp_path)
    assert files.sizes == {"config.json": 2, "tokenizer.json": 2}
    for name in ("model.py", "../config.json", "/etc/passwd", "model.safetensors", "", "vocab.txt"):
        with pytest.raises(FileRefused):
            files.read(name, 0, 10)
    assert not [name for name in small_files.NAMES if name.endswith(".py") or ".." in name or name.startswith("/")]


def test_a_directory_that_is_not_there_has_no_files(tmp_path: Path) -> None:
    assert SmallFiles(tmp_path / "nowhere").sizes == {}


def test_a_link_out_of_the_directory_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").symlink_to("../secret")
    (folder / "tokenizer.json").symlink_to("real.json")
    (folder / "real.json").write_text("{}")
    assert SmallFiles(folder).sizes == {"tokenizer.json": 2}
    (tmp_path / "link").symlink_to(folder)
    assert SmallFiles(tmp_path / "link").sizes == {"tokenizer.json": 2}


def test_links_of_the_hubs_cache_lead_to_its_blobs_only(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--model"
    snapshot = repository / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "1234").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("c0ffee")
    (snapshot / "config.json").symlink_to("../../blobs/1234")
    (snapshot / "tokenizer.json").symlink_to("../../refs/main")
    assert SmallFiles(snapshot).sizes == {"config.json": 2}


def test_a_file_that_has_changed_since_the_load_is_not_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    files = SmallFiles(tmp_path)
    assert files.digest("config.json") == hashlib.sha256(b"{}").digest()
    (tmp_path / "new").write_text("[]")
    (tmp_path / "new").rename(tmp_path / "config.json")
    with pytest.raises(FileRefused, match="has changed since"):
        files.read("config.json", 0, 2)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileRefused, match="cannot be read"):
        files.read("config.json", 0, 2)


def test_files_are_read_in_parts_and_compared(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(bytes(range(256)) * 12_000)
    with serving(SMALL, transports(["tcp"])) as (server, source):
        server.tell_files(SmallFiles(tmp_path))
        with files_at(source, IDENTITY, 5.0, Access()) as files:
            assert files.read("tokenizer.json") == (tmp_path / "tokenizer.json").read_bytes()
        with Intruder(source).greet() as line:
            assert "no such file" in line.say(ReadFile("../tokenizer.json", 0)).hear()["reason"]
            line.hear_out()


def test_parts_on_one_connection_end(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with serving(SMALL, transports(["tcp"]), timeouts=PATIENT) as (server, source):
        server.tell_files(SmallFiles(tmp_path))
        with Intruder(source).greet() as line:
            for _ in range(MAX_PARTS):
                assert line.say(ReadFile("config.json", 0)).hear()["data"] == b"{}"
            line.hear_out()


DIGEST = hashlib.sha256(b"{}").digest()


def told(*files: SmallFile) -> Files:
    return Files(files, IDENTITY)


OTHER = msgspec.structs.replace(IDENTITY, name="org/other")
CONFIG = told(SmallFile("config.json", 2, DIGEST))


@pytest.mark.parametrize(
    ("acts", "expected"),
    {
        "code": ({"AskFiles": answering(told(SmallFile("model.py", 2, DIGEST)))}, "not to be taken"),
        "another directory": ({"AskFiles": answering(told(SmallFile("../config.json", 2, DIGEST)))}, "not to be taken"),
        "an absolute path": ({"AskFiles": answering(told(SmallFile("/config.json", 2, DIGEST)))}, "not to be taken"),
        "twice": ({"AskFiles": answering(told(*CONFIG.files, *CONFIG.files))}, "a file twice"),
        "too large": ({"AskFiles": answering(told(SmallFile("config.json", FILE_LIMIT + 1, DIGEST)))}, "at most"),
        "no digest": ({"AskFiles": answering(told(SmallFile("config.json", 2, b"")))}, "with a digest"),
        "too much in all": (
            {
                "AskFiles": answering(
                    told(*(SmallFile(name, FILE_LIMIT, DIGEST) for name in ("config.json", "vocab.txt", "merges.txt")))
                )
            },
            "more than",
        ),
        "another model": ({"AskFiles": answering(Files((), OTHER))}, "another model"),
        "other contents": (
            {"AskFiles": answering(CONFIG), "ReadFile": answering(FilePart(b"[]"))},
            "is not the file of its digest",
        ),
        "too short": ({"AskFiles": answering(CONFIG), "ReadFile": answering(FilePart(b""))}, "another size"),
        "too long": ({"AskFiles": answering(CONFIG), "ReadFile": answering(FilePart(b"{} "))}, "another size"),
    }.values(),
    ids=str,
)
def test_a_source_makes_no_file_but_those_that_it_may(acts: dict[str, Act], expected: str) -> None:
    with (
        Impostor(acts) as impostor,
        pytest.raises(SourceError, match=expected),
        files_at(impostor.endpoint, IDENTITY, 5.0, Access()) as files,
    ):
        files.read("config.json")


@pytest.mark.parametrize("kind", [Files, FilePart])
def test_who_takes_files_outlives_whatever_is_answered(kind: type[Any]) -> None:
    corpus, right = Corpus(5, Role.SERVER), next(each for each in SAID_BY[Role.SERVER] if isinstance(each, kind))
    failed = 0
    for _ in range(80):
        strange = sending(corpus.stream(corpus.content(payload(right))))
        acts = {"AskFiles": strange if kind is Files else answering(CONFIG), "ReadFile": strange}
        with Impostor(acts) as impostor:
            try:
                with files_at(impostor.endpoint, IDENTITY, 5.0, Access()) as files:
                    assert not files.files or files.read("config.json") == b"{}"
            except SourceError:
                failed += 1
    assert failed > 40


def test_a_configuration_is_as_the_source_understands_it() -> None:
    plain = b'{"a":1, "dtype": "float16"}'
    assert configured(plain, {}) is plain
    assert configured(plain, {"dtype": "bfloat16", "tie_word_embeddings": True}) is plain
    assert json.loads(configured(plain, {"tie_word_embeddings": False})) == {
        "a": 1,
        "dtype": "float16",
        "tie_word_embeddings": False,
    }
    nested = json.loads(configured(b'{"text_config": {}}', {"dtype": "bfloat16", "tie_word_embeddings": False}))
    assert nested == {
        "text_config": {"tie_word_embeddings": False},
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    assert json.loads(configured(b"{}", {"dtype": "__import__"})) == {}
    with pytest.raises(CannotBeWritten, match="GPTQ"):
        configured(b'{"quantization_config": {"bits": 4}}', {}, "gptq_marlin")
    named = b'{"quantization_config": {"modules_in_block_to_quantize": ["q_proj"]}}'
    assert configured(named, {}, "gptq_marlin") is named
    for strange in (b"", b"[]", b"[" * 100_000, b"\xff"):
        with pytest.raises(ProtocolError):
            configured(strange, {})


def test_a_note_that_cannot_be_read_counts_as_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert note_in(tmp_path) is None
    assert not caplog.records
    for strange in ("", "[]", '{"fingerprint": 3}', "[" * 100_000):
        (tmp_path / "netloader-pull.json").write_text(strange)
        assert note_in(tmp_path) is None
    assert "does not count" in caplog.text
