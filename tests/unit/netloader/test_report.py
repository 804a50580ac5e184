from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.clock import Clock
from vllm_ascend.model_loader.netloader.report import Attempt, LoadReport, Phases, write_whole


def test_a_phase_takes_the_time_it_runs() -> None:
    clock = Clock()
    phases = Phases(clock)
    clock.passes(5)
    with phases("connect"):
        clock.passes(2)
    clock.passes(5)
    assert phases.seconds == {"connect": 2.0}


def test_the_outer_phase_stands_still_while_an_inner_one_runs() -> None:
    clock = Clock()
    phases = Phases(clock)
    with phases("transfer"):
        clock.passes(1)
        with phases("allocate"):
            clock.passes(10)
            with phases("verify"):
                clock.passes(100)
            clock.passes(10)
        clock.passes(1)
    assert phases.seconds == {"transfer": 2.0, "allocate": 20.0, "verify": 100.0}


def test_a_phase_that_runs_again_adds_up() -> None:
    clock = Clock()
    phases = Phases(clock)
    for _ in range(3):
        with phases("connect"):
            clock.passes(1)
        clock.passes(50)
    with phases("connect"), phases("connect"):
        clock.passes(1)
    assert phases.seconds == {"connect": 4.0}


def test_a_phase_that_fails_counts_and_the_outer_one_goes_on() -> None:
    clock = Clock()
    phases = Phases(clock)

    def fail() -> None:
        with phases("connect"):
            clock.passes(3)
            raise ConnectionRefusedError

    with phases("disk"):
        with pytest.raises(ConnectionRefusedError):
            fail()
        clock.passes(4)
    assert phases.seconds == {"connect": 3.0, "disk": 4.0}


def test_phases_are_read_while_they_run_by_whoever_holds_the_mapping() -> None:
    clock = Clock()
    phases = Phases(clock)
    seconds = phases.seconds
    with phases("connect"):
        clock.passes(1)
    assert seconds is phases.seconds
    assert seconds == {"connect": 1.0}


nestings = st.recursive(
    st.integers(0, 9), lambda inner: st.tuples(st.sampled_from("abc"), st.lists(inner, max_size=4)), max_leaves=12
)


@given(steps=st.lists(nestings, max_size=4))
def test_the_phases_add_up_to_the_time_in_which_any_ran(steps: list[Any]) -> None:
    clock = Clock(0.0)
    phases = Phases(clock)

    def run(steps: list[Any]) -> float:
        spent = 0.0
        for step in steps:
            if isinstance(step, tuple):
                with phases(step[0]):
                    spent += run(step[1])
            else:
                clock.passes(step)
                spent += step
        return spent

    with phases("all"):
        spent = run(steps)
    assert sum(phases.seconds.values()) == spent


PEER_TO_PEER = LoadReport(
    role="target",
    rank=3,
    outcome="p2p",
    source="10.0.0.1:19000",
    transport="tcp",
    bytes=15_231_000_000,
    received={"10.0.0.3:19000": 231_000_000, "10.0.0.1:19000": 15_016_777_216},
    verified="blake3",
    seconds={"connect": 0.0123, "join": 0.0004, "allocate": 0.5, "transfer": 6.25, "serve": 0.25},
    listening="10.0.0.2:19003",
)


def test_the_line_of_a_load_from_a_source() -> None:
    assert PEER_TO_PEER.line() == (
        "netloader loaded the target weights of rank 3 from 10.0.0.1:19000 by tcp: 15231.0 MB in 6.763 s "
        "(connect 0.012, allocate 0.500, transfer 6.250, serve 0.250), serving on 10.0.0.2:19003; 15016.8 MB came from "
        "10.0.0.1:19000, 231.0 MB came from 10.0.0.3:19000"
    )


def test_the_line_says_nothing_of_givers_where_the_source_has_brought_all() -> None:
    received = {"10.0.0.1:19000": 15_231_000_000}
    for came, shared in ((received, {}), ({}, received), ({}, {})):
        line = msgspec.structs.replace(PEER_TO_PEER, received=came, shared=shared).line()
        assert line.endswith("serving on 10.0.0.2:19003")


def test_the_line_names_those_who_brought_most() -> None:
    received = {f"10.0.0.{number}:1": number * 1_000_000 for number in range(1, 8)}
    report = msgspec.structs.replace(PEER_TO_PEER, received=received, shared={"127.0.0.1:2": 20_000_000})
    assert report.line().endswith(
        "; 20.0 MB are pages of 127.0.0.1:2, 7.0 MB came from 10.0.0.7:1, 6.0 MB came from 10.0.0.6:1, "
        "5.0 MB came from 10.0.0.5:1, 10.0 MB from 4 others"
    )


