from __future__ import annotations

import heapq
import os
import threading
from collections.abc import Iterator, Sequence
from itertools import accumulate, repeat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ascend.model_loader.netloader.wire.pacing import Pacer, give_way

RATE = 1000
PIECE = 50
CREDIT_SECONDS = 0.05
"""Seconds of unused time that may be made up for."""

Work = tuple[float, int]
"""How long a user is busy with other things, then how many bytes it sends."""


class Time:
    """A clock that goes on only when somebody sleeps, which takes `late` seconds longer than asked."""

    def __init__(self, late: float = 0.0) -> None:
        self.now = 100.0
        self.slept: list[float] = []
        self._late = late

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds + self._late

    def pacer(self, rate: int | None) -> Pacer:
        return Pacer(rate, self.clock, self.sleep)


def sent_by(users: Sequence[Iterator[Work]], rate: int, late: float = 0.0) -> list[tuple[float, int]]:
    """When how many bytes began to be sent by users that share a pacer."""
    time = Time(late)
    pacer, sent = time.pacer(rate), []
    due: list[tuple[float, int, int]] = []

    def plan(user: int) -> None:
        if (work := next(users[user], None)) is not None:
            heapq.heappush(due, (time.now + work[0], user, work[1]))

    for user in range(len(users)):
        plan(user)
    while due:
        time.now, user, nbytes = heapq.heappop(due)
        pacer.wait_for(nbytes)
        sent.append((time.now, nbytes))
        plan(user)
    return sent


work = st.tuples(st.floats(0, 1), st.integers(1, PIECE))


@given(users=st.lists(st.lists(work, max_size=20), min_size=1, max_size=4))
def test_over_no_stretch_of_time_more_is_sent_than_the_rate_allows(users: list[list[Work]]) -> None:
    sent = sent_by([iter(user) for user in users], RATE)
    assert len(sent) == sum(map(len, users))
    before = [0, *accumulate(nbytes for _, nbytes in sent)]
    for first, (begin, _) in enumerate(sent):
        for last, (end, nbytes) in enumerate(sent[first:], first):
            in_between = before[last + 1] - before[first]
            assert in_between <= RATE * (end - begin + CREDIT_SECONDS) + nbytes + 1e-6


@given(busy=st.floats(1, 1000), users=st.integers(1, 4))
def test_what_was_not_sent_in_a_long_idle_time_is_not_made_up_for(busy: float, users: int) -> None:
    sent = sent_by([iter([(busy, PIECE), *repeat((0.0, PIECE), 5)]) for _ in range(users)], RATE)
    assert sum(nbytes for when, nbytes in sent if when == sent[0][0]) <= 2 * PIECE


@pytest.mark.parametrize("late", [0.0, 0.001, 0.08], ids=["exact sleep", "late sleep", "later than a piece takes"])
@pytest.mark.parametrize("users", [1, 2, 5])
def test_users_that_never_pause_get_the_rate_to_within_one_percent(users: int, late: float) -> None:
    sent = sent_by([repeat((0.0, PIECE), 2000 // users) for _ in range(users)], RATE, late)
    seconds = sent[-1][0] - sent[0][0]
    assert sum(nbytes for _, nbytes in sent) / seconds == pytest.approx(RATE, rel=0.01)


def test_users_that_never_pause_get_equal_shares() -> None:
    asked = dict.fromkeys(range(3), 0)

    def user(number: int) -> Iterator[Work]:
        for _ in range(100):
            asked[number] += 1
            assert max(asked.values()) - min(asked.values()) <= 2
            yield 0.0, PIECE

    assert len(sent_by([user(number) for number in range(3)], RATE)) == 300


def test_without_a_rate_nobody_waits() -> None:
    time = Time()
    pacer = time.pacer(None)
    for _ in range(100):
        pacer.wait_for(1 << 40)
    assert time.slept == []
    assert pacer.piece is None


def test_a_rate_that_is_changed_later_counts_from_then_on() -> None:
    time = Time()
    pacer = time.pacer(None)
    pacer.wait_for(1 << 40)
    pacer.rate = 100
    pacer.wait_for(100)
    pacer.wait_for(100)
    pacer.rate = 1000
    pacer.wait_for(100)
    pacer.wait_for(100)
    assert time.slept == pytest.approx([1.0, 1.0, 0.1])
    pacer.rate = None
    pacer.wait_for(1 << 40)
    assert len(time.slept) == 3


def test_a_rate_that_is_taken_back_while_somebody_asks_does_no_harm() -> None:
    time = Time()
    pacer = time.pacer(RATE)

    def take_back() -> float:
        pacer.rate = None
        return time.now

    pacer._clock = take_back
    pacer.wait_for(PIECE)
    pacer.wait_for(PIECE)
    assert time.slept == []


@pytest.mark.parametrize(
    ("rate", "piece"),
    [
        (1_000_000, 50_000),
        (65_536, 4096),
        (1, 4096),
        (20 << 20, 1 << 20),
        (10 << 30, 1 << 20),
    ],
)
def test_bytes_are_sent_twenty_times_a_second_in_pieces_neither_tiny_nor_huge(rate: int, piece: int) -> None:
    assert Pacer(rate).piece == piece


@pytest.mark.timeout(60)
def test_a_thread_that_gives_way_keeps_its_priority_and_may_run_where_the_parent_process_may() -> None:
    seen: list[tuple[int, set[int]]] = []

    def work() -> None:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        give_way()
        seen.append((os.getpriority(os.PRIO_PROCESS, threading.get_native_id()), os.sched_getaffinity(0)))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join()
    ((priority, processors),) = seen
    assert priority == os.getpriority(os.PRIO_PROCESS, 0)
    assert processors == os.sched_getaffinity(os.getppid()) | {min(processors)}


def test_where_processors_cannot_be_chosen_a_thread_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setaffinity", forbidden)
    give_way()
