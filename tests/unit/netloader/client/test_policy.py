from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ascend.model_loader.netloader.client.swarm import policy
from vllm_ascend.model_loader.netloader.client.swarm.policy import TWICE, WINDOW, Swarm

CHUNKS = 40
LENGTH = 1000


@pytest.fixture(autouse=True)
def the_window_is_open_from_the_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "FIRST", WINDOW)


def swarm_of(chunks: int = CHUNKS, seed: int = 0, window: int = WINDOW) -> Swarm[str]:
    return Swarm([LENGTH] * chunks, random.Random(seed), window=window)


def asked(swarm: Swarm[str], source: str, now: float = 0.0) -> list[int]:
    """All chunks for which the source is to be asked now."""
    found: list[int] = []
    while (chunk := swarm.next_for(source, now)) is not None:
        found.append(chunk)
    return found


def one_from(swarm: Swarm[str], source: str, now: float = 0.0) -> int:
    chunk = swarm.next_for(source, now)
    assert chunk is not None
    return chunk


def test_a_single_holder_is_asked_for_everything_a_window_at_a_time() -> None:
    swarm = swarm_of()
    swarm.joined("holder")
    arrived: list[int] = []
    while not swarm.is_complete:
        requests = asked(swarm, "holder")
        assert len(requests) <= WINDOW
        assert all(swarm.arrived("holder", chunk, 1.0) for chunk in requests)
        arrived += requests
    assert sorted(arrived) == list(range(CHUNKS))
    assert asked(swarm, "holder") == []


def test_what_is_held_from_the_beginning_is_not_asked_for() -> None:
    swarm = Swarm[str]([LENGTH] * 4, random.Random(0), held=[0, 2])
    swarm.joined("holder")
    assert swarm.missing == 2
    assert sorted(asked(swarm, "holder")) == [1, 3]


def test_the_rarest_chunk_is_asked_for_first() -> None:
    swarm = swarm_of()
    swarm.joined("holder")
    swarm.joined("relay", [n for n in range(CHUNKS) if n != 17])
    assert one_from(swarm, "holder") == 17


def test_a_chunk_that_becomes_common_comes_later() -> None:
    swarm = swarm_of(3)
    swarm.joined("holder")
    swarm.joined("relay", [0])
    assert swarm.has("relay", [1])
    assert one_from(swarm, "holder") == 2


def test_what_a_source_says_again_counts_once() -> None:
    swarm = swarm_of(3)
    swarm.joined("holder")
    swarm.joined("relay", [0])
    for _ in range(3):
        swarm.has("relay", [0])
    swarm.gone("relay")
    swarm.joined("another", [1, 2])
    assert one_from(swarm, "holder") == 0


def test_a_chunk_is_rare_again_when_those_who_had_it_are_gone() -> None:
    swarm = swarm_of(3)
    swarm.joined("holder")
    swarm.joined("a relay", [0, 1, 2])
    swarm.joined("another", [0, 1])
    swarm.joined("a third", [0])
    swarm.gone("a third")
    swarm.gone("another")
    swarm.joined("a fourth", [1, 2])
    assert one_from(swarm, "holder") == 0


def test_what_was_sent_to_somebody_else_comes_later_and_counts_once() -> None:
    swarm = swarm_of(4)
    swarm.joined("holder")
    swarm.sent([0, 1])
    swarm.sent([0, 1, 2])
    swarm.joined("relay", [3])
    swarm.has("relay", [2])
    assert one_from(swarm, "holder") in (0, 1, 3)
    assert 2 not in asked(swarm, "holder")[:2]


def test_clients_take_equally_rare_chunks_in_different_orders() -> None:
    firsts = set()
    for seed in range(20):
        swarm = swarm_of(seed=seed)
        swarm.joined("holder")
        firsts.add(one_from(swarm, "holder"))
    assert len(firsts) > 10


def test_a_source_is_asked_only_for_what_it_has() -> None:
    swarm = swarm_of()
    swarm.joined("relay", [3, 5])
    assert sorted(asked(swarm, "relay")) == [3, 5]
    assert not swarm.has("relay", [5])
    assert swarm.has("relay", [6])
    assert asked(swarm, "relay") == [6]


def test_the_window_opens_as_chunks_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "FIRST", 1)
    swarm = swarm_of()
    swarm.joined("a")
    on_the_way = asked(swarm, "a")
    for count in range(1, WINDOW + 3):
        assert len(on_the_way) == min(count, WINDOW)
        assert swarm.arrived("a", on_the_way.pop(0), float(count))
        on_the_way += asked(swarm, "a", float(count))


