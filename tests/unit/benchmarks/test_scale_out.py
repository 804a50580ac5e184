"""The measured swarm without namespaces: processes on the loopback interface. Counts decide, not times."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import scale_out
from benchmarks.harness import namespaces
from benchmarks.harness.testbed import Run, Testbed

NBYTES = 96 << 20
RATE = 24 << 20
"""So slow that the loads overlap: what one alone needs, four seconds, is much more than it takes to find the others."""
COUNT = 4

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def bed() -> Iterator[Testbed]:
    with Testbed(has_hosts=False) as bed:
        yield bed


def loaded(bed: Testbed, *, relays: bool = True, killed_after: float | None = None) -> Run:
    source = bed.hold("first", NBYTES, RATE)
    try:
        return bed.load(COUNT, NBYTES, [source], RATE, relays=relays, killed_after=killed_after)
    finally:
        bed.release("first")


def test_hosts_that_start_together_bring_the_weights_to_each_other(bed: Testbed) -> None:
    run = loaded(bed)
    assert run.finished == COUNT
    assert run.failures == []
    assert run.copies < COUNT - 1
    assert run.relayed >= 2
    assert run.twice <= 0.1


def test_all_others_finish_where_one_in_the_middle_is_killed(bed: Testbed) -> None:
    run = loaded(bed, killed_after=NBYTES / RATE / 2)
    assert run.finished == COUNT - 1
    assert run.relayed >= 2
    assert run.twice <= 0.1


def test_without_relays_each_takes_everything_from_the_first(bed: Testbed) -> None:
    run = loaded(bed, relays=False)
    assert (run.finished, run.copies, run.relayed) == (COUNT, COUNT, 0)


def test_where_namespaces_cannot_be_had_the_program_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match=r"unshare, ip, tc \(util-linux, iproute2\) is missing"):
        namespaces.enter()
    for tool in ("unshare", "ip", "tc"):
        (tmp_path / tool).symlink_to(shutil.which("false", path="/usr/bin:/bin") or sys.executable)
    with pytest.raises(SystemExit, match="network namespaces are not permitted here"):
        namespaces.enter()


def test_what_was_measured_is_shown_and_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    def run(seconds: float, copies: float, others: float = 0.0) -> Run:
        return Run(seconds, seconds, 1, copies, 0.0, 0, 0.5, others, [])

    relay = {"1": [run(10.0, 1.0)], "16": [run(12.0, 1.25)]}
    star = {"1": [run(2.0, 1.0)], "16": [run(32.0, 16.0, others=0.5)]}
    cases = {scale_out.ONE_SLOW: [run(8.0, 1.0)], scale_out.TWO_SLOW: [run(4.0, 1.0)]}
    figures = scale_out.Figures(
        1 << 28, 1 << 25, 12_500_000, True, False, {"relay": relay, "star": star, "cases": cases}
    )

    scale_out.show(figures)
    shown = capsys.readouterr().out
    assert "links of 100 Mbit/s, 256 MiB of weights, without relays 32 MiB" in shown
    assert "two sources are 2.00 times as fast as one of them" in shown
    assert "disturbed: other processes were busy during star, 16" in shown
    (panel,) = scale_out.panels(figures)
    assert [[bar.note for bar in bars] for bars in panel.rows.values()] == [
        ["1.00x, 1.00 copies sent", "1.00x, 1.00 copies sent", "1x"],
        ["16.00x, 16.00 copies sent", "1.20x, 1.25 copies sent", "1x"],
    ]


def test_the_loopback_interface_serves_where_namespaces_do_not() -> None:
    parser = argparse.ArgumentParser()
    scale_out.add_options(parser)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args(
        ["--loopback", "--nodes", "2", "--megabytes", "16", "--megabit", "200", "--only", "relay"]
    )
    figures = scale_out.measure(options)
    (run,) = figures.runs["relay"]["2"]
    assert (run.finished, figures.has_hosts, figures.delays) == (2, False, False)