def test_the_line_of_a_load_from_disk_names_every_failed_attempt() -> None:
    report = LoadReport(
        role="draft",
        rank=0,
        outcome="disk",
        bytes=1_000_000,
        seconds={"disk": 1.5},
        attempts=[
            Attempt("a:1", None, "no connection within 10 s: Connection refused", 0.1),
            Attempt("[fd00::1]:2", "shared_memory", "the descriptor is gone", 0.2),
        ],
        not_served="SERVE is false",
    )
    assert report.line() == (
        "netloader loaded the draft weights of rank 0 from disk: 1.0 MB in 1.500 s (disk 1.500), "
        "not serving (SERVE is false); 2 failed: a:1: no connection within 10 s: Connection refused; "
        "[fd00::1]:2 by shared_memory: the descriptor is gone"
    )


def test_the_line_of_a_failed_load_does_not_claim_the_disk() -> None:
    line = LoadReport("target", 0, "failed", seconds={"connect": 1.0}).line()
    assert line == "netloader loaded no target weights into rank 0 after 1.000 s (connect 1.000)"


def test_the_line_of_a_failed_reload_does_not_say_that_nothing_is_served() -> None:
    report = LoadReport("target", 0, "failed", attempts=[Attempt("a:1", None, "gone", 0.5)], not_served="why")
    assert report.line() == "netloader loaded no target weights into rank 0 after 0.000 s; 1 failed: a:1: gone"


def test_the_line_of_a_failed_load_shows_no_none() -> None:
    assert "None" not in LoadReport("target", 0, "failed").line()


def test_serving_does_not_count_as_loading() -> None:
    assert PEER_TO_PEER.load_seconds == pytest.approx(6.7627)
    assert LoadReport("target", 0, "disk").load_seconds == 0


def test_the_line_is_one_line() -> None:
    assert "\n" not in PEER_TO_PEER.line()


def test_a_written_report_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "report0.json"
    report = msgspec.structs.replace(PEER_TO_PEER, attempts=[Attempt("a:1", None, "gone", 0.5)])
    report.write(path)
    assert msgspec.json.decode(path.read_bytes(), type=LoadReport) == report
    assert path.read_bytes().endswith(b"\n}\n")


def test_the_keys_of_a_written_report_stay_the_same_across_releases(tmp_path: Path) -> None:
    path = tmp_path / "report0.json"
    LoadReport("target", 0, "disk", attempts=[Attempt("a:1", None, "gone", 0.5)], not_served="why").write(path)
    assert json.loads(path.read_text()) == {
        "role": "target",
        "rank": 0,
        "outcome": "disk",
        "source": None,
        "transport": None,
        "bytes": 0,
        "received": {},
        "shared": {},
        "verified": None,
        "root": None,
        "seconds": {},
        "attempts": [{"source": "a:1", "transport": None, "reason": "gone", "seconds": 0.5, "received": 0}],
        "listening": None,
        "not_served": "why",
        "changed": None,
    }


def test_a_report_names_the_changed_tensors_or_says_that_there_are_none(tmp_path: Path) -> None:
    path = tmp_path / "report0.json"
    for changed in (["lm_head.weight", "scale"], []):
        report = msgspec.structs.replace(PEER_TO_PEER, changed=changed)
        report.write(path)
        assert json.loads(path.read_text())["changed"] == changed
        assert msgspec.json.decode(path.read_bytes(), type=LoadReport) == report


def test_a_report_of_an_earlier_release_reads_back() -> None:
    report = msgspec.structs.replace(PEER_TO_PEER, received={}, verified=None, attempts=[Attempt("a:1", None, "no", 1)])
    older = msgspec.to_builtins(report)
    for later in ("changed", "received", "verified"):
        del older[later]
    del older["attempts"][0]["received"]
    assert msgspec.json.decode(msgspec.json.encode(older), type=LoadReport) == report


def test_a_report_tells_how_many_bytes_came_from_where_and_by_what_they_were_verified(tmp_path: Path) -> None:
    path = tmp_path / "report0.json"
    failed = Attempt("10.0.0.3:19000", "tcp", "the connection broke", 0.5, received=231_000_000)
    msgspec.structs.replace(PEER_TO_PEER, attempts=[failed]).write(path)
    written = json.loads(path.read_text())
    assert written["received"] == {"10.0.0.3:19000": 231_000_000, "10.0.0.1:19000": 15_016_777_216}
    assert written["verified"] == "blake3"
    assert written["attempts"][0]["received"] == 231_000_000
    assert sum(written["received"].values()) - written["bytes"] == 16_777_216


def test_reports_do_not_share_their_defaults() -> None:
    first, second = (LoadReport("target", 0, "disk") for _ in range(2))
    for name in ("received", "seconds", "attempts"):
        assert getattr(first, name) is not getattr(second, name)


@pytest.mark.parametrize("outcome", ["p2p", "disk", "failed"])
def test_a_load_ends_in_one_of_three_ways(outcome: str) -> None:
    report = msgspec.to_builtins(PEER_TO_PEER) | {"outcome": outcome}
    assert msgspec.convert(report, LoadReport).outcome == outcome


def test_weights_come_from_sources_or_from_disk_and_never_from_both() -> None:
    report = msgspec.to_builtins(PEER_TO_PEER) | {"outcome": "mixed"}
    with pytest.raises(msgspec.ValidationError, match="Invalid enum value 'mixed'"):
        msgspec.convert(report, LoadReport)


