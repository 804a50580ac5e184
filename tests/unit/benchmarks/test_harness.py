from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.harness.benchmark import Benchmark
from benchmarks.harness.plot import REFERENCE, Bar, Panel
from benchmarks.harness.tables import print_table, ratio_to


@dataclass(frozen=True)
class Figures:
    seconds: dict[str, list[float]]


def measure(options: argparse.Namespace) -> Figures:
    return Figures({"old way": [2.0] * options.rounds, "new": [1.0] * options.rounds})


def show(figures: Figures) -> None:
    print_table(("way", "seconds"), [(way, f"{seconds[0]:.2f}") for way, seconds in figures.seconds.items()])


def panels(figures: Figures) -> list[Panel]:
    rows = {way: [Bar(seconds, f"note of {way}", REFERENCE)] for way, seconds in figures.seconds.items()}
    return [Panel("A title", "seconds", rows, reference=(1.0, "the line"))]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, arguments)])
    Benchmark("measures nothing", Figures, 3, measure, show, panels).run()


def test_columns_are_as_wide_as_they_must_be(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("way", "seconds", "x"), [("raw sockets", "1.0", "12.25"), ("tcp", "10.0", "")])
    assert capsys.readouterr().out.splitlines() == [
        "way           seconds       x",
        "raw sockets       1.0   12.25",
        "tcp              10.0",
    ]


def test_a_ratio_is_the_median_of_the_ratios_of_each_round() -> None:
    assert ratio_to([1.0, 2.0, 4.0], [2.0, 2.0, 20.0]) == 2.0


def test_what_was_measured_is_shown_and_drawn_again_from_its_figures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run(monkeypatch, "--rounds", "2", "--json", tmp_path / "figures.json", "--plot", tmp_path / "measured.svg")
    shown = capsys.readouterr().out
    run(monkeypatch, "--from", tmp_path / "figures.json", "--plot", tmp_path / "drawn_again.svg")
    assert capsys.readouterr().out == shown == "way       seconds\nold way      2.00\nnew          1.00\n"
    plot = (tmp_path / "measured.svg").read_text()
    assert (tmp_path / "drawn_again.svg").read_text() == plot
    assert all(text in plot for text in ("A title", "old way", "note of new", "the line"))
