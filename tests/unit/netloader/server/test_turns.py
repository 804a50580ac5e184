from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.clock import Clock
from vllm_ascend.model_loader.netloader.server.admission import turns as turns_module
from vllm_ascend.model_loader.netloader.server.admission.turns import (
    IN_PARTS,
    LEAST_CAPACITY,
    OVERCOMMITMENT,
    SLOW_SHARE,
    Turn,
    Turns,
)

MEBIBYTE = 1 << 20

pytestmark = pytest.mark.timeout(60)


@dataclass
class Speed:
    """How fast a client takes bytes, as the test says."""

    rate: float
    all_along: float = 0.0

    def lately(self) -> float:
        return self.rate

    def overall(self) -> float:
        return self.all_along


@pytest.fixture
def clock() -> Clock:
    return Clock()


def crowd(turns: Turns, count: int, host: str = "10.0.0.2", speed: float = math.inf) -> list[Turn]:
    """So many of a host, of which those that can be have their turn at once."""
    queued = [turns.queue(host) for _ in range(count)]
    turns.grant()
    for turn in queued:
        turn.meter = Speed(speed)
    return queued


def waiting(turns: Turns, among: list[Turn]) -> list[Turn]:
    return [turn for turn in turns.in_order() if turn in among]


def test_more_have_a_turn_where_each_takes_only_parts() -> None:
    turns = Turns(2)
    in_parts = [turns.take(f"10.0.0.{number}", in_parts=True) for number in range(2 * IN_PARTS + 1)]
    assert [turn is None for turn in in_parts] == [False] * 2 * IN_PARTS + [True]
    assert turns.take("10.0.0.99") is None


ONE, OTHER, THIRD = "10.0.0.2", "10.0.0.3", "10.0.0.4"


def test_up_to_the_limit_nobody_waits() -> None:
    turns = Turns(3)
    assert all(turns.take(ONE) for _ in range(3))
    assert turns.take(ONE) is None
    assert (turns.taken, turns.waiting) == (3, 0)


def test_nobody_overtakes_those_who_wait() -> None:
    turns = Turns(1)
    first = turns.queue(ONE)
    assert turns.take(OTHER) is None
    assert turns.grant() == [first]


def test_the_others_have_their_turns_in_the_order_in_which_they_came() -> None:
    turns = Turns(2)
    queue = [turns.queue(ONE) for _ in range(5)]
    assert turns.grant() == queue[:2]
    assert turns.in_order() == queue[2:]
    assert turns.grant() == []
    turns.leave(queue[0])
    turns.leave(queue[3])
    assert turns.grant() == [queue[2]]
    assert (turns.in_order(), turns.waiting, turns.taken) == ([queue[4]], 1, 2)


def test_leaving_twice_takes_nothing_from_others() -> None:
    turns = Turns(1)
    first, second, third = (turns.queue(ONE) for _ in range(3))
    assert turns.grant() == [first]
    for _ in range(2):
        with first:
            pass
    assert turns.grant() == [second]
    assert turns.in_order() == [third]


def test_whoever_leaves_is_a_reason_to_ask_again_and_so_is_another_limit() -> None:
    turns, rings = Turns(1), list[int]()
    turns.on_free = lambda: rings.append(1)
    with turns.queue(ONE):
        turns.grant()
        assert len(rings) == 0
    assert len(rings) == 1
    turns.configure(3, None)
    assert len(rings) == 2


def test_a_higher_limit_lets_the_next_in_and_a_lower_one_throws_nobody_out() -> None:
    turns = Turns(1)
    queue = crowd(turns, 4)
    turns.configure(3, None)
    assert turns.grant() == queue[1:3]
    turns.configure(1, None)
    assert turns.taken == 3
    turns.leave(queue[0])
    turns.leave(queue[1])
    assert turns.grant() == []
    turns.leave(queue[2])
    assert turns.grant() == [queue[3]]


def test_one_host_cannot_hold_all_turns() -> None:
    """Whatever it takes and however long: half of them count while another host waits."""
    turns = Turns(8)
    crowd(turns, 20, ONE, speed=1 << 40)
    assert turns.taken == 8
    others = crowd(turns, 20, OTHER)
    assert waiting(turns, others) == others[4:]
    assert len(waiting(turns, crowd(turns, 20, THIRD))) == 18  # a third of eight


