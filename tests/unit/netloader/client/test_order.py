"""Whom a client asks next: the order of sources, without sockets, threads or a clock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ascend.model_loader.netloader.client.candidates import Candidate, Contents
from vllm_ascend.model_loader.netloader.client.search.order import REFERRALS_FOLLOWED, TRIES, SourceOrder
from vllm_ascend.model_loader.netloader.client.search.replicas import EXCUSED_RATE
from vllm_ascend.model_loader.netloader.client.search.steps import Ask, AwaitTurn, LeaveQueues, Pause, Step
from vllm_ascend.model_loader.netloader.client.swarm.peering import DEGREE
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import (
    SourceError,
    SourceFailed,
    SourceRefused,
    SourceTooSlow,
    SourceUnreachable,
    TransportError,
)

A, B, C = (Endpoint(f"10.0.0.{n}", 19000) for n in (1, 2, 3))
TRANSPORTS = ("shared_memory", "tcp")
HELD = Contents("c0ffee", "f00d")
FAILED = SourceFailed("the peer closed the connection")


def order_of(*configured: Endpoint, wait_timeout: float = 300.0, **settings: bool | float) -> SourceOrder:
    """An order whose pauses take one second, two, three and so on."""
    pauses = map(float, count(1))
    return SourceOrder(configured, TRANSPORTS, pauses, wait_timeout=wait_timeout, **settings)  # type: ignore[arg-type]


def asked(order: SourceOrder) -> Candidate:
    """Whom the next step asks, by all transports."""
    step = order.next()
    assert isinstance(step, Ask), step
    assert step.transports == TRANSPORTS
    return step.candidate


def all_asked(order: SourceOrder) -> list[Endpoint]:
    """Whom the following steps ask, until there is something else to do."""
    endpoints: list[Endpoint] = []
    while isinstance(step := order.next(), Ask):
        endpoints.append(step.candidate.endpoint)
    assert step is None, step
    return endpoints


def replicas_of(order: SourceOrder, source: Candidate, *endpoints: Endpoint) -> list[Candidate]:
    """The replicas at `endpoints`, which `source` has named and which are being asked by now."""
    assert order.replicas.named(source, source.endpoint, [str(each) for each in endpoints], HELD)
    found = {candidate.endpoint: candidate for candidate in all_replicas(order)}
    return [found[endpoint] for endpoint in endpoints]


def all_replicas(order: SourceOrder) -> list[Candidate]:
    """The replicas that may be asked now, by all transports."""
    asks = list(iter(order.replicas.next, None))
    assert all(ask.transports == TRANSPORTS for ask in asks)
    return [ask.candidate for ask in asks]


def test_configured_sources_are_asked_once_in_their_order() -> None:
    assert all_asked(order_of(A, B, C)) == [A, B, C]
    assert all_asked(order_of()) == []


def test_a_source_that_failed_in_the_middle_is_asked_again_after_the_others_and_a_pause() -> None:
    order = order_of(A, B)
    order.failed(asked(order), FAILED)
    order.failed(asked(order), FAILED)
    assert order.next() == Pause(1.0)
    order.failed(asked(order), FAILED)
    assert asked(order).endpoint == B
    assert order.next() == Pause(2.0)
    assert all_asked(order) == [A]


def test_a_source_is_given_up_when_it_has_failed_in_the_middle_some_times() -> None:
    order = order_of(A)
    for number in range(1, TRIES):
        order.failed(asked(order), FAILED)
        assert order.next() == Pause(float(number))
    order.failed(asked(order), FAILED)
    assert order.next() is None


@pytest.mark.parametrize(
    "error", [SourceRefused("no"), SourceUnreachable("nobody"), TransportError("no socket can be had")], ids=repr
)
def test_a_source_that_refuses_or_cannot_be_reached_is_not_asked_again(error: SourceError | TransportError) -> None:
    order = order_of(A, B)
    order.failed(asked(order), error)
    assert all_asked(order) == [B]


def test_where_only_the_transport_failed_the_source_is_asked_at_once_by_the_others() -> None:
    order = order_of(A, B)
    candidate = asked(order)
    order.failed(candidate, TransportError("not between these machines"), ("tcp",))
    assert order.next() == Ask(candidate, ("tcp",))
    order.failed(candidate, FAILED)
    assert asked(order).endpoint == B
    assert order.next() == Pause(1.0)
    assert order.next() == Ask(candidate, TRANSPORTS), "in another round, every transport gets another chance"


def test_a_source_that_is_too_slow_is_asked_again_in_the_end_if_there_is_no_disk() -> None:
    order = order_of(A, B, disk_remains=False)
    slow = asked(order)
    order.failed(slow, SourceTooSlow("it drips"))
    order.failed(asked(order), FAILED)
    assert order.next() == Pause(1.0)
    assert asked(order).endpoint == B
    assert asked(order) == slow
    assert order.next() is None


def test_where_the_disk_remains_a_source_that_is_too_slow_is_not_asked_again() -> None:
    order = order_of(A, B)
    order.failed(asked(order), SourceTooSlow("it drips"))
    assert all_asked(order) == [B]


def test_others_are_asked_before_a_busy_source_is_waited_for() -> None:
    order = order_of(A, B, wait_timeout=60.0)
    assert order.busy(asked(order))
    assert asked(order).endpoint == B
    assert order.next() == AwaitTurn(60.0)


def test_all_waits_together_take_no_longer_than_the_wait_timeout() -> None:
    order = order_of(A, B, wait_timeout=60.0)
    for _ in range(2):
        assert order.busy(asked(order))
    assert order.next() == AwaitTurn(60.0)
    order.waited(25.0)
    assert order.next() == AwaitTurn(35.0)
    order.waited(35.0)
    assert order.next() == LeaveQueues()
    assert order.next() is None


def test_where_nobody_may_be_waited_for_a_busy_source_is_left_when_the_others_have_been_asked() -> None:
    order = order_of(A, B, wait_timeout=0.0)
    order.busy(asked(order))
    assert asked(order).endpoint == B
    assert order.next() == LeaveQueues()


def test_while_a_source_is_waited_for_the_next_round_begins_beside_it() -> None:
    order = order_of(A, B)
    order.busy(asked(order))
    order.failed(asked(order), FAILED)
    assert order.next() == AwaitTurn(1.0)
    order.waited(0.5)  # something has happened meanwhile
    assert order.next() == AwaitTurn(2.0)
    order.waited(2.0)
    assert asked(order).endpoint == B
    assert order.next() == AwaitTurn(297.5)


def test_a_round_that_is_due_later_than_the_wait_timeout_does_not_prolong_it() -> None:
    order = order_of(A, B, wait_timeout=0.25)
    order.busy(asked(order))
    order.failed(asked(order), FAILED)
    assert order.next() == AwaitTurn(0.25)
    order.waited(0.25)
    assert order.next() == LeaveQueues()
    assert order.next() == Pause(2.0)
    assert all_asked(order) == [B]


def test_a_source_whose_turn_has_come_is_not_waited_for_any_more() -> None:
    order = order_of(A)
    candidate = asked(order)
    order.busy(candidate)
    order.left_queue(candidate)
    assert order.next() is None
    order.failed(candidate, FAILED)
    assert order.next() == Pause(1.0)


def test_a_turn_that_was_given_back_is_asked_for_in_the_next_round() -> None:
    order = order_of(A, B)
    busy, delivering = asked(order), asked(order)
    order.busy(busy)
    order.postponed(busy)
    order.failed(delivering, FAILED)
    assert order.next() == Pause(1.0)
    assert all_asked(order) == [A, B]


def test_replicas_are_asked_beside_the_sources() -> None:
    order = order_of(A, B)
    source = asked(order)
    order.busy(source)
    assert replicas_of(order, source, C, Endpoint("10.0.0.4", 5)) == [
        Candidate(C, A, HELD),
        Candidate(Endpoint("10.0.0.4", 5), A, HELD),
    ]
    assert asked(order).endpoint == B


def test_so_many_replicas_are_asked_at_once() -> None:
    order = order_of(A)
    source = asked(order)
    assert order.replicas.named(source, A, [f"10.1.0.{n}:1" for n in range(3 * DEGREE)], HELD)
    first = all_replicas(order)
    assert len(first) == DEGREE
    order.replicas.ended(first[0])
    order.failed(first[1], FAILED)
    assert len(all_replicas(order)) == 2


def test_while_only_replicas_deliver_the_next_round_begins_beside_them() -> None:
    order = order_of(A, B)
    order.failed(asked(order), FAILED)
    assert order.pause_beside_replicas() == 1.0
    assert asked(order).endpoint == B
    order.begin_round()
    helper = order.helper()
    assert helper is not None
    assert helper.candidate.endpoint == A
    assert order.pause_beside_replicas() is None


def test_a_source_that_can_deliver_after_all_comes_next() -> None:
    order = order_of(A, B)
    source = asked(order)
    order.retry(source)
    assert all_asked(order) == [A, B]


def test_when_other_weights_are_to_be_loaded_those_who_have_the_old_ones_are_forgotten() -> None:
    order = order_of(A)
    source = asked(order)
    order.replicas.agreed(HELD.root)
    failed, _ = replicas_of(order, source, B, C)
    order.failed(failed, FAILED)
    order.replicas.agreed("other")
    assert all_replicas(order) == []
    assert not order.replicas.named(source, A, [str(C)], HELD)
    assert order.replicas.named(source, A, [str(B), str(C)], Contents("other", ""))
    assert [each.endpoint for each in all_replicas(order)] == [C], "it has failed once"


def test_no_more_replicas_are_asked_at_once_than_their_transport_allows() -> None:
    order = order_of(A, peers=3)
    source = asked(order)
    assert order.replicas.named(source, A, [f"10.1.0.{n}:1" for n in range(9)], HELD)
    assert order.replicas.joined_here(B, HELD)
    assert len(all_replicas(order)) == 3
    order.replicas.agreed("other")
    order.replicas.agreed(HELD.root)
    assert order.replicas.named(source, A, [f"10.2.0.{n}:1" for n in range(9)], HELD)
    assert len(all_replicas(order)) == 3


def test_a_source_that_helps_is_the_next_of_this_round() -> None:
    order = order_of(A, B)
    order.failed(asked(order), FAILED)
    helper = order.helper()
    assert helper is not None
    assert helper.candidate.endpoint == B
    assert order.helper() is None


def test_whoever_is_to_follow_nobody_asks_no_replica() -> None:
    order = order_of(A)
    source = asked(order)
    assert order.replicas.named(source, A, [str(B)], HELD)
    order.replicas.follow_nobody()
    assert all_replicas(order) == []
    assert not order.replicas.named(source, A, [str(C)], HELD)


def test_a_replica_without_anything_new_is_left_only_for_another_one() -> None:
    order = order_of(A)
    source = asked(order)
    replicas = replicas_of(order, source, *(Endpoint("10.0.1.1", port) for port in range(1, DEGREE + 1)))
    idle = {replica.endpoint: 60.0 for replica in replicas}
    assert order.replicas.useless(idle) is None
    assert order.replicas.named(source, A, [str(C)], HELD)
    assert order.replicas.useless(idle) in idle


@pytest.mark.parametrize(
    ("settings", "contents"),
    [({}, Contents("", "f00d")), ({"follows_replicas": False}, HELD)],
    ids=["without a root digest", "without verification"],
)
def test_replicas_that_nobody_can_tell_from_strangers_are_not_asked(
    settings: dict[str, bool], contents: Contents
) -> None:
    order = order_of(A, **settings)
    assert not order.replicas.named(asked(order), A, [str(B)], contents)
    assert all_replicas(order) == []


def test_a_replica_names_others_that_have_the_same_and_no_ranks() -> None:
    order = order_of(A)
    (replica,) = replicas_of(order, asked(order), B)
    assert order.replicas.named(replica, B, [str(C)], HELD)
    assert all_replicas(order) == [Candidate(C, B, HELD)]
    assert not order.referred(replica, B, [str(C)])
    assert order.next() is None


def test_one_who_names_very_many_pushes_out_nobody_whom_others_name() -> None:
    order = order_of(A)
    source = asked(order)
    (liar,) = replicas_of(order, source, B)
    many = [f"10.{n // 60}.1.{n % 60}:1" for n in range(4200)]
    for begin in range(0, 4200, 60):
        order.replicas.named(liar, B, many[begin : begin + 60], HELD)
    assert order.replicas.named(source, A, [str(C)], HELD)
    while (ask := order.replicas.next()) is not None and ask.candidate.endpoint != C:
        order.replicas.failed(ask.candidate, FAILED)
    assert ask is not None


def test_who_was_named_before_is_not_asked_again() -> None:
    order = order_of(A, B)
    source = asked(order)
    replicas_of(order, source, C)
    order.replicas.named(source, A, [str(A), str(B), str(C)], HELD)
    assert all_replicas(order) == []


@pytest.mark.parametrize("error", [FAILED, SourceTooSlow("it drips"), SourceRefused("no")], ids=repr)
def test_a_replica_that_failed_is_not_asked_again(error: SourceError) -> None:
    order = order_of(A, disk_remains=False)
    (replica,) = replicas_of(order, asked(order), B)
    order.failed(replica, error)
    assert (order.next(), all_replicas(order)) == (None, [])


def test_a_busy_replica_is_asked_again_only_if_it_is_named_again() -> None:
    order = order_of(A)
    source = asked(order)
    (replica,) = replicas_of(order, source, C)
    assert not order.busy(replica)
    assert all_replicas(order) == []
    for _ in range(1, TRIES):
        assert replicas_of(order, source, C) == [replica]
        assert not order.busy(replica)
    order.replicas.named(source, A, [str(C)], HELD)
    assert all_replicas(order) == []


def test_who_joins_here_is_asked_too() -> None:
    order = order_of(A)
    assert order.replicas.joined_here(B, HELD)
    assert all_replicas(order) == [Candidate(B, B, HELD)]


def test_replicas_are_forgotten_when_they_have_wasted_too_much_time_together() -> None:
    order = order_of(A, B, replica_seconds=30.0)
    replicas_of(order, asked(order), *(Endpoint("10.0.1.1", port) for port in (1, 2, 3)))
    order.replicas.spent(20.0, 0)
    order.replicas.spent(10.0, 0)
    assert order.replicas.named(Candidate(A), A, [str(C)], HELD), "so far they may"
    order.replicas.spent(0.5, 0)
    assert all_replicas(order) == []
    assert all_asked(order) == [B]


def test_the_time_in_which_a_replica_brings_something_is_not_wasted() -> None:
    order = order_of(A, replica_seconds=30.0)
    replicas_of(order, asked(order), B)
    order.replicas.spent(100.0, 80 * EXCUSED_RATE)
    order.replicas.spent(1.0, 80 * EXCUSED_RATE)  # what it brings in one session excuses no other
    order.replicas.spent(10.0, 0)
    assert order.replicas.named(Candidate(A), A, [str(C)], HELD)
    order.replicas.spent(0.5, 0)
    assert all_replicas(order) == []


def test_other_ranks_of_a_configured_source_are_asked_next() -> None:
    order = order_of(A, B)
    source = asked(order)
    assert order.referred(source, Endpoint("10.9.9.9", 19000), [":19001", str(C), "not a host:9", "no port"])
    assert [asked(order) for _ in range(2)] == [Candidate(Endpoint("10.9.9.9", 19001), A), Candidate(C, A)]
    assert all_asked(order) == [B]


def test_referrals_to_a_port_lead_to_the_host_that_was_reached_by_either_protocol() -> None:
    order = order_of(A)
    assert order.referred(asked(order), Endpoint("fd00::1", 19000), [":19001"])
    assert asked(order).endpoint == Endpoint("fd00::1", 19001)


def test_a_rank_that_was_named_by_another_is_not_believed() -> None:
    order = order_of(A)
    order.referred(asked(order), A, [str(B)])
    assert not order.referred(asked(order), B, [str(C)])
    assert order.next() is None


def test_a_refusal_that_names_nobody_is_no_referral() -> None:
    order = order_of(A)
    assert not order.referred(asked(order), A, [])


def test_a_referral_that_leads_nowhere_is_believed_and_adds_nobody() -> None:
    order = order_of(A)
    assert order.referred(asked(order), A, [str(A), "no port"])
    assert order.next() is None


def test_so_many_ranks_are_followed() -> None:
    order = order_of(A)
    source = asked(order)
    order.referred(source, A, [f"10.1.{n // 200}.{n % 200}:1" for n in range(REFERRALS_FOLLOWED + 9)])
    assert len(all_asked(order)) == REFERRALS_FOLLOWED


def others_left(order: SourceOrder) -> None:
    pass


def others_busy(order: SourceOrder) -> None:
    order.busy(asked(order))


def others_failed(order: SourceOrder) -> None:
    order.failed(asked(order), FAILED)


def others_refused(order: SourceOrder) -> None:
    order.failed(asked(order), SourceRefused("no"))


@pytest.mark.parametrize(
    ("others", "there_are"),
    [(others_left, True), (others_busy, True), (others_failed, True), (others_refused, False)],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_source_may_be_left_where_another_one_or_the_disk_can_deliver(others: object, there_are: bool) -> None:
    for disk_remains in (True, False):
        order = order_of(A, B, disk_remains=disk_remains)
        current = asked(order)
        assert callable(others)
        others(order)
        assert order.may_leave(current) == (there_are or disk_remains)


def test_a_replica_may_always_be_left() -> None:
    order = order_of(A, disk_remains=False)
    (replica,) = replicas_of(order, asked(order), B)
    assert order.may_leave(replica)


def test_several_sources_can_be_asked_at_a_time() -> None:
    order = order_of(A, B, C)
    first, second, third = (asked(order) for _ in range(3))
    assert order.next() is None, "nobody is left beside those who are being asked"
    order.failed(second, FAILED)
    assert order.next() == Pause(1.0)
    assert asked(order) == second
    order.busy(third)
    assert order.next() == AwaitTurn(300.0)
    assert len(replicas_of(order, first, Endpoint("10.0.0.9", 1))) == 1


class Driver:
    """Does each step with the outcomes that it is given, and holds what must be true of the order."""

    def __init__(self, order: SourceOrder) -> None:
        self.order = order
        self.failures: Counter[Endpoint] = Counter()
        self.waited = 0.0
        self.queued: list[Candidate] = []
        self._next_host = count(1)

    def do(self, step: Step | None, outcome: int) -> None:
        match step:
            case Ask(candidate, transports):
                self._ask(candidate, transports, outcome)
            case AwaitTurn(seconds) if outcome % 2:
                self.order.waited(seconds)
                self.waited += seconds
            case AwaitTurn():
                candidate = self.queued.pop()
                self.order.left_queue(candidate)
                self._fail(candidate)
            case LeaveQueues():
                assert self.queued
                self.queued.clear()

    def _ask(self, candidate: Candidate, transports: Sequence[str], outcome: int) -> None:
        assert candidate not in self.queued, "the client has a place there already"
        assert self.failures[candidate.endpoint] < (1 if candidate.is_replica else TRIES)
        match outcome:
            case 0 | 1:
                self._fail(candidate)
            case 2 if self.order.busy(candidate):
                self.queued.append(candidate)
            case 3 if len(transports) > 1:
                self.order.failed(candidate, TransportError("not here"), transports[1:])
            case 4:
                name = f"10.2.0.{next(self._next_host)}:1"
                self.order.replicas.named(candidate, candidate.endpoint, [name], HELD)
                self._fail(candidate)

    def _fail(self, candidate: Candidate) -> None:
        self.failures[candidate.endpoint] += 1
        self.order.failed(candidate, FAILED)


@given(outcomes=st.lists(st.integers(0, 5), max_size=100), configured=st.integers(0, 3))
def test_whatever_sources_do_the_search_comes_to_its_end(outcomes: list[int], configured: int) -> None:
    driver = Driver(order_of(*(A, B, C)[:configured], wait_timeout=5.0))
    for outcome in outcomes:
        driver.do(driver.order.next(), outcome)
    for _ in range(1000):
        if (step := driver.order.replicas.next() or driver.order.next()) is None:
            break
        driver.do(step, 1)
    assert driver.order.next() is None
    assert driver.waited <= 5.0
    assert driver.queued == []
