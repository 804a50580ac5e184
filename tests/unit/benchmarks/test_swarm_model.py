from __future__ import annotations

import argparse
from dataclasses import replace

import pytest

from benchmarks import swarm_model
from benchmarks.harness.simulated_swarm import MEBIBYTE, Model, Outcome, Setting

DEFAULT = Setting()
SMALL = Setting(nbytes=64 * MEBIBYTE, chunk=MEBIBYTE, rate=12.5e6, server_rate=12.5e6)
"""So few chunks that relaying costs more than it does with real weights."""
SECONDS = SMALL.nbytes / SMALL.rate


def outcome_of(setting: Setting) -> Outcome:
    return Model(setting).run()


def test_sixteen_take_hardly_longer_than_one_and_the_first_server_sends_little_more_than_a_copy() -> None:
    one, sixteen = outcome_of(replace(DEFAULT, nodes=1)), outcome_of(DEFAULT)
    assert one.longest < 1.01
    assert sixteen.finished == 16
    assert sixteen.longest < 1.3
    assert sixteen.copies < 1.2
    assert sixteen.twice < 0.01


def test_without_relays_each_takes_everything_from_the_server() -> None:
    four = outcome_of(replace(SMALL, nodes=4, relay=False))
    assert four.copies == pytest.approx(4.0)
    assert four.longest > 3.9


def test_the_same_seed_gives_the_same_outcome() -> None:
    four = replace(SMALL, nodes=4)
    assert outcome_of(four) == outcome_of(four) != outcome_of(replace(four, seed=1))


@pytest.mark.parametrize("silent", [False, True], ids=["killed", "silent"])
def test_one_that_dies_midway_costs_the_others_little(silent: bool) -> None:
    outcome = outcome_of(replace(DEFAULT, nodes=8, kills=((3, 4.3),), silent=silent))
    assert outcome.finished == 7
    assert outcome.twice < 0.02
    assert outcome.longest < 1.2


def test_they_finish_without_the_server_once_it_has_sent_everything() -> None:
    outcome = outcome_of(replace(DEFAULT, nodes=4, kills=((-1, 9.9),)))
    assert outcome.finished == 4


def test_a_run_that_cannot_end_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="only 0 of 4 clients have everything"):
        outcome_of(replace(SMALL, nodes=4, kills=((-1, SECONDS / 2),)))


def test_two_sources_are_nearly_twice_as_fast_as_one() -> None:
    capped = replace(SMALL, nodes=1, server_rate=SMALL.rate / 4)
    assert outcome_of(capped).seconds / outcome_of(replace(capped, servers=2)).seconds > 1.8


def test_slow_links_hold_up_nobody_else() -> None:
    outcome = outcome_of(replace(SMALL, slow_nodes=4, slow_rate=SMALL.rate / 10))
    assert outcome.finished == 16
    assert outcome.longest < 2.2


def test_those_who_come_later_take_no_longer() -> None:
    assert outcome_of(replace(SMALL, arrivals=3 * SECONDS)).longest < 1.9


def test_the_program_shows_and_draws_what_it_found(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    swarm_model.add_options(parser)
    parser.add_argument("--rounds", type=int, default=2)
    figures = swarm_model.measure(
        parser.parse_args(["--nodes", "1", "2", "--megabytes", "16", "--star", "--only", "instances", "star"])
    )
    assert all(len(runs) == 2 for rows in figures.outcomes.values() for runs in rows.values())

    swarm_model.show(figures)
    shown = capsys.readouterr().out
    assert "16 MiB of weights in 4 chunks" in shown
    assert "the same without relays" in shown
    (panel,) = swarm_model.panels(figures)
    assert panel.series == ["with relays", "without relays"]
    assert list(panel.rows) == ["1", "2"]
