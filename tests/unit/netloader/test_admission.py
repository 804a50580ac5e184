from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ascend.model_loader.netloader.admission import Guard, LogLimit, Turn, Turns

FOREVER = threading.TIMEOUT_MAX
"""So that only a notice, and not the end of the time, can end the wait."""
REMEMBERED = 1024

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def thread() -> Callable[[Callable[[], object]], threading.Thread]:
    def start(target: Callable[[], object]) -> threading.Thread:
        thread = threading.Thread(target=target, daemon=True)
        thread.start()
        return thread

    return start


Start = Callable[[Callable[[], object]], threading.Thread]


def slow() -> bool:
    return True


def test_up_to_the_limit_nobody_waits() -> None:
    turns = Turns(3)
    taken = [turns.queue("host") for _ in range(3)]
    assert [turn.wait(0) for turn in taken] == [True, True, True]
    assert turns.waiting == 0


def test_when_all_turns_are_taken_the_next_is_told_how_many_come_first() -> None:
    turns = Turns(2)
    queue = [turns.queue("host") for _ in range(5)]
    assert [turn.wait(0) for turn in queue] == [True, True, False, False, False]
    assert [turn.ahead for turn in queue] == [0, 0, 0, 1, 2]
    assert turns.waiting == 3


def test_a_turn_that_has_come_is_not_lost_by_asking_again() -> None:
    turns = Turns(1)
    turn = turns.queue("host")
    assert turn.wait(0)
    assert turn.wait(0)
    assert not turns.queue("host").wait(0)


def test_a_free_turn_is_kept_for_the_first_even_while_it_does_not_ask() -> None:
    turns = Turns(1)
    first, second = turns.queue("host"), turns.queue("host")
    assert not second.wait(0)
    assert first.wait(0)


def test_whoever_leaves_while_waiting_lets_those_behind_move_up() -> None:
    turns = Turns(1)
    holder, first, second = (turns.queue("host") for _ in range(3))
    assert holder.wait(0)
    with first:
        assert (second.ahead, turns.waiting) == (1, 2)
    assert (second.ahead, turns.waiting) == (0, 1)
    with holder:
        pass
    assert second.wait(0)


def test_leaving_twice_takes_nothing_from_others() -> None:
    turns = Turns(1)
    first, second, third = (turns.queue("host") for _ in range(3))
    assert first.wait(0)
    for _ in range(2):
        with first:
            pass
    assert [second.wait(0), third.wait(0)] == [True, False]


def test_a_failure_within_a_turn_gives_it_back() -> None:
    turns = Turns(1)

    def fail() -> None:
        with turns.queue("host") as turn:
            assert turn.wait(0)
            raise OSError("broken")

    for _ in range(2):
        with pytest.raises(OSError, match="broken"):
            fail()


def test_one_that_is_slow_delays_nobody() -> None:
    turns = Turns(1)
    holder, other, third = (turns.queue("host") for _ in range(3))
    assert [holder.wait(0), other.wait(0)] == [True, False]
    holder.is_slow = slow
    assert [other.wait(0), third.wait(0)] == [True, False]


def test_one_that_is_no_longer_slow_counts_again() -> None:
    turns = Turns(2)
    first, second, third = (turns.queue("host") for _ in range(3))
    assert [turn.wait(0) for turn in (first, second)] == [True, True]
    first.is_slow = slow
    first.is_slow = lambda: False
    assert not third.wait(0)


def test_a_higher_limit_lets_the_next_in_and_a_lower_one_throws_nobody_out() -> None:
    turns = Turns(1)
    queue = [turns.queue("host") for _ in range(4)]
    assert [turn.wait(0) for turn in queue] == [True, False, False, False]
    turns.set_limit(3)
    assert [turn.wait(0) for turn in queue] == [True, True, True, False]
    turns.set_limit(1)
    assert [turn.wait(0) for turn in queue] == [True, True, True, False]
    with queue[0], queue[1]:
        pass
    assert not queue[3].wait(0)
    with queue[2]:
        pass
    assert queue[3].wait(0)


def asked_of(holder: Turn) -> threading.Event:
    """Set when somebody who begins to wait asks whether `holder` counts."""
    asked = threading.Event()

    def is_slow() -> bool:
        asked.set()
        return False

    holder.is_slow = is_slow
    return asked


