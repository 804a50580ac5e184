from __future__ import annotations

import itertools
import random

import pytest

from benchmarks.harness.links import Events, Link, Network


def test_events_happen_in_the_order_of_their_times_and_then_of_their_making() -> None:
    events, happened = Events(), list[str]()
    events.after(2.0, happened.append, "late")
    events.after(1.0, happened.append, "first")
    events.after(1.0, happened.append, "second")
    events.run(lambda: False)
    assert happened == ["first", "second", "late"]
    assert events.now == 2.0


class Bench:
    """A network and the times at which transfers end."""

    def __init__(self) -> None:
        self.events = Events()
        self.network = Network(self.events)
        self.ends: dict[str, float] = {}

    def start(self, name: str, nbytes: float, up: Link, down: Link) -> None:
        self.network.start(nbytes, up, down, lambda _: self.ends.update({name: self.events.now}))

    def run(self) -> dict[str, float]:
        self.events.run(lambda: False)
        return {name: round(end, 6) for name, end in self.ends.items()}


def test_a_transfer_takes_as_long_as_the_narrower_of_its_links_needs() -> None:
    bench = Bench()
    bench.start("alone", 100.0, Link(50.0), Link(10.0))
    assert bench.run() == {"alone": 10.0}


def test_a_link_is_shared_equally_and_taken_whole_by_whoever_is_left() -> None:
    bench, up = Bench(), Link(10.0)
    bench.start("short", 10.0, up, Link(100.0))
    bench.start("long", 30.0, up, Link(100.0))
    assert bench.run() == {"short": 2.0, "long": 4.0}
    assert up.carried == pytest.approx(40.0)


def test_what_one_transfer_cannot_use_is_left_to_the_others() -> None:
    bench, up = Bench(), Link(10.0)
    bench.start("held back", 10.0, up, Link(1.0))
    bench.start("free", 90.0, up, Link(100.0))
    assert bench.run() == {"held back": 10.0, "free": 10.0}


def test_one_that_is_aborted_leaves_its_link_to_the_others() -> None:
    bench, up = Bench(), Link(10.0)
    aborted = bench.network.start(100.0, up, Link(100.0), lambda _: pytest.fail("it was aborted"))
    bench.start("other", 15.0, up, Link(100.0))
    gone: list[float] = []
    bench.events.after(1.0, lambda: gone.append(bench.network.abort(aborted)))
    assert bench.run() == {"other": 2.0}
    assert gone == [pytest.approx(5.0)]


def test_no_link_carries_more_than_it_can_whatever_begins_and_ends() -> None:
    bench, chance = Bench(), random.Random(0)
    ups = [Link(chance.choice((5.0, 10.0, 50.0))) for _ in range(8)]
    downs = [Link(chance.choice((5.0, 10.0, 50.0))) for _ in range(8)]
    for number in range(300):
        up, down = chance.choice(ups), chance.choice(downs)
        bench.events.after(chance.random() * 100, bench.start, str(number), chance.uniform(1, 30), up, down)
    bench.run()
    assert len(bench.ends) == 300
    for link in itertools.chain(ups, downs):
        assert link.carried <= 1.02 * link.rate * bench.events.now
        assert not link.transfers