def test_one_host_alone_has_all_turns_and_no_more() -> None:
    turns = Turns(8)
    assert len(waiting(turns, crowd(turns, 100, speed=1 << 40))) == 92


def test_hosts_come_one_after_another_however_many_each_has_queued() -> None:
    turns = Turns(1)
    holder = crowd(turns, 1, THIRD)[0]
    first, second = [turns.queue(ONE) for _ in range(3)], [turns.queue(OTHER) for _ in range(2)]
    assert turns.in_order() == [first[0], second[0], first[1], second[1], first[2]]
    turns.leave(holder)
    assert turns.grant() == [first[0]]
    assert turns.in_order() == [second[0], first[1], second[1], first[2]]


def test_more_hosts_than_turns_have_one_each_after_another() -> None:
    turns = Turns(2)
    queue = [turns.queue(f"10.0.0.{n}") for n in range(1, 7)]
    assert turns.grant() == queue[:2]
    turns.leave(queue[1])
    assert turns.grant() == [queue[2]]


@pytest.mark.parametrize(
    ("max_bandwidth", "seen", "slow"),
    [
        (None, 0, LEAST_CAPACITY / 8 / SLOW_SHARE),
        (None, 1 << 30, (1 << 30) / 8 / SLOW_SHARE),
        (MEBIBYTE, 1 << 30, MEBIBYTE / 8 / SLOW_SHARE),
        (1 << 40, 1 << 30, (1 << 30) / 8 / SLOW_SHARE),
    ],
    ids=["nothing seen yet", "seen", "MAX_BANDWIDTH", "MAX_BANDWIDTH above what is sent"],
)
def test_slow_is_who_takes_far_less_than_its_share_of_what_can_be_sent(
    max_bandwidth: int | None, seen: float, slow: float, clock: Clock
) -> None:
    turns = Turns(8, max_bandwidth, clock)
    before = turns.take(THIRD)
    assert before is not None
    before.meter = Speed(math.inf, all_along=seen)
    turns.leave(before)
    held = crowd(turns, 8, ONE, speed=slow)
    for turn in held[1:4]:
        turn.meter = Speed(slow * 0.99)
    assert len(waiting(turns, crowd(turns, 10, ONE))) == 7


def test_what_is_sent_now_counts_as_seen(clock: Clock) -> None:
    turns = Turns(4, None, clock)
    held = crowd(turns, 4, ONE, speed=2 * MEBIBYTE)
    assert len(waiting(turns, crowd(turns, 1, ONE))) == 1
    held[0].meter = Speed(1 << 30)
    assert len(turns.grant()) == 1


def test_what_was_seen_long_ago_is_forgotten(clock: Clock) -> None:
    turns = Turns(2, None, clock)
    burst = turns.take(ONE)
    assert burst is not None
    burst.meter = Speed(math.inf, all_along=1 << 34)
    turns.leave(burst)
    held = crowd(turns, 2, ONE, speed=64 * MEBIBYTE)
    newcomers = crowd(turns, 2, ONE, speed=64 * MEBIBYTE)
    assert waiting(turns, newcomers) == []
    for turn in newcomers:
        turns.leave(turn)
    clock.now += 300
    assert len(waiting(turns, crowd(turns, 2, ONE))) == 2
    assert turns.taken == len(held)


def test_a_client_counts_until_it_can_be_told_how_fast_it_is() -> None:
    turns = Turns(1)
    crowd(turns, 1, ONE, speed=math.inf)
    assert len(waiting(turns, crowd(turns, 1, ONE))) == 1


def test_however_slow_they_are_not_all_have_a_turn_together() -> None:
    turns = Turns(2)
    for _ in range(100):
        crowd(turns, 1, ONE, speed=0.0)
    assert turns.taken == OVERCOMMITMENT * 2
    crowd(turns, 1, OTHER)
    assert turns.taken == OVERCOMMITMENT * 2 + 1


