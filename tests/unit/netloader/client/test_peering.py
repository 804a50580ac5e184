from __future__ import annotations

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from vllm_ascend.model_loader.netloader.client.swarm.peering import (
    DEGREE,
    NAMED_BY_ONE,
    NAMING,
    SESSIONS,
    USELESS_SECONDS,
    Peering,
)


def peering_of(seed: int = 0, itself: tuple[str, ...] = ("me",)) -> Peering[str]:
    return Peering(random.Random(seed), itself=itself)


def peers(count: int, name: str = "peer") -> list[str]:
    return [f"{name} {n}" for n in range(count)]


def chosen(peering: Peering[str]) -> list[str]:
    """All that are to be connected to now."""
    found: list[str] = []
    while (peer := peering.choose()) is not None:
        found.append(peer)
    return found


def test_so_many_of_the_named_are_chosen_each_once() -> None:
    peering = peering_of()
    peering.named("server", peers(DEGREE + 5))
    found = chosen(peering)
    assert len(set(found)) == len(found) == DEGREE
    assert peering.chosen == set(found)


def test_nobody_connects_to_itself() -> None:
    peering = peering_of()
    peering.named("server", ["me"])
    peering.joined_here("me")
    assert chosen(peering) == []


def test_one_that_is_lost_makes_room_for_another_and_is_not_tried_again() -> None:
    peering = peering_of()
    peering.named("server", peers(DEGREE + 1))
    found = chosen(peering)
    peering.lost(found[0])
    (another,) = chosen(peering)
    assert another not in found
    peering.lost(another)
    peering.named("another server", [another])
    assert chosen(peering) == []


def test_one_that_was_busy_is_tried_again_if_it_is_named_again() -> None:
    peering = peering_of()
    peering.named("server", ["peer"])
    assert chosen(peering) == ["peer"]
    peering.lost("peer", was_busy=True)
    assert chosen(peering) == []
    peering.named("server", ["peer"])
    assert chosen(peering) == ["peer"]


def test_those_who_have_joined_are_joined_in_turn_beyond_the_degree() -> None:
    peering = peering_of()
    peering.named("server", peers(DEGREE))
    chosen(peering)
    for peer in peers(SESSIONS, "client"):
        peering.joined_here(peer)
    found = chosen(peering)
    assert len(found) == SESSIONS - DEGREE
    assert all(peer.startswith("client") for peer in found)


def test_whoever_has_joined_and_is_chosen_already_is_not_chosen_twice() -> None:
    peering = peering_of()
    peering.named("server", ["peer"])
    peering.joined_here("peer")
    assert chosen(peering) == ["peer"]


def test_whoever_names_many_does_not_drown_the_others() -> None:
    counts: Counter[bool] = Counter()
    for seed in range(100):
        peering = peering_of(seed)
        peering.named("a liar", peers(NAMED_BY_ONE, "nobody"))
        peering.named("server", peers(DEGREE))
        counts.update(peer.startswith("peer") for peer in chosen(peering))
    assert 0.4 < counts[True] / counts.total() < 0.6


def test_of_those_who_name_and_of_what_they_name_no_more_is_remembered_than_can_be_used() -> None:
    peering = Peering[str](random.Random(0), degree=10**6)
    for namer in peers(NAMING + 1, "namer"):
        peering.named(namer, peers(NAMED_BY_ONE + 1, f"peer of {namer}"))
    assert len(chosen(peering)) == NAMING * NAMED_BY_ONE


def test_clients_choose_differently() -> None:
    found = set()
    for seed in range(20):
        peering = peering_of(seed)
        peering.named("server", peers(NAMED_BY_ONE))
        found.add(frozenset(chosen(peering)))
    assert len(found) == 20


class Reluctant(random.Random):
    """Lets nobody give way by chance."""

    def random(self) -> float:
        return 0.999


def test_one_that_has_long_been_useless_gives_way_if_there_is_somebody_else() -> None:
    peering = Peering[str](Reluctant())
    peering.named("server", peers(DEGREE))
    first, second, *_ = chosen(peering)
    useless = {first: USELESS_SECONDS, second: 2 * USELESS_SECONDS, "somebody": 100.0}
    assert peering.to_leave(useless) is None
    peering.named("server", ["another"])
    assert peering.to_leave({first: USELESS_SECONDS - 0.1}) is None
    assert peering.to_leave({}) is None
    assert peering.to_leave(useless) == second
    peering.lost(second)
    assert peering.to_leave(useless) is None
    assert chosen(peering) == ["another"]


def test_those_who_are_named_late_are_chosen_as_often_as_the_first() -> None:
    """Each is named alone, after the ones before were joined."""
    counts: Counter[str] = Counter()
    for seed in range(400):
        peering = peering_of(seed)
        for peer in peers(3 * DEGREE):
            peering.named("server", [peer])
            if (left := peering.to_leave({})) is not None:
                peering.lost(left)
            chosen(peering)
        assert len(peering.chosen) == DEGREE
        counts.update(peering.chosen)
    assert len(counts) == 3 * DEGREE
    assert 80 < min(counts.values()) <= max(counts.values()) < 190  # of 400, a third is expected


class Eager(random.Random):
    """Lets somebody give way whenever that is possible."""

    def random(self) -> float:
        return 0.0


def test_one_gives_way_for_each_that_is_drawn() -> None:
    peering = Peering[str](Eager())
    peering.named("server", peers(DEGREE))
    found = chosen(peering)
    assert peering.to_leave({}) is None
    peering.named("server", ["late"])
    left = peering.to_leave({})
    assert left in found
    assert peering.to_leave({}) is None
    peering.lost(left)
    assert chosen(peering) == ["late"]
    assert peering.to_leave({}) is None


@given(seed=st.integers(0, 1 << 32), steps=st.integers(0, 200))
def test_whatever_happens_nobody_has_more_peers_than_allowed_nor_one_twice(seed: int, steps: int) -> None:
    chance = random.Random(seed)
    peering: Peering[str] = Peering(chance, itself=["me"])
    everybody = [*peers(30), "me"]
    connected: set[str] = set()
    for _ in range(steps):
        match chance.randrange(4):
            case 0:
                peering.named(chance.choice(everybody), chance.sample(everybody, 5))
            case 1:
                peering.joined_here(chance.choice(everybody))
            case 2 if connected:
                peer = chance.choice(sorted(connected))
                peering.lost(peer, was_busy=chance.random() < 0.5)
                connected.remove(peer)
            case _ if (peer_or_none := peering.choose()) is not None:
                assert peer_or_none not in connected | {"me"}
                connected.add(peer_or_none)
        assert len(connected) <= SESSIONS
        assert peering.chosen == connected