def test_the_window_is_shared_by_all_sources() -> None:
    swarm = swarm_of()
    swarm.joined("a")
    assert len(asked(swarm, "a")) == WINDOW
    swarm.joined("b")
    swarm.joined("has nothing yet", [])
    assert len(asked(swarm, "b")) == WINDOW // 3
    swarm.gone("a")
    assert len(asked(swarm, "b")) == WINDOW // 2 - WINDOW // 3


def test_many_sources_have_one_request_each() -> None:
    swarm = swarm_of()
    sources = [f"source {n}" for n in range(2 * WINDOW)]
    for source in sources:
        swarm.joined(source)
        one_from(swarm, source)
    assert all(asked(swarm, source) == [] for source in sources)


def test_a_source_that_is_gone_gives_its_chunks_back() -> None:
    swarm = swarm_of(WINDOW)
    swarm.joined("holder")
    given = asked(swarm, "holder")
    swarm.joined("other")
    assert asked(swarm, "other") == []
    assert sorted(swarm.gone("holder")) == sorted(given)
    assert sorted(asked(swarm, "other")) == sorted(given)
    assert swarm.sources == ("other",)
    assert "holder" not in swarm


def test_a_chunk_that_a_source_lacks_after_all_is_asked_for_elsewhere() -> None:
    swarm = swarm_of(1)
    swarm.joined("relay")
    swarm.joined("holder")
    chunk = one_from(swarm, "relay")
    swarm.lacks("relay", chunk)
    assert swarm.next_for("relay", 0.0) is None
    assert one_from(swarm, "holder") == chunk


def test_a_damaged_chunk_is_asked_for_elsewhere_and_here_only_if_nobody_else_has_it() -> None:
    swarm = swarm_of(1)
    swarm.joined("liar")
    swarm.joined("holder")
    one_from(swarm, "liar")
    swarm.damaged("liar", 0)
    assert swarm.next_for("liar", 0.0) is None
    assert one_from(swarm, "holder") == 0
    swarm.gone("holder")
    assert one_from(swarm, "liar") == 0


def test_a_chunk_that_arrives_from_a_source_that_is_gone_counts() -> None:
    swarm = swarm_of(1)
    swarm.joined("holder")
    chunk = one_from(swarm, "holder")
    swarm.gone("holder")
    assert swarm.arrived("holder", chunk, 1.0)
    assert swarm.is_complete
    swarm.joined("other")
    assert swarm.next_for("other", 1.0) is None


def test_a_source_is_useful_while_it_has_something_that_is_missing() -> None:
    swarm = swarm_of(2)
    swarm.joined("relay", [0])
    assert swarm.is_useful("relay")
    chunk = one_from(swarm, "relay")
    assert swarm.is_useful("relay")
    swarm.arrived("relay", chunk, 1.0)
    assert not swarm.is_useful("relay")


def slow_and_fast(chunks: int = 3) -> Swarm[str]:
    """A slow source, 10 s for a chunk, that is to bring the last one, and a fast one, 1 s, that has nothing to do."""
    swarm = swarm_of(chunks, window=1)
    swarm.joined("slow")
    swarm.joined("fast")
    swarm.arrived("slow", one_from(swarm, "slow", 0.0), 10.0)
    one_from(swarm, "slow", 10.0)
    while (chunk := swarm.next_for("fast", 10.0)) is not None:
        swarm.arrived("fast", chunk, 11.0)
        if swarm.missing == 1:
            break
    return swarm


def test_in_the_end_a_fast_source_is_asked_for_what_a_slow_one_has_to_bring() -> None:
    swarm = slow_and_fast()
    chunk = one_from(swarm, "fast", 11.0)
    assert swarm.asked_twice == 1
    assert swarm.arrived("fast", chunk, 12.0)
    assert not swarm.arrived("slow", chunk, 20.0)
    assert swarm.is_complete


def test_nothing_is_asked_for_twice_before_everything_was_asked_for() -> None:
    swarm = swarm_of(3, window=1)
    swarm.joined("slow")
    swarm.arrived("slow", one_from(swarm, "slow", 0.0), 10.0)
    asked_for = one_from(swarm, "slow", 10.0)
    swarm.joined("fast", [asked_for])
    assert swarm.next_for("fast", 1000.0) is None


def test_a_source_that_brings_it_soon_is_left_alone() -> None:
    assert slow_and_fast().next_for("fast", 19.0) is None


def test_a_source_that_has_fallen_silent_is_late_by_as_much_again() -> None:
    swarm = slow_and_fast()
    assert swarm.next_for("fast", 21.0) is None
    assert swarm.next_for("fast", 22.5) is not None


def test_a_late_chunk_is_wanted_again_only_when_both_sources_have_failed() -> None:
    swarm = slow_and_fast()
    chunk = one_from(swarm, "fast", 11.0)
    assert swarm.gone("slow") == ()
    assert swarm.gone("fast") == (chunk,)


