"""Many clients at once: each passes on what it has, while it still loads."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from support.members import CHUNK, Member, members
from support.peers.impostor import Impostor
from support.peers.strangers import Intruder, is_idle
from support.sources import SMALL, Tensors, assert_serves, client_for, fetch, fetching, serving
from support.wait import wait_until
from vllm_ascend.model_loader.netloader.client.inquiry import inquire
from vllm_ascend.model_loader.netloader.errors import SourcesExhausted
from vllm_ascend.model_loader.netloader.transport.base import Timeouts, Transport
from vllm_ascend.model_loader.netloader.transport.registry import transports
from vllm_ascend.model_loader.netloader.wire.messages import Accept, Done, Fetch, Follow, News

TCP = transports(["tcp"])
GROUP = transports(["process_group"])
WEIGHTS = Tensors({"w": torch.arange(64 * CHUNK // 4, dtype=torch.int32)})
LIVE = replace(WEIGHTS, wanted_on=torch.device("cpu"))
"""The same, taken into parameters, as on an accelerator."""
OTHERS = Tensors({"w": torch.arange(64 * CHUNK // 4, dtype=torch.int32) * 3})
NBYTES = WEIGHTS.manifest.nbytes
PATIENT = Timeouts(connect=30.0, stall=30.0)

pytestmark = pytest.mark.timeout(120)


def sent_by(member_or_source: object, clients: list[Member]) -> int:
    return sum(each.client.received[str(member_or_source)] for each in clients)


def held_by(member: Member) -> int:
    """How many chunks it has and offers."""
    publication = member.relay.publication
    if publication is None or publication.store.held is None:
        return 0
    return len(publication.store.held)


def test_clients_that_start_together_take_most_from_each_other() -> None:
    with serving(WEIGHTS, TCP, max_bandwidth=NBYTES) as (_, source), members(4, WEIGHTS, TCP) as loading:
        for member in loading:
            member.start(source)
        for member in loading:
            assert member.join().source == source
        assert sent_by(source, loading) < 2 * NBYTES
        assert all(member.client.attempts == [] for member in loading)
        assert [member.server.state().served for member in loading] == [{"target": 1}] * 4


def test_who_waits_for_a_turn_takes_from_one_that_loads() -> None:
    with (
        serving(WEIGHTS, TCP, max_bandwidth=NBYTES, max_clients=1) as (server, source),
        members(2, WEIGHTS, TCP) as (first, second),
    ):
        first.start(source)
        wait_until(lambda: server.state().turns == 1)
        second.start(source)
        first.join()
        second.join()
        assert second.client.received[str(first.endpoint)] > 0
        assert second.client.attempts == []


def test_the_word_of_a_source_to_those_who_wait_is_its_confirmation() -> None:
    """Its only turn is never free."""
    with (
        serving(WEIGHTS, TCP, max_bandwidth=NBYTES // 2, max_clients=1, timeouts=PATIENT) as (_, source),
        members(2, WEIGHTS, TCP, timeouts=PATIENT) as (first, second),
        Intruder(source).greet() as held,
    ):
        first.start(source)
        wait_until(lambda: held_by(first) > 0)
        held.join(tensors=WEIGHTS)  # comes next, and keeps the turn
        wait_until(lambda: inquire(source, 5).waiting == 1)
        second.start(source)
        first.join()
        fetched = second.join()
        assert fetched.source == first.endpoint
        assert second.client.received[str(source)] == 0


def test_two_sources_bring_a_part_each() -> None:
    rate = NBYTES // 2
    with serving(WEIGHTS, TCP, max_bandwidth=rate) as (_, one), serving(WEIGHTS, TCP, max_bandwidth=rate) as (_, two):
        client, fetched = fetch(WEIGHTS, TCP, one, two)
    WEIGHTS.assert_in(fetched.memory)
    assert min(client.received[str(one)], client.received[str(two)]) > NBYTES // 4
    assert client.received.total() <= 1.05 * NBYTES
    assert client.attempts == []


def test_a_source_of_other_contents_is_left_by_name_while_one_delivers() -> None:
    with serving(WEIGHTS, TCP, max_bandwidth=NBYTES) as (_, one), serving(OTHERS, TCP) as (_, other):
        client, fetched = fetch(WEIGHTS, TCP, one, other)
    WEIGHTS.assert_in(fetched.memory)
    assert client.received[str(other)] == 0
    assert {attempt.source for attempt in client.attempts} == {str(other)}
    assert client.attempts[0].reason.startswith(
        "it holds other contents than those that are being loaded: its root digest is "
    )


def test_a_source_of_other_contents_whose_turn_comes_at_the_end_replaces_nothing() -> None:
    with (
        serving(OTHERS, TCP, timeouts=PATIENT, max_clients=1) as (busy, other),
        Impostor({}, WEIGHTS) as first,
        Intruder(other).greet() as held,
    ):

        def confirm(line: Any, _: Any) -> None:
            wait_until(lambda: busy.state().waiting == 1)
            held.reset()
            wait_until(lambda: len(client.attempts) == 1)
            line.say(first.right_answer("Done"))

        first.acts["Done"] = confirm
        held.accepted(tensors=OTHERS)
        client = client_for(WEIGHTS, TCP, timeouts=PATIENT)
        fetched = client.fetch([other, first.endpoint])
    assert fetched.source == first.endpoint
    assert client.attempts[0].reason.startswith("it holds other contents than those that are being loaded")
    WEIGHTS.assert_in(fetched.memory)


def test_by_process_group_too_what_has_come_is_passed_on() -> None:
    with (
        serving(WEIGHTS, GROUP, max_bandwidth=NBYTES, timeouts=PATIENT) as (_, source),
        members(2, WEIGHTS, GROUP, timeouts=PATIENT) as loading,
    ):
        for member in loading:
            member.start(source)
        for member in loading:
            member.join()
        assert sent_by(source, loading) < 2 * NBYTES
        assert all(member.client.attempts == [] for member in loading)


@pytest.mark.parametrize("kinds", [TCP, GROUP], ids=["tcp", "process group"])
def test_what_lies_in_the_parameters_of_a_model_is_passed_on_too(kinds: tuple[Transport, ...]) -> None:
    with (
        serving(WEIGHTS, kinds, max_bandwidth=NBYTES, timeouts=PATIENT) as (_, source),
        members(3, LIVE, kinds, timeouts=PATIENT) as loading,
    ):
        for member in loading:
            member.start(source)
        for member in loading:
            member.join()
        assert sent_by(source, loading) < 2.5 * NBYTES
        assert all(member.client.attempts == [] for member in loading)


def test_a_member_that_dies_costs_the_others_time_and_little_else() -> None:
    with (
        serving(WEIGHTS, TCP, max_bandwidth=NBYTES // 2) as (_, source),
        members(3, WEIGHTS, TCP) as (first, second, dying),
    ):
        for member in (first, second, dying):
            member.start(source)
        wait_until(lambda: held_by(dying) > 8)
        gone = str(dying.endpoint)
        dying.server.close()
        first.join()
        second.join()
        for member in (first, second):
            assert {attempt.source for attempt in member.client.attempts} <= {gone}
            assert member.client.received.total() <= 1.1 * NBYTES + 4 * CHUNK
        dying.join()


def test_where_the_source_dies_after_all_was_sent_its_clients_complete_each_other(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)
    with (
        serving(WEIGHTS, TCP, max_bandwidth=NBYTES) as (server, source),
        members(2, WEIGHTS, TCP) as (first, second),
    ):
        first.start(source)
        second.start(source)

        def have_everything_together() -> bool:
            held: set[int] = set()
            for member in (first, second):
                publication = member.relay.publication
                if publication is not None and publication.store.held is not None:
                    held.update(publication.store.held.since(0, 64))
            return len(held) == 64

        wait_until(have_everything_together)
        was_complete = held_by(first) == held_by(second) == 64
        server.close()
        first.join()
        second.join()
    assert was_complete or "nobody is left to confirm that the weights have not been replaced since" in caplog.text


def test_where_the_source_dies_before_all_was_sent_nobody_gets_anything() -> None:
    with (
        serving(WEIGHTS, TCP, max_bandwidth=NBYTES // 2) as (server, source),
        members(2, WEIGHTS, TCP, timeouts=Timeouts(2.0, 1.0)) as (first, second),
    ):
        first.start(source)
        second.start(source)
        wait_until(lambda: held_by(first) > 8)
        server.close()
        for member in (first, second):
            with pytest.raises(AssertionError, match="no connection"):
                member.join()
            assert isinstance(member.failure, SourcesExhausted)
        # What was offered is offered no more, by name.
        assert [member.relay.ended for member in (first, second)] == [["it could not load these weights"]] * 2
        assert all(not inquire(member.endpoint, 5).holdings for member in (first, second))


def test_a_store_that_fills_gives_what_has_passed_and_nothing_else() -> None:
    with (
        serving(WEIGHTS, TCP, max_bandwidth=NBYTES // 4) as (_, source),
        members(1, WEIGHTS, TCP) as (member,),
    ):
        member.start(source)
        wait_until(lambda: held_by(member) > 4)
        (holding,) = inquire(member.endpoint, 5).holdings
        assert 4 * CHUNK < holding.held < holding.nbytes == NBYTES
        with Intruder(member.endpoint).greet() as line, Intruder(member.endpoint).greet() as data:
            line.join(tensors=WEIGHTS)
            accept = line.hear_kind(Accept)
            assert accept["filling"]
            data.attach(accept["session"])
            told = line.say(Follow()).hear_kind(News)
            assert not told["whole"]
            number = told["chunks"][-1]
            assert data.say(Fetch(number * CHUNK, CHUNK)).read(CHUNK) == bytes(
                WEIGHTS.store().bytes[number * CHUNK : (number + 1) * CHUNK]
            )
            absent = next(each for each in range(64) if each not in told["chunks"] and each not in held(member))
            data.say(Fetch(absent * CHUNK, CHUNK)).hear_out()

            confirm = line.say(Done()).hear()
            while confirm["type"] == "News":
                confirm = line.hear()
            assert confirm["filling"]
        member.join()
        assert_serves(member.endpoint, WEIGHTS)


def held(member: Member) -> tuple[int, ...]:
    publication = member.relay.publication
    assert publication is not None
    assert publication.store.held is not None
    return publication.store.held.since(0, 64)


def test_news_is_told_as_it_comes_once_and_ends_with_the_word_that_all_is_confirmed() -> None:
    with (
        serving(WEIGHTS, TCP, max_bandwidth=NBYTES) as (_, source),
        members(1, WEIGHTS, TCP) as (member,),
    ):
        member.start(source)
        wait_until(lambda: held_by(member) > 0)
        with Intruder(member.endpoint).greet() as line:
            line.accepted(tensors=WEIGHTS)
            line.say(Follow())
            chunks: list[int] = []
            while not (news := line.hear_kind(News))["whole"]:
                chunks += news["chunks"]
            chunks += news["chunks"]
            assert sorted(chunks) == list(range(64))
            member.join()
            line.say(Done())
            assert not line.hear()["filling"]
        wait_until(lambda: member.server.state().is_idle)


def test_who_only_follows_is_kept_as_long_as_it_shows_that_it_is_there() -> None:
    timeouts = Timeouts(connect=5.0, stall=0.5)
    with serving(SMALL, TCP, timeouts=timeouts) as (server, source), Intruder(source).greet() as line:
        line.accepted()
        for _ in range(8):
            line.say(Follow()).hear_kind(News)
            time.sleep(0.1)
        assert len(server.state().sessions) == 1
        line.hear_out()
        wait_until(lambda: is_idle(server))


def test_only_who_has_taken_something_is_named_and_not_to_itself() -> None:
    with serving(WEIGHTS, TCP) as (server, source), Intruder(source, "127.0.0.5").greet() as line:
        session = line.accepted(tensors=WEIGHTS)
        assert line.say(Follow(19001)).hear_kind(News)["peers"] == []
        with Intruder(source, "127.0.0.6").greet() as other:
            other.accepted(tensors=WEIGHTS)
            assert other.say(Follow(19002)).hear_kind(News)["peers"] == []
            with Intruder(source, "127.0.0.5").greet() as data:
                data.attach(session).say(Fetch(0, CHUNK)).read(CHUNK)
                line.say(Follow(19001)).hear_kind(News)
            news = other.hear_kind(News)
            while not news["peers"]:
                news = other.hear_kind(News)
            assert news["peers"] == [":19001"]
            assert server.state().replicas == {"target": (":19001",)}
        line.reset()
        wait_until(lambda: server.state().replicas == {"target": ()})


def test_memory_that_clients_read_is_sealed_when_the_load_is_over() -> None:
    """The kernel does not seal pages that lie in the buffers of a socket."""
    with (
        serving(WEIGHTS, TCP, max_bandwidth=NBYTES // 2) as (_, source),
        members(1, WEIGHTS, TCP, timeouts=PATIENT) as (member,),
    ):
        member.start(source)
        wait_until(lambda: held_by(member) > 4)
        with Intruder(member.endpoint).greet() as line, Intruder(member.endpoint).greet() as data:
            data.attach(line.accepted(tensors=WEIGHTS))
            for number in line.say(Follow()).hear_kind(News)["chunks"]:
                data.say(Fetch(number * CHUNK, CHUNK))  # and never reads what comes
            fetched = member.join()
            assert fetched.memory.servable


def test_a_client_that_does_not_relay_takes_from_those_who_do() -> None:
    with (
        serving(WEIGHTS, TCP, max_bandwidth=NBYTES) as (_, source),
        members(1, WEIGHTS, TCP) as (member,),
    ):
        member.start(source)
        wait_until(lambda: held_by(member) > 0)
        client = client_for(WEIGHTS, TCP)
        with fetching(client, source) as result:
            WEIGHTS.assert_in(result().memory)
        member.join()
        assert client.received[str(member.endpoint)] > 0
        assert member.client.received.total() <= NBYTES + CHUNK


def test_who_does_not_verify_takes_nothing_from_one_that_still_loads() -> None:
    with (
        serving(WEIGHTS, TCP, max_bandwidth=NBYTES // 2) as (_, source),
        members(1, WEIGHTS, TCP) as (member,),
    ):
        member.start(source)
        wait_until(lambda: held_by(member) > 0)
        with pytest.raises(SourcesExhausted, match='it still loads these weights itself, and VERIFY is "off" here'):
            fetch(WEIGHTS, TCP, member.endpoint, verify=False)
        member.join()


def test_a_source_that_is_configured_and_still_loads_confirms_when_it_is_done() -> None:
    with (
        serving(WEIGHTS, TCP, max_bandwidth=NBYTES) as (_, source),
        members(2, WEIGHTS, TCP) as (first, second),
    ):
        first.start(source)
        wait_until(lambda: held_by(first) > 0)
        second.start(first.endpoint)
        assert second.join().source == first.endpoint
        first.join()
        assert second.client.attempts == []


def test_a_source_that_is_configured_and_never_done_is_not_believed() -> None:
    with (
        serving(WEIGHTS, TCP, max_bandwidth=NBYTES) as (_, source),
        members(2, WEIGHTS, TCP, timeouts=Timeouts(5.0, 2.0)) as (first, second),
    ):
        first.relay.complete = lambda: None  # type: ignore[method-assign]
        first.start(source)
        wait_until(lambda: held_by(first) > 0)
        second.start(first.endpoint)
        first.join()
        with pytest.raises(AssertionError, match=r"it has all chunks and was not sure of them for 2 s"):
            second.join()


def test_members_publish_the_weights_under_one_root() -> None:
    with serving(WEIGHTS, TCP) as (_, source), members(2, WEIGHTS, TCP) as loading:
        for member in loading:
            member.start(source)
            member.join()
        roots = {inquire(endpoint, 5).holdings[0].root for endpoint in (source, *(each.endpoint for each in loading))}
    assert roots == {replace(WEIGHTS.store()).root()}