def test_the_changed_tensors_are_not_in_the_line() -> None:
    report = msgspec.structs.replace(PEER_TO_PEER, changed=[f"layers.{n}.weight" for n in range(1000)])
    assert report.line() == PEER_TO_PEER.line()


def test_a_report_replaces_an_older_one(tmp_path: Path) -> None:
    path = tmp_path / "report0.json"
    path.write_text("x" * 10_000)
    PEER_TO_PEER.write(path)
    assert json.loads(path.read_text())["rank"] == 3


def test_a_report_that_cannot_be_written_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        PEER_TO_PEER.write(tmp_path / "missing" / "report0.json")


def test_writing_leaves_one_file(tmp_path: Path) -> None:
    write_whole(tmp_path / "rank0.txt", b"first")
    write_whole(tmp_path / "rank0.txt", b"second")
    assert os.listdir(tmp_path) == ["rank0.txt"]
    assert (tmp_path / "rank0.txt").read_bytes() == b"second"


def test_whoever_reads_the_old_file_reads_it_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "rank0.txt"
    write_whole(path, b"the old one, whole")
    with open(path, "rb", buffering=0) as reader:
        assert reader.read(4) == b"the "
        write_whole(path, b"new")
        assert reader.read() == b"old one, whole"
    assert path.read_bytes() == b"new"


@contextlib.contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize(("mask", "mode"), [(0, 0o644), (0o022, 0o644), (0o027, 0o640), (0o077, 0o600)], ids=oct)
def test_a_written_file_is_writable_for_its_owner_only_and_readable_as_the_umask_allows(
    tmp_path: Path, mask: int, mode: int
) -> None:
    path = tmp_path / "rank0.txt"
    path.write_text("an older one")
    path.chmod(0o666)
    with umask(mask):
        write_whole(path, b"content")
    assert stat.S_IMODE(path.stat().st_mode) == mode


def scratch_of(path: Path) -> Path:
    """Where the content lies before it is whole."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def test_the_scratch_file_is_where_these_tests_expect_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replaced = list[Path]()
    monkeypatch.setattr(Path, "replace", lambda scratch, _: replaced.append(scratch))
    write_whole(tmp_path / "rank0.txt", b"content")
    assert replaced == [scratch_of(tmp_path / "rank0.txt")]


@pytest.mark.parametrize("exists", [True, False], ids=["to a file", "to nothing"])
def test_a_link_in_the_way_is_not_written_through(tmp_path: Path, exists: bool) -> None:
    path, elsewhere = tmp_path / "rank0.txt", tmp_path / "elsewhere"
    if exists:
        elsewhere.write_text("precious")
    scratch_of(path).symlink_to(elsewhere)
    write_whole(path, b"content")
    assert (path.read_bytes(), path.is_symlink()) == (b"content", False)
    assert elsewhere.exists() == exists
    assert not exists or elsewhere.read_text() == "precious"
    assert not scratch_of(path).is_symlink()


def test_a_file_in_the_way_is_not_written_into(tmp_path: Path) -> None:
    path, held = tmp_path / "rank0.txt", tmp_path / "held"
    scratch_of(path).write_text("from a process of the same number")
    held.hardlink_to(scratch_of(path))
    write_whole(path, b"content")
    assert path.read_bytes() == b"content"
    assert held.read_text() == "from a process of the same number"


@pytest.mark.parametrize("kind", ["link", "file"])
def test_what_comes_into_the_way_at_the_last_moment_is_an_os_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    path, elsewhere = tmp_path / "rank0.txt", tmp_path / "elsewhere"
    elsewhere.write_text("precious")
    unlink = Path.unlink

    def unlink_and_lose_the_race(scratch: Path, missing_ok: bool = False) -> None:
        unlink(scratch, missing_ok=missing_ok)
        monkeypatch.undo()
        put = scratch.symlink_to if kind == "link" else scratch.hardlink_to
        put(elsewhere)

    monkeypatch.setattr(Path, "unlink", unlink_and_lose_the_race)
    with pytest.raises(FileExistsError):
        write_whole(path, b"content")
    assert elsewhere.read_text() == "precious"
    assert not path.exists()


def test_a_link_at_the_target_is_replaced_and_what_it_led_to_stays(tmp_path: Path) -> None:
    path, elsewhere = tmp_path / "rank0.txt", tmp_path / "elsewhere"
    elsewhere.write_text("precious")
    path.symlink_to(elsewhere)
    write_whole(path, b"content")
    assert (path.read_bytes(), path.is_symlink()) == (b"content", False)
    assert elsewhere.read_text() == "precious"


def test_writing_that_fails_leaves_no_partial_file(tmp_path: Path) -> None:
    (tmp_path / "rank0.txt").mkdir()
    with pytest.raises(IsADirectoryError):
        write_whole(tmp_path / "rank0.txt", b"content")
    assert os.listdir(tmp_path) == ["rank0.txt"]