def test_few_chunks_are_asked_for_twice() -> None:
    chunks = 4 * TWICE
    swarm = swarm_of(chunks, window=chunks)
    swarm.joined("silent")
    swarm.joined("fast")
    swarm.arrived("silent", one_from(swarm, "silent"), 1.0)
    swarm.arrived("fast", one_from(swarm, "fast"), 1.0)
    held_up = len(asked(swarm, "silent", 1.0))
    for second in range(1000):
        if (chunk := swarm.next_for("fast", 1000.0 + second)) is not None:
            swarm.arrived("fast", chunk, 1000.0 + second)
    assert swarm.asked_twice == 4
    assert len(swarm.gone("silent")) == swarm.missing == held_up - 4


@dataclass
class Drive:
    """Calls a swarm as chance has it, and knows what must come of that."""

    chance: random.Random
    count: int
    swarm: Swarm[int] = field(init=False)
    has: dict[int, set[int]] = field(default_factory=dict)
    out: dict[int, set[int]] = field(default_factory=dict)
    """By source, what was handed out and not given back."""
    held: set[int] = field(default_factory=set)
    received: Counter[int] = field(default_factory=Counter)
    now: float = 0.0

    def __post_init__(self) -> None:
        self.swarm = Swarm([self.chance.randint(1, 9) for _ in range(self.count)], self.chance)

    def join(self, has: set[int]) -> None:
        source = len(self.has) + 1
        self.swarm.joined(source, has)
        self.has[source], self.out[source] = set(has), set()

    def ask(self, source: int) -> None:
        before = self.swarm.asked_twice
        chunk = self.swarm.next_for(source, self.now)
        if chunk is None:
            return
        assert chunk not in self.held
        assert chunk in self.has[source]
        elsewhere = any(chunk in out for out in self.out.values())
        assert elsewhere == (self.swarm.asked_twice == before + 1)
        self.out[source].add(chunk)

    def arrive(self, source: int) -> None:
        chunk = self.take(source)
        assert self.swarm.arrived(source, chunk, self.now) == (chunk not in self.held)
        self.held.add(chunk)
        self.received[chunk] += 1

    def take(self, source: int) -> int:
        chunk = self.chance.choice(sorted(self.out[source]))
        self.out[source].remove(chunk)
        return chunk

    def step(self) -> None:
        """Anything that can happen."""
        self.now += self.chance.random()
        sources = [source for source in self.has if source in self.swarm]
        if not sources or (len(sources) < 6 and self.chance.random() < 0.1):
            self.join(set(self.chance.sample(range(self.count), self.chance.randint(0, self.count))))
            return
        source = self.chance.choice(sources)
        match self.chance.random():
            case luck if luck < 0.4:
                self.ask(source)
            case luck if luck < 0.7 and self.out[source]:
                self.arrive(source)
            case luck if luck < 0.75 and self.out[source]:
                self.swarm.damaged(source, self.take(source))
            case luck if luck < 0.8 and self.out[source]:
                chunk = self.take(source)
                self.swarm.lacks(source, chunk)
                self.has[source].discard(chunk)
            case luck if luck < 0.83:
                self.leave(source)
            case luck if luck < 0.9:
                self.swarm.sent(self.chance.sample(range(self.count), 2))
            case _:
                new = set(self.chance.sample(range(self.count), 2))
                self.swarm.has(source, new)
                self.has[source] |= new

    def leave(self, source: int) -> None:
        lost = self.out.pop(source)
        elsewhere = set().union(*self.out.values())
        assert set(self.swarm.gone(source)) == lost - elsewhere - self.held

    def finish(self, everything: list[int]) -> None:
        """Lets the sources that are left bring what they can, in any order, without further failures."""
        while not self.swarm.is_complete:
            self.now += 1.0
            for source in self.chance.sample(everything, len(everything)):
                self.ask(source)
                if self.out[source]:
                    self.arrive(source)


@given(seed=st.integers(0, 1 << 32), count=st.integers(2, 60), steps=st.integers(0, 150))
def test_whatever_happens_every_chunk_comes_if_one_source_that_has_it_lives(seed: int, count: int, steps: int) -> None:
    drive = Drive(random.Random(seed), count)
    for _ in range(steps):
        drive.step()
        assert drive.swarm.missing == count - len(drive.held)
        assert drive.swarm.asked_twice <= max(1, count // TWICE)

    # Two sources that have everything between them outlive the others.
    half = set(drive.chance.sample(range(count), count // 2))
    living = [len(drive.has) + 1, len(drive.has) + 2]
    drive.join(half)
    drive.join(set(range(count)) - half)
    for source in [source for source in drive.has if source in drive.swarm and source not in living]:
        drive.leave(source)
    drive.finish(living)

    assert drive.held == set(range(count))
    assert sum(drive.received.values()) - count <= max(1, count // TWICE)