def leave(holder: Turn, _: Turns) -> None:
    with holder:
        pass


def raise_the_limit(_: Turn, turns: Turns) -> None:
    turns.set_limit(2)


@pytest.mark.parametrize("free", [leave, raise_the_limit])
def test_whoever_waits_is_woken_when_a_turn_becomes_free(free: Callable[[Turn, Turns], None], thread: Start) -> None:
    turns = Turns(1)
    holder, turn = turns.queue("host"), turns.queue("host")
    assert holder.wait(0)
    begun, result = asked_of(holder), list[bool]()
    waiter = thread(lambda: result.append(turn.wait(FOREVER)))
    begun.wait()
    free(holder, turns)
    waiter.join()
    assert result == [True]


def test_whoever_is_behind_one_that_gives_up_waiting_is_woken(thread: Start) -> None:
    turns = Turns(2)
    holder, first, second = (turns.queue("host") for _ in range(3))
    assert holder.wait(0)
    begun, result = asked_of(holder), list[bool]()
    waiter = thread(lambda: result.append(second.wait(FOREVER)))
    begun.wait()
    with first:
        pass
    waiter.join()
    assert result == [True]


def test_turns_come_in_the_order_of_the_queue_and_not_of_waiting(thread: Start) -> None:
    turns = Turns(1)
    holder = turns.queue("host")
    assert holder.wait(0)
    order = list[int]()
    queue = [turns.queue("host") for _ in range(8)]

    def take(number: int) -> None:
        with queue[number]:
            assert queue[number].wait(FOREVER)
            order.append(number)

    waiters = [thread(lambda number=number: take(number)) for number in reversed(range(8))]
    leave(holder, turns)
    for waiter in waiters:
        waiter.join()
    assert order == list(range(8))


def test_of_many_threads_as_many_as_allowed_have_their_turn_together(thread: Start) -> None:
    turns, limit = Turns(3), 3
    together, lock = threading.Barrier(limit), threading.Lock()
    inside, most = 0, 0

    def take() -> None:
        nonlocal inside, most
        with turns.queue("host") as turn:
            assert turn.wait(FOREVER)
            with lock:
                inside += 1
                most = max(most, inside)
            together.wait()  # returns when three are inside
            with lock:
                inside -= 1

    takers = [thread(take) for _ in range(4 * limit)]
    for taker in takers:
        taker.join()
    assert (most, inside, turns.waiting) == (limit, 0, 0)


OPERATIONS = ("queue", "ask", "leave", "become slow", "limit")


@given(steps=st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 9)), max_size=60), limit=st.integers(1, 4))
def test_a_turn_has_come_exactly_when_fewer_than_the_limit_are_before_it(
    steps: list[tuple[str, int]], limit: int
) -> None:
    turns = Turns(limit)
    waiting: list[Turn] = []
    taken: list[Turn] = []
    slow_ones: set[int] = set()
    for operation, number in steps:
        queue = [*taken, *waiting]
        turn = queue[number % len(queue)] if queue else None
        match operation:
            case "queue":
                waiting.append(turns.queue("host"))
            case "limit":
                limit = number % 4 + 1
                turns.set_limit(limit)
            case "ask" if turn in waiting:
                counted = [each for each in taken if id(each) not in slow_ones]
                has_come = len(counted) + waiting.index(turn) < limit
                assert turn.wait(0) == has_come
                if has_come:
                    waiting.remove(turn)
                    taken.append(turn)
            case "ask" if turn is not None:
                assert turn.wait(0)
            case "become slow" if turn in taken:
                turn.is_slow = slow
                slow_ones.add(id(turn))
            case "leave" if turn is not None:
                turns.leave(turn)
                (waiting if turn in waiting else taken).remove(turn)
        assert turns.waiting == len(waiting)
        assert [each.ahead for each in waiting] == list(range(len(waiting)))


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


HOST, OTHER = "10.0.0.2", "10.0.0.3"


def blocked_for(guard: Guard, clock: Clock, host: str = HOST) -> float:
    """Seconds until `host` is listened to again, to within a quarter of a second."""
    begun = clock.now
    while not guard.admits(host):
        clock.now += 0.25
    return clock.now - begun


