"""Which source a client asks when, and what it takes from each: real servers over real sockets."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from support.sources import IDENTITY, SMALL, Tensors, client_for, fetch, fetching, serving
from support.wait import wait_until
from vllm_ascend.model_loader.netloader.client.fetch import Client
from vllm_ascend.model_loader.netloader.client.fetched import Fetched
from vllm_ascend.model_loader.netloader.client.inquiry import announce, inquire
from vllm_ascend.model_loader.netloader.client.search.backoff import FIRST
from vllm_ascend.model_loader.netloader.client.search.order import REFERRALS_FOLLOWED, TRIES
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import ConnectionLost, SourcesExhausted, Stalled
from vllm_ascend.model_loader.netloader.server.answers import Peer
from vllm_ascend.model_loader.netloader.server.publications import Publication
from vllm_ascend.model_loader.netloader.transport import digests, rate
from vllm_ascend.model_loader.netloader.transport.base import Timeouts
from vllm_ascend.model_loader.netloader.transport.chunks.delivery import TRIES_PER_CHUNK
from vllm_ascend.model_loader.netloader.transport.chunks.inventory import Chunk
from vllm_ascend.model_loader.netloader.transport.digests import digest_of, root_of
from vllm_ascend.model_loader.netloader.transport.in_process import InProcessTransport
from vllm_ascend.model_loader.netloader.transport.registry import transports
from vllm_ascend.model_loader.netloader.transport.tcp import CONNECTIONS
from vllm_ascend.model_loader.netloader.weights.identity import RankCoordinates
from vllm_ascend.model_loader.netloader.wire.access import Access
from vllm_ascend.model_loader.netloader.wire.channel import Channel, Deadline
from vllm_ascend.model_loader.netloader.wire.greeting import greet
from vllm_ascend.model_loader.netloader.wire.messages import Accept, Join, Wait

CHUNK = 4096
PATIENT = Timeouts(connect=60.0, stall=60.0)
MEMORY = (InProcessTransport(),)
TOKEN = Access(token=b"the same on all instances")

Tamper = Callable[[Chunk, bytes], bytes]

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(autouse=True)
def small_chunks_and_nobody_too_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A session that is held without taking anything counts as slow after some seconds: not here."""
    monkeypatch.setattr(digests, "CHUNK_BYTES", CHUNK)
    monkeypatch.setattr(rate, "RATE_SECONDS", 1e9)