def test_the_slowest_one_makes_room_for_a_host_that_has_no_turn() -> None:
    turns, ended = Turns(1), list[Turn]()
    held = [crowd(turns, 1, f"10.0.1.{number}", speed=9.0 - number)[0] for number in range(OVERCOMMITMENT)]
    assert turns.taken == OVERCOMMITMENT
    for turn in held:
        turn.end = functools.partial(ended.append, turn)
    first, second = turns.queue("10.0.2.1"), turns.queue(held[0].host)
    assert turns.grant() == [first]
    assert ended == [held[-1]]
    first.meter = Speed(0.0)
    assert turns.grant() == []  # the host of the second has a turn
    turns.leave(second)
    third = turns.queue("10.0.2.2")
    assert turns.grant() == [third]
    assert ended == [held[-1], held[-2]]


HOSTS = ("10.0.0.2", "10.0.0.3", "10.0.0.4")
STEPS = st.lists(
    st.tuples(st.sampled_from(("queue", "leave", "become slow", "become fast", "limit")), st.integers(0, 29)),
    max_size=80,
)


@given(steps=STEPS, limit=st.integers(1, 8))
def test_turns_are_used_bounded_and_shared(steps: list[tuple[str, int]], limit: int) -> None:
    """Nobody waits while there is room; hosts below their share never wait; and there is a bound to all."""
    turns, most = Turns(limit), limit
    everybody: list[Turn] = []
    for operation, number in steps:
        turn = everybody[number % len(everybody)] if everybody else None
        match operation:
            case "queue":
                everybody.append(turns.queue(HOSTS[number % 3]))
            case "limit":
                limit = number % 8 + 1
                most = max(most, limit)
                turns.configure(limit, None)
            case "leave" if turn is not None:
                turns.leave(turn)
                everybody.remove(turn)
            case "become slow" if turn is not None:
                turn.meter = Speed(0.0)
            case "become fast" if turn is not None:
                turn.meter = Speed(1 << 40)
        turns.grant()
        left = turns.in_order()
        taken = [each for each in everybody if each not in left]
        counting = Counter(each.host for each in taken if each.meter is None or each.meter.lately() > 0)
        hosts = counting.keys() | {each.host for each in left}
        assert (len(taken), len(left)) == (turns.taken, turns.waiting)
        if left:
            assert counting.total() >= limit or len(taken) >= OVERCOMMITMENT * limit
            share = limit // len(hosts)
            assert all(counting[each.host] >= share or len(taken) >= OVERCOMMITMENT * limit for each in left)
        assert len(taken) <= (OVERCOMMITMENT * most) * sum(1 / n for n in range(1, len(HOSTS) + 1)) + 1


@given(hosts=st.lists(st.sampled_from(HOSTS), max_size=40))
def test_places_are_such_that_each_hosts_next_comes_before_anybodys_one_after_that(hosts: list[str]) -> None:
    turns = Turns(1)
    turns.take("10.0.0.1")
    queued = [turns.queue(host) for host in hosts]
    order = turns.in_order()
    assert sorted(map(id, order)) == sorted(map(id, queued))
    rounds = [sum(earlier.host == turn.host for earlier in order[:place]) for place, turn in enumerate(order)]
    assert rounds == sorted(rounds)
    for host in HOSTS:
        assert [turn for turn in order if turn.host == host] == [turn for turn in queued if turn.host == host]


def test_the_order_is_made_once_for_each_change(monkeypatch: pytest.MonkeyPatch) -> None:
    turns, made = Turns(8), itertools.count()
    arrange = turns_module.arrange
    monkeypatch.setattr(turns_module, "arrange", lambda *turns: (next(made), arrange(*turns))[1])
    queue = [turns.queue(f"10.0.{n % 50}.1") for n in range(1000)]
    for _ in range(100):
        turns.grant()
        for _ in queue:
            turns.in_order()
    assert next(made) == 2  # before and after those who got a turn


def test_hosts_share_turns_by_their_networks() -> None:
    turns = Turns(4)
    for n in range(4):
        turns.take(f"2001:db8::{n + 1:x}")
    alone = turns.queue("2001:db8:0:1::1")
    assert turns.grant() == [alone]