def test_who_has_not_failed_is_admitted(clock: Clock) -> None:
    assert Guard(clock).admits(HOST)


def test_the_first_failures_are_free_and_then_each_doubles_the_time_up_to_a_minute(clock: Clock) -> None:
    guard = Guard(clock)
    blocked = []
    for _ in range(12):
        guard.failed(HOST)
        blocked.append(blocked_for(guard, clock))
    assert blocked == [0, 0, 0, 1, 2, 4, 8, 16, 32, 60, 60, 60]


def test_however_often_an_address_fails_it_is_blocked_for_a_minute(clock: Clock) -> None:
    guard = Guard(clock)
    for _ in range(5000):
        guard.failed(HOST)
    assert blocked_for(guard, clock) == 60


def test_failures_at_the_same_moment_count_too(clock: Clock) -> None:
    guard = Guard(clock)
    for _ in range(6):
        guard.failed(HOST)
    assert blocked_for(guard, clock) == 4


def test_an_address_that_fails_blocks_no_other(clock: Clock) -> None:
    guard = Guard(clock)
    for _ in range(10):
        guard.failed(HOST)
    assert not guard.admits(HOST)
    assert guard.admits(OTHER)
    guard.failed(OTHER)
    assert guard.admits(OTHER)


def test_time_alone_makes_nothing_good(clock: Clock) -> None:
    guard = Guard(clock)
    for _ in range(5):
        guard.failed(HOST)
    clock.now += 3600
    guard.failed(HOST)
    assert blocked_for(guard, clock) == 4


def test_a_success_makes_all_failures_good(clock: Clock) -> None:
    guard = Guard(clock)
    for _ in range(6):
        guard.failed(HOST)
    guard.succeeded(HOST)
    assert guard.admits(HOST)
    guard.failed(HOST)
    assert guard.admits(HOST)
    guard.succeeded(OTHER)
    assert guard.admits(OTHER)


def test_failures_are_logged_once_a_minute_for_each_address(clock: Clock) -> None:
    guard = Guard(clock)
    assert [guard.failed(HOST) for _ in range(5)] == [True, False, False, False, False]
    assert guard.failed(OTHER)
    clock.now += 59.75
    assert not guard.failed(HOST)
    clock.now += 0.25
    assert [guard.failed(HOST), guard.failed(HOST)] == [True, False]
    clock.now += 60
    assert guard.failed(HOST)


def test_what_an_address_does_is_logged_once_a_minute(clock: Clock) -> None:
    limit = LogLimit(clock)
    assert [limit.admits(HOST), limit.admits(HOST), limit.admits(OTHER)] == [True, False, True]
    clock.now += 59.75
    assert [limit.admits(HOST), limit.admits(OTHER)] == [False, False]
    clock.now += 0.25
    assert [limit.admits(HOST), limit.admits(HOST)] == [True, False]


def addresses() -> Iterator[str]:
    return (f"10.1.{n // 256}.{n % 256}" for n in range(REMEMBERED - 1))


def test_the_address_that_was_logged_least_recently_is_forgotten_first(clock: Clock) -> None:
    limit = LogLimit(clock)
    assert [limit.admits(HOST), limit.admits(OTHER)] == [True, True]
    assert {limit.admits(address) for address in addresses()} == {True}
    assert not limit.admits(OTHER)
    assert limit.admits(HOST)


def test_the_address_that_failed_least_recently_is_forgotten_first(clock: Clock) -> None:
    guard = Guard(clock)
    for _ in range(4):
        guard.failed(HOST)
    for _ in range(4):
        guard.failed(OTHER)
    guard.failed(HOST)
    for address in addresses():
        guard.failed(address)
    assert guard.admits(OTHER)
    assert not guard.admits(HOST)


def test_a_host_that_queues_often_delays_itself_only() -> None:
    turns = Turns(2)
    crowd = [turns.queue("crowd") for _ in range(6)]
    assert crowd[0].wait(0)
    assert crowd[1].wait(0)
    with turns.queue("alone") as alone:
        assert (alone.ahead, crowd[2].ahead) == (0, 1)
        turns.leave(crowd[0])
        assert not crowd[2].wait(0)
        assert alone.wait(0)
