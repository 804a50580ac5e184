"""How long so many instances that start together take to load from one, by a model of the links between them.

    python -m benchmarks.swarm_model                       # up to 1,000 instances: many minutes
    python -m benchmarks.swarm_model --nodes 1 4 16 --megabytes 512

Nothing is measured: transfers are numbers (`harness/simulated_swarm.py` says what is taken for granted), but who is
asked for which chunk is decided by the very policy of the product. So the model shows what the policy can do where
processors are no limit, with more instances than any machine here could hold, and its defaults are chosen by it.

All links are alike, of 1 Gbit/s in either direction and 1 ms, unless a row says otherwise:

    instances     more and more of them, that start at once
    chunks        16 instances, chunks of another size
    limits        16 instances, with one limit of the policy or the server changed
    cases         what goes wrong, and links that differ

Time is that of the last instance, or of the longest single load where instances arrive one after another, divided by
what its own link needs for the weights. The same seed gives the same figures on every machine; `--rounds` is the number
of seeds, and the table has the medians. `--star` runs the first group with relays off, too: every instance then takes
everything from the first.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace

from benchmarks.harness.benchmark import Benchmark, progress
from benchmarks.harness.plot import Bar, Panel
from benchmarks.harness.simulated_swarm import MEBIBYTE, Model, Outcome, Setting
from benchmarks.harness.tables import print_table

INSTANCES = "instances"
STAR = "star"
CHUNKS = "chunks"
LIMITS = "limits"
CASES = "cases"
TITLES = {
    INSTANCES: "instances that start together",
    STAR: "the same without relays",
    CHUNKS: "size of chunks, 16 instances",
    LIMITS: "limits, 16 instances",
    CASES: "failures and links that differ",
}
TARGET = 1.15
"""The time of 16 instances over that of one that the defaults are to hold."""


@dataclass(frozen=True)
class Figures:
    """The outcomes of all seeds, by group and row, and what each instance loads."""

    bytes: int
    chunk: int
    outcomes: dict[str, dict[str, list[Outcome]]]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--megabytes", type=int, default=1024, help="MiB of weights (default: 1024)")
    parser.add_argument("--chunk", type=int, default=4, metavar="MIB", help="size of a chunk (default: 4)")
    parser.add_argument(
        "--nodes",
        type=int,
        nargs="+",
        default=[1, 2, 4, 8, 16, 64, 256, 1000],
        metavar="N",
        help="numbers of instances",
    )
    parser.add_argument("--star", action="store_true", help="also without relays")
    parser.add_argument("--only", nargs="+", choices=list(TITLES), help="only these groups")


def measure(options: argparse.Namespace) -> Figures:
    base = Setting(nbytes=options.megabytes * MEBIBYTE, chunk=options.chunk * MEBIBYTE)
    groups = groups_of(base, options.nodes)
    if options.star:
        groups[STAR] = {name: replace(setting, relay=False) for name, setting in groups[INSTANCES].items()}
    if options.only:
        groups = {name: rows for name, rows in groups.items() if name in options.only}

    outcomes: dict[str, dict[str, list[Outcome]]] = {}
    for group, rows in groups.items():
        outcomes[group] = {}
        for row, setting in rows.items():
            runs = [Model(replace(setting, seed=seed)).run() for seed in range(options.rounds)]
            outcomes[group][row] = runs
            progress(f"{TITLES[group]}: {row}, {median(runs, lambda each: each.longest):.2f}")
    return Figures(base.nbytes, base.chunk, outcomes)


def groups_of(base: Setting, nodes: list[int]) -> dict[str, dict[str, Setting]]:
    """The settings of all rows."""
    seconds = base.nbytes / base.rate
    quarter = base.rate / 4
    eight = replace(base, nodes=8)
    return {
        INSTANCES: {str(number): replace(base, nodes=number) for number in nodes},
        CHUNKS: {f"{size} MiB": replace(base, chunk=size * MEBIBYTE) for size in (1, 2, 4, 8, 16)},
        LIMITS: {
            "as it is": base,
            "DEGREE 3, SESSIONS 5": replace(base, degree=3, sessions=5),
            "DEGREE 6, SESSIONS 9": replace(base, degree=6, sessions=9),
            "DEGREE 10, SESSIONS 15": replace(base, degree=10, sessions=15),
            "nobody joined in turn": replace(base, mutual=False),
            "WINDOW 4": replace(base, window=4),
            "WINDOW 16": replace(base, window=16),
            "4 chunks sent at once": replace(base, sending=4),
            "8 chunks sent at once": replace(base, sending=8),
            "MAX_CLIENTS 1": replace(base, max_clients=1),
            "MAX_CLIENTS 4": replace(base, max_clients=4),
            "MAX_CLIENTS 16": replace(base, max_clients=16),
            "server tells not what it sent": replace(base, tells_sent=False),
        },
        CASES: {
            "8, as it is": eight,
            "8, one killed midway": replace(eight, kills=((3, seconds / 2),)),
            "8, one silent midway": replace(eight, kills=((3, seconds / 2),), silent=True),
            "8, server killed once all was sent": replace(eight, kills=((-1, seconds * 1.1),)),
            "16, arriving over one load": replace(base, arrivals=seconds),
            "16, arriving over three loads": replace(base, arrivals=3 * seconds),
            "16, four with a tenth of the rate": replace(base, slow_nodes=4, slow_rate=base.rate / 10),
            "1, one source of a quarter": replace(base, nodes=1, server_rate=quarter),
            "1, two sources of a quarter": replace(base, nodes=1, servers=2, server_rate=quarter),
        },
    }


def median(outcomes: list[Outcome], value: Callable[[Outcome], float]) -> float:
    """The median over all seeds."""
    return statistics.median(map(value, outcomes))


def show(figures: Figures) -> None:
    chunks = -(-figures.bytes // figures.chunk)
    print(f"\n{figures.bytes / MEBIBYTE:.0f} MiB of weights in {chunks} chunks, unless a row says otherwise")
    for group, rows in figures.outcomes.items():
        print()
        print_table(
            (TITLES[group], "time", "mean", "finished", "copies sent", "twice", "messages"),
            [
                (
                    row,
                    f"{median(runs, lambda each: each.longest):.2f}",
                    f"{median(runs, lambda each: each.mean):.2f}",
                    f"{median(runs, lambda each: each.finished):.0f}",
                    f"{median(runs, lambda each: each.copies):.2f}",
                    f"{100 * median(runs, lambda each: each.twice):.2f} %",
                    f"{median(runs, lambda each: each.messages):.0f}",
                )
                for row, runs in rows.items()
            ],
        )


def panels(figures: Figures) -> list[Panel]:
    drawn: list[Panel] = []
    for group, rows in figures.outcomes.items():
        if group == STAR:
            continue
        bars = {row: [bar_of(runs)] for row, runs in rows.items()}
        star = figures.outcomes.get(STAR, {}) if group == INSTANCES else {}
        for row, runs in star.items():
            bars[row] = [replace(bars[row][0], series="with relays"), bar_of(runs, "without relays")]
        axis = "time / that of the link alone"
        drawn.append(
            Panel(
                TITLES[group][0].upper() + TITLES[group][1:],
                axis,
                bars,
                reference=(TARGET, f"target for 16: {TARGET}") if group != CASES else None,
                logarithmic=bool(star),
            )
        )
    return drawn


def bar_of(runs: list[Outcome], series: str = "") -> Bar:
    longest, copies = median(runs, lambda each: each.longest), median(runs, lambda each: each.copies)
    return Bar([each.longest for each in runs], f"{longest:.2f}x, {copies:.2f} copies", series)


if __name__ == "__main__":
    Benchmark(__doc__, Figures, 3, measure, show, panels, add_options).run()
