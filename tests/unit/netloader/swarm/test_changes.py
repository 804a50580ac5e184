"""What changes while clients bring weights to one another: the weights of the source, its life, and whom they trust."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch

from support.certificates import Authority
from support.members import CHUNK, Member, members
from support.peers.strangers import Intruder
from support.sources import IDENTITY, Tensors, client_for, serving
from support.wait import wait_until
from vllm_ascend.model_loader.netloader.client.inquiry import inquire
from vllm_ascend.model_loader.netloader.errors import SourcesExhausted
from vllm_ascend.model_loader.netloader.server.publications import Publication
from vllm_ascend.model_loader.netloader.server.server import WeightServer
from vllm_ascend.model_loader.netloader.transport.base import Timeouts
from vllm_ascend.model_loader.netloader.transport.registry import transports
from vllm_ascend.model_loader.netloader.weights.identity import RankCoordinates
from vllm_ascend.model_loader.netloader.wire.access import Access
from vllm_ascend.model_loader.netloader.wire.messages import Accept, Fetch, Follow, Join, News, Offer

TCP = transports(["tcp"])
WEIGHTS = Tensors({"w": torch.arange(64 * CHUNK // 4, dtype=torch.int32)})
OTHERS = Tensors({"w": torch.arange(64 * CHUNK // 4, dtype=torch.int32) * 3})
NBYTES = WEIGHTS.manifest.nbytes
PATIENT = Timeouts(connect=30.0, stall=30.0)

pytestmark = pytest.mark.timeout(120)


def held_by(member: Member) -> int:
    publication = member.relay.publication
    return 0 if publication is None or publication.store.held is None else len(publication.store.held)


def publish(server: WeightServer, tensors: Tensors) -> None:
    """What `server` serves from now on, under another generation."""
    served = server._publications.served("target")
    assert served is not None
    store = replace(tensors.store(), generation=server.next_generation("target"))
    server.publish(Publication(served.identity, served.coordinates, store))


def test_where_the_source_gets_other_weights_in_the_middle_all_get_those() -> None:
    with (
        serving(WEIGHTS, TCP, max_bandwidth=NBYTES, timeouts=PATIENT) as (server, source),
        members(3, OTHERS, TCP, timeouts=PATIENT) as loading,
    ):
        for member in loading:
            member.start(source)
        wait_until(lambda: all(held_by(member) > 8 for member in loading))
        publish(server, OTHERS)
        for member in loading:
            assert member.join().source == source  # which compares every byte
        roots = {inquire(member.endpoint, 5).holdings[0].root for member in loading}
        assert roots == {OTHERS.store().root()}
        assert {reason for member in loading for reason in member.relay.ended} == {
            "the weights that it had were replaced by others"
        }


def test_where_the_source_gets_other_weights_those_who_have_all_of_the_old_ones_do_not_keep_them() -> None:
    """They have everything together, and no source that says so any more."""
    with (
        serving(WEIGHTS, TCP, max_bandwidth=NBYTES, timeouts=PATIENT) as (server, source),
        members(2, OTHERS, TCP, timeouts=PATIENT) as loading,
    ):
        for member in loading:
            member.start(source)
        wait_until(lambda: len({number for member in loading for number in held(member)}) > 60)
        publish(server, OTHERS)
        for member in loading:
            if member.fetched is None:
                member.join()


def held(member: Member) -> tuple[int, ...]:
    publication = member.relay.publication
    return () if publication is None or publication.store.held is None else publication.store.held.since(0, 64)


def test_two_that_are_sources_of_each_other_do_not_wait_for_ever() -> None:
    """Each is trusted by the other, still loads, and lacks what only the source had that is gone."""
    with (
        serving(WEIGHTS, TCP, max_bandwidth=NBYTES // 2) as (server, source),
        members(2, WEIGHTS, TCP, timeouts=Timeouts(2.0, 2.0)) as (first, second),
    ):
        first.start(source, second.endpoint)
        wait_until(lambda: held_by(first) > 4)
        second.start(source, first.endpoint)
        wait_until(lambda: held_by(second) > 4)
        begun = time.monotonic()
        server.close()
        for member in (first, second):
            with pytest.raises(AssertionError):
                member.join()
            assert isinstance(member.failure, SourcesExhausted)
        assert time.monotonic() - begun < 60


def test_a_source_that_is_away_for_a_moment_is_asked_again_while_replicas_deliver() -> None:
    with (
        serving(WEIGHTS, TCP, max_bandwidth=NBYTES, timeouts=PATIENT) as (server, source),
        members(2, WEIGHTS, TCP, timeouts=PATIENT) as loading,
    ):
        for member in loading:
            member.start(source)
        wait_until(lambda: all(held_by(member) > 4 for member in loading))
        server.sessions.end(server.sessions.all(), "somebody pulled the cable", denies=False)
        begun = time.monotonic()
        for member in loading:
            assert member.join().source == source
        assert time.monotonic() - begun < PATIENT.stall / 2


def test_a_relay_that_gives_up_costs_its_clients_nothing_that_has_passed() -> None:
    with (
        serving(WEIGHTS, TCP, max_bandwidth=NBYTES // 2, timeouts=PATIENT) as (_, source),
        members(2, WEIGHTS, TCP, timeouts=PATIENT) as (first, second),
    ):
        first.start(source)
        wait_until(lambda: held_by(first) > 8)
        second.start(source)
        wait_until(lambda: len(first.server.state().sessions) == 1)
        first.relay.end("it is tired")
        first.relay.complete = lambda: None  # type: ignore[method-assign]
        assert second.join().source == source
        assert second.client.received.total() <= NBYTES + 2 * CHUNK
        first.join()
        assert not inquire(first.endpoint, 5).holdings


def test_what_is_told_of_one_role_is_not_told_to_another() -> None:
    draft = msgspec.structs.replace(IDENTITY, role="draft")
    with serving(WEIGHTS, TCP) as (server, source):
        server.publish(Publication(draft, RankCoordinates(), WEIGHTS.store()))
        with Intruder(source, "127.0.0.5").greet() as line, Intruder(source, "127.0.0.5").greet() as data:
            data.attach(line.accepted(tensors=WEIGHTS)).say(Fetch(0, CHUNK)).read(CHUNK)
            line.say(Follow(19001)).hear_kind(News)
            wait_until(lambda: server.state().replicas["target"] == (":19001",))
            with Intruder(source, "127.0.0.6").greet() as other:
                join = Join(draft, RankCoordinates(), WEIGHTS.manifest.digest, (Offer("tcp"),))
                other.say(join).hear_kind(Accept)
                assert other.say(Follow(19002)).hear_kind(News)["peers"] == []
            assert server.state().replicas == {"target": (":19001",), "draft": ()}


@pytest.mark.parametrize("kind", ["token", "TLS"])
def test_relays_ask_for_what_their_configuration_asks_for(kind: str, tmp_path: Path) -> None:
    if kind == "token":
        access = Access(b"a token of thirty-two bytes long")
    else:
        access = Authority(tmp_path, "ours").identify("instance").access()
    with (
        serving(WEIGHTS, TCP, max_bandwidth=NBYTES, timeouts=PATIENT, access=access) as (_, source),
        members(2, WEIGHTS, TCP, timeouts=PATIENT, access=access) as loading,
    ):
        for member in loading:
            member.start(source)
        wait_until(lambda: held_by(loading[0]) > 0)
        stranger = client_for(WEIGHTS, TCP, timeouts=Timeouts(5.0, 5.0))
        with pytest.raises(SourcesExhausted):
            stranger.fetch([loading[0].endpoint])
        for member in loading:
            member.join()
            assert member.client.attempts == []
        first, second = loading
        assert first.client.received[str(second.endpoint)] + second.client.received[str(first.endpoint)] > 0
