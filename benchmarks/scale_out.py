"""How long it takes many hosts that start together to load the same weights from one, over links of one speed.

    python -m benchmarks.scale_out                     # 1 to 16 hosts: a few minutes
    python -m benchmarks.scale_out --loopback --nodes 1 4 --megabytes 128

Each host is a process in a network namespace, joined to a switch by a cable of `--megabit` in either direction; where
the kernel can, packets take a millisecond. A client there is everything of Netloader but an engine: it fetches,
verifies every chunk, and relays what it has. `--loopback` needs no namespaces: all processes then share one address,
each server holds itself to the rate of a link, and nothing limits what a client receives. It shows that the swarm
works, no more.

    relay         more and more hosts, that start at once
    star          the same with relays off, and with fewer bytes (`--star-megabytes`), because it takes so much longer
    cases         8 hosts of which one is killed midway; one source with a slow link, and two

Time is that of the last host, divided by that of one alone. Ideal is 1, since all links work at once. `copies sent` is
how often the first server has sent the weights; `twice` is what hosts have received and did not need. The processors
must not be the limit: `busy` is the share of them that was used, and `others` is what processes had that do not belong
to the measurement. Repeat a run in which that is more than a few percent.

The targets: 16 hosts within 1.15 times the time of one, at most 1.5 copies, at most 2 % twice where a host is killed,
and two sources 1.8 times as fast as one of them.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.harness import namespaces
from benchmarks.harness.benchmark import Benchmark, progress
from benchmarks.harness.plot import Bar, Panel
from benchmarks.harness.simulated_swarm import MEBIBYTE
from benchmarks.harness.tables import MEGABYTE, print_table
from benchmarks.harness.testbed import Run, Testbed

RELAY = "relay"
STAR = "star"
CASES = "cases"
IDEAL = "ideal"
KILLED = "8, one killed midway"
ONE_SLOW = "1, one source of a quarter of the rate"
TWO_SLOW = "1, two sources of a quarter of the rate"
TARGET = 1.15
BUSY_LIMIT = 0.7
"""Above this share of the processors, it is they that decide, and not the links."""
OTHERS_LIMIT = 0.05


@dataclass(frozen=True)
class Figures:
    """All runs, by group and row. `rate` is in bytes per second; `delays` says whether packets were delayed."""

    bytes: int
    star_bytes: int
    rate: int
    has_hosts: bool
    delays: bool
    runs: dict[str, dict[str, list[Run]]]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--megabytes", type=int, default=256, help="MiB of weights (default: 256)")
    parser.add_argument("--star-megabytes", type=int, default=32, help="MiB of weights without relays (default: 32)")
    parser.add_argument("--megabit", type=int, default=100, help="Mbit/s of each link (default: 100)")
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4, 8, 16], metavar="N", help="numbers of hosts")
    parser.add_argument("--only", nargs="+", choices=[RELAY, STAR, CASES], help="only these groups")
    parser.add_argument("--loopback", action="store_true", help="without network namespaces")


def measure(options: argparse.Namespace) -> Figures:
    if not options.loopback:
        namespaces.enter()
    groups = options.only or [RELAY, STAR, CASES]
    nbytes, star_bytes = options.megabytes * MEBIBYTE, options.star_megabytes * MEBIBYTE
    rate = options.megabit * 10**6 // 8
    runs: dict[str, dict[str, list[Run]]] = {group: {} for group in groups}
    with Testbed(has_hosts=not options.loopback) as bed:
        plan: list[tuple[str, str, Callable[[], Run]]] = []

        def load(count: int, size: int, *names: str, speed: int = rate, **how: float | bool) -> Callable[[], Run]:
            def run() -> Run:
                sources = [bed.hold(name, size, speed) for name in names]
                outcome = bed.load(count, size, sources, rate, **how)  # type: ignore[arg-type]
                for name in names:
                    bed.release(name)
                return outcome

            return run

        if RELAY in groups:
            plan += [(RELAY, str(count), load(count, nbytes, "first")) for count in options.nodes]
        if STAR in groups:
            plan += [(STAR, str(count), load(count, star_bytes, "first", relays=False)) for count in options.nodes]
        if CASES in groups:
            killed_after = nbytes / rate / 2
            plan += [(CASES, KILLED, load(8, nbytes, "first", killed_after=killed_after))]
            slow, size = rate // 4, nbytes // 4
            plan += [(CASES, ONE_SLOW, load(1, size, "slow", speed=slow))]
            plan += [(CASES, TWO_SLOW, load(1, size, "slow", "other slow", speed=slow))]

        for _ in range(options.rounds):
            for group, row, run in plan:
                outcome = run()
                runs[group].setdefault(row, []).append(outcome)
                progress(
                    f"{group}: {row}, {outcome.seconds:.2f} s, {outcome.copies:.2f} copies, "
                    f"busy {outcome.busy:.0%}, others {outcome.others:.0%}"
                )
        return Figures(nbytes, star_bytes, rate, not options.loopback, bed.delays, runs)


def median(runs: list[Run], value: Callable[[Run], float]) -> float:
    """The median over all rounds."""
    return statistics.median(map(value, runs))


def ratios(figures: Figures, group: str, row: str) -> list[float]:
    """The time of a row over that of one host alone, by round; empty where that has no sense or was not measured."""
    alone = figures.runs.get(STAR if group == STAR else RELAY, {}).get("1")
    if alone is None or row in (ONE_SLOW, TWO_SLOW):
        return []
    return [run.seconds / one.seconds for run, one in zip(figures.runs[group][row], alone, strict=True)]


def show(figures: Figures) -> None:
    print(
        f"\nlinks of {8 * figures.rate / MEGABYTE:.0f} Mbit/s, {figures.bytes / MEBIBYTE:.0f} MiB of weights, ", end=""
    )
    print(f"without relays {figures.star_bytes / MEBIBYTE:.0f} MiB; ", end="")
    if not figures.has_hosts:
        print("on the loopback interface, where nothing limits what is received")
    elif figures.delays:
        print(f"packets take {namespaces.DELAY_MILLISECONDS} ms")
    else:
        print("this kernel cannot delay packets (netem), so that only queues do")
    for group, rows in figures.runs.items():
        print()
        print_table(
            (group, "seconds", "time", "finished", "copies sent", "twice", "busy", "others"),
            [
                (
                    row,
                    f"{median(runs, lambda each: each.seconds):.2f}",
                    f"{statistics.median(times):.2f}" if (times := ratios(figures, group, row)) else "",
                    f"{median(runs, lambda each: each.finished):.0f}",
                    f"{median(runs, lambda each: each.copies):.2f}",
                    f"{100 * median(runs, lambda each: each.twice):.2f} %",
                    f"{100 * median(runs, lambda each: each.busy):.0f} %",
                    f"{100 * median(runs, lambda each: each.others):.0f} %",
                )
                for row, runs in rows.items()
            ],
        )
    cases = figures.runs.get(CASES, {})
    if ONE_SLOW in cases:
        one, two = (median(cases[row], lambda each: each.seconds) for row in (ONE_SLOW, TWO_SLOW))
        print(f"\ntwo sources are {one / two:.2f} times as fast as one of them; target: 1.8")
    _warn(figures)


def _warn(figures: Figures) -> None:
    """Says which runs are no measurement of the links."""
    for group, rows in figures.runs.items():
        for row, runs in rows.items():
            if any(run.others > OTHERS_LIMIT for run in runs):
                print(f"disturbed: other processes were busy during {group}, {row}")
            elif any(run.busy > BUSY_LIMIT for run in runs):
                print(f"the processors were busier than {BUSY_LIMIT:.0%} during {group}, {row}: they may have decided")


def panels(figures: Figures) -> list[Panel]:
    rows: dict[str, list[Bar]] = {}
    for group in (STAR, RELAY):
        for row, runs in figures.runs.get(group, {}).items():
            times = ratios(figures, group, row)
            note = f"{statistics.median(times):.2f}x, {median(runs, lambda each: each.copies):.2f} copies sent"
            rows.setdefault(row, []).append(
                Bar(times, note, f"with relays off ({STAR})" if group == STAR else "relays")
            )
    for bars in rows.values():
        bars.append(Bar([1.0], "1x", IDEAL))
    axis = "time of the last host / time of one host alone"
    title = f"Hosts that load {figures.bytes / MEBIBYTE:.0f} MiB from one, over links of equal speed"
    return [Panel(title, axis, {f"{row} hosts": bars for row, bars in rows.items()}, logarithmic=True)]


if __name__ == "__main__":
    Benchmark(__doc__, Figures, 1, measure, show, panels, add_options).run()