def of_chunks(count: int, *, changed: int | None = None) -> Tensors:
    """That many chunks, always with the same contents but for the one that is `changed`."""
    contents = torch.arange(count * CHUNK // 4, dtype=torch.int32)
    if changed is not None:
        contents[changed * CHUNK // 4] -= 1
    return Tensors({"w": contents})


EIGHT = of_chunks(8)


def untouched(_: Chunk, content: bytes) -> bytes:
    return content


class Way(InProcessTransport):
    """A transport of its own name, so that what happens on the way depends on the source that has it."""

    def __init__(self, name: str, tamper: Tamper = untouched) -> None:
        super().__init__(tamper)
        self.traits = replace(self.traits, name=name)


def failing(times: int, at: int = 0) -> Tamper:
    """Falls silent at chunk `at`, that many times."""
    left = times

    def tamper(chunk: Chunk, content: bytes) -> bytes:
        nonlocal left
        if chunk.number == at and left > 0:
            left -= 1
            raise Stalled("the peer was silent for 30 s")
        return content

    return tamper


def damaging(number: int) -> Tamper:
    return lambda chunk, content: content[:-1] + bytes([content[-1] ^ 1]) if chunk.number == number else content


def asked(client: Client) -> list[str]:
    return [attempt.source for attempt in client.attempts]


def recording_pauses(client: Client) -> list[tuple[int, float]]:
    """Fills with how many attempts had failed at each pause, and its length."""
    pauses: list[tuple[int, float]] = []
    client.sleep = lambda seconds: pauses.append((len(client.attempts), seconds))
    return pauses


@contextlib.contextmanager
def ways(*tampers: Tamper, **options: Any) -> Iterator[tuple[Client, list[Endpoint]]]:
    """A source for each of `tampers`, and a client on whose way from it bytes meet with that."""
    names = [f"way{number}" for number in range(len(tampers))]
    with contextlib.ExitStack() as servers:
        sources = [servers.enter_context(serving(EIGHT, (Way(name),)))[1] for name in names]
        yield client_for(EIGHT, [Way(*way) for way in zip(names, tampers, strict=True)], **options), sources


@contextlib.contextmanager
def unreachable() -> Iterator[Endpoint]:
    with serving(EIGHT, MEMORY) as (_, gone):
        pass
    yield gone


def test_sources_are_asked_in_their_order_round_after_round_with_pauses_in_between() -> None:
    with ways(failing(99), failing(99), failing(99)) as (client, sources):
        pauses = recording_pauses(client)
        with pytest.raises(SourcesExhausted) as error:
            client.fetch(sources)
    assert asked(client) == list(map(str, sources)) * TRIES
    assert [at for at, _ in pauses] == [3, 6]
    for round_number, (_, seconds) in enumerate(pauses):
        assert FIRST / 2 <= seconds / 2**round_number <= FIRST
    assert (
        error.value.reasons
        == tuple(f"{source} by way{number}: the peer was silent for 30 s" for number, source in enumerate(sources))
        * TRIES
    )


def test_the_first_source_that_delivers_is_the_last_that_is_asked() -> None:
    with ways(untouched, failing(99)) as (client, sources):
        pauses = recording_pauses(client)
        fetched = client.fetch(sources)
    assert fetched.source == sources[0]
    assert (client.attempts, pauses) == ([], [])
    assert +client.received == {str(sources[0]): EIGHT.manifest.nbytes}
    EIGHT.assert_in(fetched.memory)


def test_others_are_asked_before_one_that_failed_is_asked_again() -> None:
    with ways(failing(1, at=3), failing(1, at=5), failing(1, at=7)) as (client, sources):
        pauses = recording_pauses(client)
        fetched = client.fetch(sources)
    assert asked(client) == [str(source) for source in sources]
    assert fetched.source == sources[0]
    assert [at for at, _ in pauses] == [3]
    EIGHT.assert_in(fetched.memory)


@pytest.mark.parametrize("failures", range(TRIES + 1))
def test_a_source_that_fails_midway_is_given_up_after_some_tries(failures: int) -> None:
    with ways(failing(failures, at=1)) as (client, sources):
        pauses = recording_pauses(client)
        if failures < TRIES:
            EIGHT.assert_in(client.fetch(sources).memory)
        else:
            with pytest.raises(SourcesExhausted):
                client.fetch(sources)
    assert len(client.attempts) == failures
    assert len(pauses) == min(failures, TRIES - 1)


def test_a_source_that_cannot_be_reached_or_refuses_is_asked_once() -> None:
    other = Tensors({"w": torch.zeros(3)})
    with ways(failing(99)) as (client, (failing_source,)), serving(other, (Way("way0"),)) as (_, refusing):
        with unreachable() as gone, pytest.raises(SourcesExhausted):
            client.fetch([gone, refusing, failing_source])
    assert Counter(asked(client)) == {str(gone): 1, str(refusing): 1, str(failing_source): TRIES}
    assert asked(client)[:3] == [str(gone), str(refusing), str(failing_source)]


def test_where_nobody_is_to_be_asked_again_there_is_no_pause() -> None:
    with unreachable() as gone:
        client = client_for(EIGHT, MEMORY)
        pauses = recording_pauses(client)
        with pytest.raises(SourcesExhausted, match="no connection"):
            client.fetch([gone])
    assert pauses == []


def test_each_source_brings_only_what_is_still_missing() -> None:
    moved: list[int] = []
    with ways(failing(1, at=3), failing(1, at=5), untouched, progress=moved.append) as (client, sources):
        fetched = client.fetch(sources)
    assert [client.received[str(source)] for source in sources] == [3 * CHUNK, 2 * CHUNK, 3 * CHUNK]
    assert [attempt.received for attempt in client.attempts] == [3 * CHUNK, 2 * CHUNK]
    assert sum(moved) == EIGHT.manifest.nbytes
    EIGHT.assert_in(fetched.memory)


def test_progress_is_that_of_all_sources_where_the_last_hands_over_everything_at_once() -> None:
    moved: list[int] = []
    (at_once,) = transports(["shared_memory"])
    with serving(EIGHT, (Way("way0"),)) as (_, first), serving(EIGHT, (at_once,)) as (_, second):
        kinds = (Way("way0", failing(1, at=5)), at_once)
        client, fetched = fetch(EIGHT, kinds, first, second, progress=moved.append)
    assert (fetched.source, asked(client)) == (second, [str(first)])
    assert sum(moved) == EIGHT.manifest.nbytes
    EIGHT.assert_in(fetched.memory)


def test_progress_is_that_of_one_transfer_where_everything_was_handed_over_twice() -> None:
    moved: list[int] = []

    def replace_once(nbytes: int) -> None:
        moved.append(nbytes)
        if len(moved) == 1:
            server.publish(Publication(IDENTITY, RankCoordinates(), newer.store(generation=2)))

    newer, kind = of_chunks(8, changed=1), transports(["shared_memory"])
    with serving(EIGHT, kind) as (server, source):
        client, fetched = fetch(EIGHT, kind, source, progress=replace_once)
    assert len(client.attempts) == 1
    assert moved == [EIGHT.manifest.nbytes, 0]
    newer.assert_in(fetched.memory)


def test_what_one_source_brought_counts_with_another_under_a_token() -> None:
    kind = (InProcessTransport(failing(1, at=5)),)
    with serving(EIGHT, MEMORY, access=TOKEN) as (_, first), serving(EIGHT, MEMORY, access=TOKEN) as (_, second):
        client, fetched = fetch(EIGHT, kind, first, second, access=TOKEN)
    assert +client.received == {str(first): 5 * CHUNK, str(second): 3 * CHUNK}
    assert fetched.evidence is not None
    EIGHT.assert_in(fetched.memory)


def test_chunks_that_the_next_source_holds_differently_are_fetched_from_it() -> None:
    newer = of_chunks(8, changed=1)
    kind = (InProcessTransport(failing(1, at=5)),)
    with serving(EIGHT, MEMORY) as (_, first), serving(newer, MEMORY) as (_, second):
        client, fetched = fetch(EIGHT, kind, first, second)
    assert +client.received == {str(first): 5 * CHUNK, str(second): 4 * CHUNK}
    newer.assert_in(fetched.memory)


def test_without_verification_every_source_starts_from_nothing() -> None:
    kind = (InProcessTransport(failing(1, at=5)),)
    with serving(EIGHT, MEMORY) as (_, first), serving(EIGHT, MEMORY) as (_, second):
        client, fetched = fetch(EIGHT, kind, first, second, verify=False)
    assert +client.received == {str(first): 5 * CHUNK, str(second): 8 * CHUNK}
    assert fetched.evidence is None
    EIGHT.assert_in(fetched.memory)


def test_a_source_that_goes_on_damaging_a_chunk_is_left_for_one_that_has_it() -> None:
    moved: list[int] = []
    with ways(damaging(6), untouched, progress=moved.append) as (client, sources):
        fetched = client.fetch(sources)
    (attempt,) = client.attempts
    assert attempt.source == str(sources[0])
    assert attempt.reason == f"chunk 6 (bytes {6 * CHUNK} to {7 * CHUNK - 1}) arrived damaged {TRIES_PER_CHUNK} times"
    assert attempt.received == (7 + TRIES_PER_CHUNK) * CHUNK
    assert client.received[str(sources[1])] == CHUNK
    assert sum(moved) == EIGHT.manifest.nbytes
    EIGHT.assert_in(fetched.memory)


def test_a_chunk_that_arrives_damaged_once_is_no_failure_of_its_source() -> None:
    damaged = set[int]()

    def damage_once(chunk: Chunk, content: bytes) -> bytes:
        if chunk.number in damaged:
            return content
        damaged.add(chunk.number)
        return content[::-1]

    with ways(damage_once) as (client, sources):
        fetched = client.fetch(sources)
    assert client.attempts == []
    assert client.received[str(sources[0])] == 2 * EIGHT.manifest.nbytes
    EIGHT.assert_in(fetched.memory)


def test_an_attempt_tells_the_transport_the_reason_and_what_came() -> None:
    with unreachable() as gone, ways(failing(99, at=7)) as (client, (source,)), pytest.raises(SourcesExhausted):
        client.fetch([gone, source])
    told = [(attempt.source, attempt.transport, attempt.received) for attempt in client.attempts]
    assert told == [(str(gone), None, 0), (str(source), "way0", 7 * CHUNK), *[(str(source), "way0", 0)] * 2]
    assert client.received[str(source)] == 7 * CHUNK
    assert all(attempt.seconds >= 0 for attempt in client.attempts)


def join(source: Endpoint) -> Channel:
    """A control connection on which the weights have been asked for."""
    control = greet(source, Access(), PATIENT.connect)
    control.send(
        Join(IDENTITY, RankCoordinates(), EIGHT.manifest.digest, tuple(each.offer() for each in MEMORY)),
        PATIENT.connect,
    )
    return control


@contextlib.contextmanager
def turn_taken(source: Endpoint) -> Iterator[tuple[Channel, Accept]]:
    """Somebody has a turn, until the channel is closed, and fetches nothing."""
    with join(source) as control:
        while not isinstance(answer := control.receive(Deadline(PATIENT.connect)), Accept):
            assert isinstance(answer, Wait)
        yield control, answer


@contextlib.contextmanager
def busy() -> Iterator[tuple[Endpoint, Channel]]:
    """A server whose only turn is taken until the channel is closed."""
    with serving(EIGHT, MEMORY, timeouts=PATIENT, max_clients=1) as (_, source), turn_taken(source) as (held, _):
        yield source, held


def test_another_source_is_asked_while_one_is_busy() -> None:
    with busy() as (source, _), serving(EIGHT, MEMORY) as (_, free):
        client = client_for(EIGHT, MEMORY)
        pauses = recording_pauses(client)
        fetched = client.fetch([source, free])
    assert fetched.source == free
    assert (client.attempts, pauses) == ([], [])


def test_where_nobody_else_is_to_be_asked_a_client_waits_for_its_turn() -> None:
    with busy() as (source, held):
        client = client_for(EIGHT, MEMORY, timeouts=PATIENT)
        with fetching(client, source) as result:
            wait_until(lambda: inquire(source, 5).waiting == 1)
            held.close()
            fetched = result()
    assert (fetched.source, client.attempts) == (source, [])
    EIGHT.assert_in(fetched.memory)


def test_a_busy_source_is_returned_to_when_the_others_have_failed() -> None:
    with unreachable() as gone, busy() as (source, held):
        client = client_for(EIGHT, MEMORY, timeouts=PATIENT)
        with fetching(client, source, gone) as result:
            wait_until(lambda: client.attempts and inquire(source, 5).waiting)
            held.close()
            fetched = result()
    assert fetched.source == source
    assert asked(client) == [str(gone)]


def test_a_client_waits_as_long_as_its_wait_timeout_and_when_the_others_have_been_asked() -> None:
    with unreachable() as gone, busy() as (source, _):
        client = client_for(EIGHT, MEMORY, wait_timeout=0.0)
        with pytest.raises(SourcesExhausted):
            client.fetch([source, gone])
    assert asked(client) == [str(gone), str(source)]
    assert client.attempts[1].reason == "its turns were taken for WAIT_TIMEOUT, 0 s"


def test_of_two_busy_sources_each_is_waited_for() -> None:
    with busy() as (first, _), busy() as (second, _):
        client = client_for(EIGHT, MEMORY, wait_timeout=0.0)
        with pytest.raises(SourcesExhausted):
            client.fetch([first, second])
    assert asked(client) == [str(first), str(second)]


def test_the_first_turn_that_comes_is_taken_and_the_other_place_is_given_up() -> None:
    with busy() as (first, _), busy() as (second, held):
        client = client_for(EIGHT, MEMORY, timeouts=PATIENT)
        with fetching(client, first, second) as result:
            wait_until(lambda: inquire(first, 5).waiting and inquire(second, 5).waiting)
            held.close()
            fetched = result()
        wait_until(lambda: not inquire(first, 5).waiting)
    assert (fetched.source, client.attempts) == (second, [])


@contextlib.contextmanager
def replicated() -> Iterator[tuple[Endpoint, Endpoint, Fetched]]:
    """A server with one turn, another that holds the same, and what the latter's host took from the first."""
    with serving(EIGHT, MEMORY, timeouts=PATIENT, max_clients=1) as (_, source), serving(EIGHT, MEMORY) as (_, replica):
        _, fetched = fetch(EIGHT, MEMORY, source)
        yield source, replica, fetched


def referrals_of(source: Endpoint) -> tuple[str, ...]:
    """Whom a busy source names to somebody who asks now."""
    with join(source) as control:
        answer = control.receive(Deadline(PATIENT.connect))
        assert isinstance(answer, Wait)
        return answer.referrals


def announced(source: Endpoint, session: bytes, port: int) -> None:
    """Returns when a busy `source` refers others to `port`."""
    announce(source, session, port, 5, Access())
    wait_until(lambda: referrals_of(source))


def test_a_busy_source_refers_to_whoever_took_its_weights_and_serves_them() -> None:
    with replicated() as (source, replica, first), turn_taken(source):
        assert referrals_of(source) == ()
        announced(source, first.session, replica.port)
        assert referrals_of(source) == (f":{replica.port}",)
        client = client_for(EIGHT, MEMORY)
        pauses = recording_pauses(client)
        fetched = client.fetch([source])
    assert fetched.source == replica
    assert (client.attempts, pauses) == ([], [])
    EIGHT.assert_in(fetched.memory)


def test_who_waits_already_leaves_for_a_replica_that_announces_itself() -> None:
    with replicated() as (source, replica, first), turn_taken(source):
        client = client_for(EIGHT, MEMORY, timeouts=PATIENT)
        with fetching(client, source) as result:
            wait_until(lambda: inquire(source, 5).waiting)
            announce(source, first.session, replica.port, 5, Access())
            fetched = result()
    assert (fetched.source, client.attempts) == (replica, [])


def test_a_referral_that_leads_nowhere_is_tried_once_while_the_place_is_kept() -> None:
    with replicated() as (source, _, first), unreachable() as gone, turn_taken(source) as (held, _):
        announced(source, first.session, gone.port)
        client = client_for(EIGHT, MEMORY, timeouts=PATIENT)
        with fetching(client, source) as result:
            wait_until(lambda: client.attempts and inquire(source, 5).waiting)
            held.close()
            fetched = result()
    assert fetched.source == source
    assert asked(client) == [str(gone)]


def test_a_configured_source_is_not_asked_again_because_another_refers_to_it() -> None:
    with replicated() as (source, _, first), unreachable() as gone, turn_taken(source):
        announced(source, first.session, gone.port)
        client = client_for(EIGHT, MEMORY, wait_timeout=0.0)
        with pytest.raises(SourcesExhausted):
            client.fetch([gone, source])
    assert asked(client) == [str(gone), str(source)]


def test_an_announcement_of_a_session_that_never_was_is_not_believed(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), replicated() as (source, replica, _), turn_taken(source):
        announce(source, bytes(16), replica.port, 5, Access())
        wait_until(lambda: "announces weights that it did not take from here" in caplog.text)
        assert referrals_of(source) == ()


def test_an_announcement_before_the_weights_are_taken_is_not_believed(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), serving(EIGHT, MEMORY, timeouts=PATIENT, max_clients=1) as (_, source):
        with turn_taken(source) as (_, accept):
            announce(source, accept.session, 19000, 5, Access())
            wait_until(lambda: "announces weights that it did not take from here" in caplog.text)
            assert referrals_of(source) == ()


def test_replicas_of_earlier_weights_are_not_named_for_later_ones() -> None:
    with serving(EIGHT, MEMORY, timeouts=PATIENT, max_clients=1) as (server, source):
        _, first = fetch(EIGHT, MEMORY, source)
        with turn_taken(source):
            announced(source, first.session, 19000)
        server.publish(Publication(IDENTITY, RankCoordinates(), of_chunks(8, changed=1).store(generation=2)))
        with turn_taken(source):
            assert referrals_of(source) == ()


PLACE, ELSEWHERE = RankCoordinates(tp_rank=0, tp_size=2), RankCoordinates(tp_rank=1, tp_size=2)


def refused_with_referrals(*peers: tuple[str, int]) -> Client:
    """A client for another rank, after its only source has referred it to `peers` and all have been tried."""
    client = client_for(EIGHT.request(coordinates=ELSEWHERE), MEMORY)
    with serving(EIGHT, MEMORY, coordinates=PLACE) as (server, source):
        server.refer_to([Peer(ELSEWHERE, host, port) for host, port in peers])
        with pytest.raises(SourcesExhausted):
            client.fetch([source])
    return client


def test_only_so_many_referrals_are_followed() -> None:
    client = refused_with_referrals(*((f"127.1.0.{n}", 9) for n in range(1, REFERRALS_FOLLOWED + 20)))
    assert asked(client) == [f"127.1.0.{n}:9" for n in range(1, REFERRALS_FOLLOWED + 1)]


def test_an_endpoint_that_is_named_several_times_is_asked_once() -> None:
    client = refused_with_referrals(("127.1.0.1", 9), ("127.1.0.2", 9), ("127.1.0.1", 9), ("127.1.0.1", 9))
    assert asked(client) == ["127.1.0.1:9", "127.1.0.2:9"]


def test_a_referral_that_is_no_endpoint_is_left_out() -> None:
    assert asked(refused_with_referrals(("not a host", 9), ("127.1.0.2", 9))) == ["127.1.0.2:9"]


def test_a_source_without_digests_is_refused_by_who_verifies() -> None:
    moved: list[int] = []
    with serving(EIGHT, MEMORY, verify=False) as (_, unverified), serving(EIGHT, MEMORY) as (_, source):
        client, fetched = fetch(EIGHT, MEMORY, unverified, source, progress=moved.append)
    (attempt,) = client.attempts
    assert (attempt.source, attempt.received) == (str(unverified), 0)
    assert attempt.reason == 'it has no digests (its VERIFY is "off"), and VERIFY is "on" here'
    assert fetched.source == source
    assert sum(moved) == EIGHT.manifest.nbytes


def test_a_source_without_digests_is_taken_by_who_does_not_verify() -> None:
    with serving(EIGHT, MEMORY, verify=False) as (_, source):
        client, fetched = fetch(EIGHT, MEMORY, source, verify=False)
    assert (fetched.evidence, client.attempts) == (None, [])
    EIGHT.assert_in(fetched.memory)


def test_where_nothing_is_copied_nothing_needs_digests() -> None:
    kind = transports(["shared_memory"])
    with serving(EIGHT, kind, verify=False) as (_, source):
        client, fetched = fetch(EIGHT, kind, source)
    assert (fetched.evidence, client.attempts) == (None, [])
    EIGHT.assert_in(fetched.memory)


@pytest.mark.parametrize("access", [Access(), TOKEN], ids=["no token", "token"])
def test_what_was_verified_comes_with_the_digests_it_was_verified_by(access: Access) -> None:
    with serving(EIGHT, MEMORY, access=access) as (_, source):
        _, fetched = fetch(EIGHT, MEMORY, source, access=access)
    assert fetched.evidence is not None
    data = fetched.memory.contents()
    made = tuple(digest_of(data[at : at + CHUNK]) for at in range(0, EIGHT.manifest.nbytes, CHUNK))
    assert fetched.evidence.digests == made
    assert fetched.evidence.root == root_of(EIGHT.manifest.digest, {}, made)


REPLACED = "it ended the session: its weights were replaced by new ones"


def test_weights_that_are_replaced_midway_are_fetched_anew_where_they_differ() -> None:
    newer = of_chunks(8, changed=5)

    def replace_at_the_third_chunk(chunk: Chunk, content: bytes) -> bytes:
        if chunk.number == 2 and not client.attempts:
            server.publish(Publication(IDENTITY, RankCoordinates(), newer.store(generation=2)))
        return content

    client = client_for(EIGHT, (InProcessTransport(replace_at_the_third_chunk),))
    pauses = recording_pauses(client)
    with serving(EIGHT, MEMORY) as (server, source):
        fetched = client.fetch([source])
    (attempt,) = client.attempts
    assert attempt.reason == REPLACED
    assert 3 * CHUNK <= attempt.received <= 8 * CHUNK
    # The sixth chunk is fetched twice if it had come before the end.
    assert client.received[str(source)] == (8 + (attempt.received > 5 * CHUNK)) * CHUNK
    assert [at for at, _ in pauses] == [1]
    newer.assert_in(fetched.memory)


def test_a_transfer_over_connections_is_broken_off_when_the_weights_are_replaced() -> None:
    older, newer, kind = of_chunks(256), of_chunks(256, changed=0), transports(["tcp"])
    moved: list[int] = []

    def replace_at_the_first_bytes(nbytes: int) -> None:
        if nbytes and not any(moved):
            server.publish(Publication(IDENTITY, RankCoordinates(), newer.store(generation=2)))
        moved.append(nbytes)

    with serving(older, kind) as (server, source):
        client, fetched = fetch(older, kind, source, progress=replace_at_the_first_bytes)
    (attempt,) = client.attempts
    assert attempt.reason == REPLACED
    assert 0 < attempt.received < older.manifest.nbytes
    assert client.received[str(source)] <= older.manifest.nbytes + (1 + CONNECTIONS) * CHUNK
    assert sum(moved) == newer.manifest.nbytes
    newer.assert_in(fetched.memory)


def test_weights_that_are_withdrawn_midway_are_taken_from_the_next_source() -> None:
    def withdraw(chunk: Chunk, content: bytes) -> bytes:
        if chunk.number == 2:
            server.withdraw("target")
        return content

    with serving(EIGHT, MEMORY) as (server, source), serving(EIGHT, MEMORY) as (_, other):
        client, fetched = fetch(EIGHT, (InProcessTransport(withdraw),), source, other)
    assert [attempt.reason for attempt in client.attempts] == [
        "it ended the session: it does not serve these weights any more"
    ]
    assert fetched.source == other
    assert client.received.total() == EIGHT.manifest.nbytes
    EIGHT.assert_in(fetched.memory)


def test_a_source_that_goes_away_midway_has_brought_what_it_brought() -> None:
    def close(chunk: Chunk, content: bytes) -> bytes:
        if chunk.number == 2 and not client.attempts:
            server.close()
            raise ConnectionLost("the peer closed the connection")
        return content

    client = client_for(EIGHT, (InProcessTransport(close),))
    with serving(EIGHT, MEMORY) as (server, source), serving(EIGHT, MEMORY) as (_, other):
        fetched = client.fetch([source, other])
    assert [attempt.reason for attempt in client.attempts] == ["it ended the session: the server shuts down"]
    assert client.received == {str(source): 2 * CHUNK, str(other): 6 * CHUNK}
    assert fetched.source == other
    EIGHT.assert_in(fetched.memory)


def test_a_refusal_with_referrals_that_lead_nowhere_is_the_reason_when_there_is_no_other() -> None:
    place = RankCoordinates(tp_rank=1, tp_size=2)
    with serving(SMALL, MEMORY, coordinates=place) as (server, source):
        server.refer_to([Peer(RankCoordinates(), source.host, source.port)])  # to itself
        with pytest.raises(SourcesExhausted, match="another rank of this instance holds that part"):
            fetch(SMALL, MEMORY, source)
