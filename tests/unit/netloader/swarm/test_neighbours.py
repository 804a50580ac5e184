"""Several that load the same weights on one host: these cross the network once, and all have the same pages."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest

from support.child import Child
from support.members import CHUNK, Member, members
from support.neighbour import Neighbour, weights
from support.sources import IDENTITY, client_for, fetch, fetching, serving
from support.wait import wait_until
from vllm_ascend.model_loader.netloader.client import neighbours
from vllm_ascend.model_loader.netloader.client.inquiry import inquire
from vllm_ascend.model_loader.netloader.client.neighbours import Neighbours
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.server.publications import Publication
from vllm_ascend.model_loader.netloader.server.requests import Settings
from vllm_ascend.model_loader.netloader.server.server import WeightServer
from vllm_ascend.model_loader.netloader.transport.base import Timeouts
from vllm_ascend.model_loader.netloader.transport.chunks.log import ChunkLog
from vllm_ascend.model_loader.netloader.transport.digests import StoreDigests
from vllm_ascend.model_loader.netloader.transport.registry import transports
from vllm_ascend.model_loader.netloader.weights.identity import RankCoordinates
from vllm_ascend.model_loader.netloader.weights.memory import Memory
from vllm_ascend.model_loader.netloader.wire.access import Access

TCP = transports(["tcp"])
BOTH = transports(["shared_memory", "tcp"])
CHUNKS = 64
WEIGHTS, OTHERS = weights(CHUNKS), weights(CHUNKS, 3)
NBYTES = WEIGHTS.manifest.nbytes
PATIENT = Timeouts(connect=30.0, stall=30.0)

pytestmark = pytest.mark.timeout(120)


def file_of(memory: Memory) -> int:
    assert memory.descriptor is not None
    return os.fstat(memory.descriptor).st_ino


def held_by(member: Member) -> int:
    publication = member.relay.publication
    if publication is None or publication.store.held is None:
        return 0
    return len(publication.store.held)


def received_by(*loading: Member) -> int:
    return sum(each.client.received.total() for each in loading)


@pytest.mark.parametrize("count", [2, 3])
def test_the_weights_cross_the_network_once_and_all_have_the_same_pages(count: int) -> None:
    with (
        serving(WEIGHTS, TCP, max_bandwidth=NBYTES) as (_, source),
        members(count, WEIGHTS, BOTH, timeouts=PATIENT) as loading,
    ):
        for member in loading:
            member.start(source)
        fetched = [member.join() for member in loading]
        assert received_by(*loading) == NBYTES
        assert len({file_of(each.memory) for each in fetched}) == 1
        assert {each.source for each in fetched} == {source}
        assert all(member.client.attempts == [] for member in loading)
        (first,) = (member for member in loading if member.client.received.total())
        assert [each.client.shared for each in loading if each is not first] == [
            {str(first.endpoint): NBYTES} for _ in range(count - 1)
        ]


def test_who_comes_later_maps_the_pages_at_once() -> None:
    with serving(WEIGHTS, TCP) as (_, source), members(2, WEIGHTS, BOTH) as (first, second):
        first.start(source)
        first.join()
        second.start(source)
        assert file_of(second.join().memory) == file_of(first.join().memory)
        assert second.client.received.total() == 0


def test_who_waits_for_a_turn_waits_for_a_neighbour_too() -> None:
    with (
        serving(WEIGHTS, TCP, max_bandwidth=NBYTES, max_clients=1) as (server, source),
        members(2, WEIGHTS, BOTH, timeouts=PATIENT) as (first, second),
    ):
        first.start(source)
        wait_until(lambda: held_by(first))
        second.start(source)
        wait_until(lambda: first.server.state().sessions)
        assert server.state().waiting == 1
        assert file_of(second.join().memory) == file_of(first.join().memory)
        assert second.client.received.total() == 0


def test_a_source_that_still_loads_is_waited_for_too() -> None:
    with serving(WEIGHTS, TCP, max_bandwidth=NBYTES) as (_, far), members(1, WEIGHTS, BOTH) as (near,):
        near.start(far)
        wait_until(lambda: held_by(near) > 0)
        client, fetched = fetch(WEIGHTS, BOTH, near.endpoint)
        assert (fetched.transport, client.received.total()) == ("shared_memory", 0)
        assert file_of(fetched.memory) == file_of(near.join().memory)


def test_who_relays_nothing_waits_for_one_that_does_and_nobody_waits_for_it() -> None:
    with serving(WEIGHTS, TCP, max_bandwidth=NBYTES) as (_, source), members(1, WEIGHTS, BOTH) as (relaying,):
        silent = client_for(WEIGHTS, BOTH)
        with fetching(silent, source) as first:
            wait_until(lambda: inquire(source, 5).sessions)
            relaying.start(source)
            assert file_of(first().memory) != file_of(relaying.join().memory)
        client, fetched = fetch(WEIGHTS, BOTH, source)
        assert client.received.total() == 0
        assert file_of(fetched.memory) == file_of(relaying.join().memory)


@contextlib.contextmanager
def liar(*, filling: bool) -> Iterator[Endpoint]:
    """A server whose pages are others than it says. It may say first that it still loads them."""
    honest, store = WEIGHTS.store(), OTHERS.store()
    told = tuple(StoreDigests(honest.memory.reader()).all())
    honest.close()
    store = replace(store, digests=StoreDigests(store.memory.reader(), told))
    with WeightServer("127.0.0.1", 0, Settings(BOTH, PATIENT)) as server:
        if filling:
            store = replace(store, held=ChunkLog(CHUNKS))
        publication = Publication(IDENTITY, RankCoordinates(), store)
        (server.fill if filling else server.publish)(publication)
        if filling:
            assert store.held is not None
            threading.Timer(0.3, store.held.close).start()
        yield server.address
        if filling:
            server.stop_filling(publication, "it ends")
            store.close()


def test_only_those_of_one_deployment_are_neighbours() -> None:
    request, one, other = WEIGHTS.request(), Access(b"1" * 16), Access(b"2" * 16)
    ours, theirs = (Neighbours(request, access, may_claim=True) for access in (one, other))
    assert ours.holder("root") is None
    assert theirs.holder("root") is None
    claims = ours.take_claim("root"), theirs.take_claim("root")
    assert None not in claims
    for claim in claims:
        assert claim is not None
        claim.close()


def test_one_that_fails_leaves_what_has_passed_to_one_that_waits() -> None:
    """It has another source than the other one, which dies."""
    with (
        serving(WEIGHTS, TCP, max_bandwidth=NBYTES) as (_, source),
        serving(WEIGHTS, TCP, max_bandwidth=NBYTES) as (dying, doomed),
        members(2, WEIGHTS, BOTH, timeouts=PATIENT) as (first, second),
    ):
        first.start(doomed)
        wait_until(lambda: held_by(first) > 0)
        second.start(source)
        wait_until(lambda: first.server.state().sessions)
        wait_until(lambda: held_by(first) > CHUNKS // 4)
        dying.close()
        second.join()
        wait_until(lambda: first.failure is not None)
        saved = second.client.shared[str(first.endpoint)]
        assert saved >= NBYTES // 4 - CHUNK  # of the latest ones it may not have told
        assert +second.client.received == {str(source): NBYTES - saved}


def test_one_that_is_killed_leaves_what_has_passed_and_the_next_one_brings_the_rest_for_all() -> None:
    with (
        serving(WEIGHTS, TCP, max_bandwidth=NBYTES // 2, timeouts=PATIENT) as (server, source),
        Child(Neighbour, CHUNKS, neighbours.PURPOSE, patience=90) as first,
        members(2, WEIGHTS, BOTH, timeouts=PATIENT) as others,
    ):
        first.answer()
        first.do(source)
        wait_until(lambda: first.do("held"))
        for member in others:
            member.start(source)
        wait_until(lambda: first.do("held") > CHUNKS // 3)
        first.kill()
        fetched = [member.join() for member in others]
        assert file_of(fetched[0].memory) == file_of(fetched[1].memory)
        assert received_by(*others) <= NBYTES - CHUNKS // 3 * CHUNK + 2 * CHUNK
        saved = [each.client.shared.total() for each in others]
        assert min(saved) > 0
        assert max(saved) == NBYTES  # that is what the one has mapped
        assert server.state().served == {"target": 1}


def test_one_that_falls_silent_is_left() -> None:
    short = Timeouts(connect=30.0, stall=1.0)
    with (
        serving(WEIGHTS, TCP, max_bandwidth=NBYTES // 2, timeouts=PATIENT) as (_, source),
        Child(Neighbour, CHUNKS, neighbours.PURPOSE, patience=90) as first,
        members(1, WEIGHTS, BOTH, timeouts=short) as (second,),
    ):
        first.answer()
        first.do(source)
        wait_until(lambda: first.do("held"))
        second.start(source)
        wait_until(lambda: first.do("sessions") and first.do("held") > CHUNKS // 8)
        os.kill(first.pid, signal.SIGSTOP)
        second.join()
        os.kill(first.pid, signal.SIGCONT)
        assert second.client.received.total() < NBYTES
        assert len(second.client.attempts) <= 2
        _, received, _ = first.do("result")
        assert sum(received.values()) <= 1.1 * NBYTES


def test_where_the_source_gets_other_weights_those_who_wait_get_these_too() -> None:
    with (
        serving(WEIGHTS, TCP, max_bandwidth=NBYTES, timeouts=PATIENT) as (server, source),
        members(2, OTHERS, BOTH, timeouts=PATIENT) as loading,
    ):
        for member in loading:
            member.start(source)
        wait_until(lambda: any(held_by(member) > 8 and member.server.state().sessions for member in loading))
        newer = replace(OTHERS.store(), generation=server.next_generation("target"))
        server.publish(Publication(IDENTITY, RankCoordinates(), newer))
        for member in loading:
            assert member.join().source == source  # which compares every byte


def test_where_the_source_is_gone_when_the_pages_are_complete_they_are_good_if_it_had_said_so() -> None:
    with (
        serving(WEIGHTS, TCP, max_bandwidth=NBYTES) as (server, source),
        members(2, WEIGHTS, BOTH, timeouts=PATIENT) as (first, second),
    ):
        wait_until(lambda: inquire(source, 5).holdings[0].root or fetch(WEIGHTS, TCP, source))
        first.start(source)
        wait_until(lambda: held_by(first))
        second.start(source)
        first.join()
        server.close()
        assert file_of(second.join().memory) == file_of(first.join().memory)


@pytest.mark.parametrize("filling", [False, True])
def test_pages_that_are_not_those_of_the_digests_are_left(filling: bool) -> None:
    """Whoever has the claim lies."""
    with (
        serving(WEIGHTS, TCP) as (_, source),
        members(1, WEIGHTS, BOTH) as (victim,),
        liar(filling=filling) as there,
    ):
        root = inquire(there, 5).holdings[0].root
        lying = Neighbours(WEIGHTS.request(), Access(), may_claim=True)
        assert lying.holder(root) is None
        claim = lying.take_claim(root)
        assert claim is not None
        claim.tell(there)
        victim.start(source)
        victim.join()
        assert +victim.client.received == {str(source): NBYTES}
        (attempt,) = victim.client.attempts
        assert attempt.source == str(there)
        claim.close()
