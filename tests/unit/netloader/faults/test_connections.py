"""Connections that break or fall silent while they carry weights: the next source brings what is missing."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable

import pytest

from support.peers.faults import (
    BROKEN,
    CHUNK,
    IMPATIENT,
    NBYTES,
    SILENT,
    TCP,
    WEIGHTS,
    WITH_TOKEN,
    assert_little_came_twice,
    payload,
    source,
)
from support.peers.proxy import Effect, Fault, Proxy, Stream, close, half_close, hold, kill, reset, silence, silence_all
from support.sources import IDENTITY, SHORT, SMALL, fetch, serving
from support.wait import wait_until
from vllm_ascend.model_loader.netloader.client.inquiry import inquire
from vllm_ascend.model_loader.netloader.client.session import connections
from vllm_ascend.model_loader.netloader.errors import SourcesExhausted
from vllm_ascend.model_loader.netloader.server.publications import Publication
from vllm_ascend.model_loader.netloader.server.server import WeightServer
from vllm_ascend.model_loader.netloader.transport.base import Timeouts
from vllm_ascend.model_loader.netloader.transport.registry import transports
from vllm_ascend.model_loader.netloader.transport.tcp import CONNECTIONS
from vllm_ascend.model_loader.netloader.weights.identity import RankCoordinates

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("small_scale", "nothing_is_left_behind")]

PROCESS_GROUP = transports(["process_group"])
PERCENT = (10, 50, 90)


def test_a_connection_without_faults_passes() -> None:
    with source() as (proxy, _, _):
        client, fetched = fetch(WEIGHTS, TCP, proxy.endpoint)
    WEIGHTS.assert_in(fetched.memory)
    assert client.attempts == []
    assert proxy.payload == client.received[str(proxy.endpoint)] == NBYTES
    assert proxy.connections == 1 + CONNECTIONS


DEATHS = {
    "a data connection is closed": (close, BROKEN),
    "a data connection is reset": (reset, BROKEN),
    "a data connection is half closed": (half_close, "the peer closed the connection"),
    "a data connection falls silent": (silence, SILENT),
    "the source falls silent": (silence_all, SILENT),
    "the source is killed": (kill, BROKEN),
}


@pytest.mark.parametrize("percent", PERCENT)
@pytest.mark.parametrize(("death", "reason"), DEATHS.values(), ids=DEATHS.keys())
def test_the_second_source_brings_what_the_first_did_not(death: Effect, reason: str, percent: int) -> None:
    timeouts = IMPATIENT if reason == SILENT else SHORT
    with source(payload(percent, death)) as (first, _, _), source() as (second, _, _):
        client, fetched = fetch(WEIGHTS, TCP, first.endpoint, second.endpoint, timeouts=timeouts)
        WEIGHTS.assert_in(fetched.memory)
        assert fetched.source == second.endpoint
        assert first.struck
    assert_little_came_twice(client.received.total())
    assert client.received[str(second.endpoint)] == second.payload
    attempt = client.attempts[0]
    assert (attempt.source, attempt.transport) == (str(first.endpoint), "tcp")
    assert attempt.received == client.received[str(first.endpoint)] > 0
    assert re.search(reason, attempt.reason), attempt.reason


def test_with_a_token_too_the_second_source_brings_only_what_is_missing() -> None:
    with (
        source(payload(50, kill), access=WITH_TOKEN) as (first, _, _),
        source(access=WITH_TOKEN) as (second, _, _),
    ):
        client, fetched = fetch(WEIGHTS, TCP, first.endpoint, second.endpoint, access=WITH_TOKEN)
    WEIGHTS.assert_in(fetched.memory)
    assert (fetched.source, len(client.attempts)) == (second.endpoint, 1)
    assert_little_came_twice(client.received.total())


def test_each_of_three_sources_brings_a_part() -> None:
    with source(payload(30, kill)) as (first, _, _), source(payload(30, kill)) as (second, _, _):
        with source() as (third, _, _):
            client, fetched = fetch(WEIGHTS, TCP, first.endpoint, second.endpoint, third.endpoint)
    WEIGHTS.assert_in(fetched.memory)
    assert fetched.source == third.endpoint
    assert [attempt.source for attempt in client.attempts] == [str(first.endpoint), str(second.endpoint)]
    assert all(client.received.values())
    assert client.received.total() <= NBYTES * 1.01 + 2 * CONNECTIONS * CHUNK


def test_the_only_source_is_asked_again_for_what_is_missing() -> None:
    with source(payload(50, reset), payload(80, reset)) as (proxy, _, _):
        client, fetched = fetch(WEIGHTS, TCP, proxy.endpoint)
    WEIGHTS.assert_in(fetched.memory)
    assert len(client.attempts) == 2
    assert client.received.total() <= NBYTES * 1.01 + 2 * CONNECTIONS * CHUNK


def test_a_server_whose_clients_were_cut_off_serves_the_next() -> None:
    with source(payload(50, kill)) as (proxy, _, address):
        with pytest.raises(SourcesExhausted):
            fetch(WEIGHTS, TCP, proxy.endpoint)
        wait_until(lambda: inquire(address, 5).sessions == 0)
        _, fetched = fetch(WEIGHTS, TCP, address)
    WEIGHTS.assert_in(fetched.memory)


def test_delay_only_slows() -> None:
    with source(delay=0.002) as (proxy, _, _):
        client, fetched = fetch(WEIGHTS, TCP, proxy.endpoint)
    WEIGHTS.assert_in(fetched.memory)
    assert (client.attempts, client.received.total()) == ([], NBYTES)


def test_when_all_sources_are_gone_the_error_names_each() -> None:
    with source() as (_, _, nobody):
        pass
    with source(payload(10, silence_all)) as (silent, _, _), source(payload(10, kill)) as (killed, _, _):
        sources = (nobody, silent.endpoint, killed.endpoint)
        with pytest.raises(SourcesExhausted) as error:
            fetch(WEIGHTS, TCP, *sources, timeouts=Timeouts(1.0, 1.0))
    for address, what, reason in zip(sources, ("no connection", SILENT, BROKEN), error.value.reasons, strict=False):
        assert reason.startswith(str(address))
        assert re.search(what, reason), reason


ENDINGS: dict[str, tuple[Callable[[WeightServer], None], str]] = {
    "closed": (lambda server: server.close(), "the server shuts down"),
    "withdrawn": (lambda server: server.withdraw("target"), "it does not serve these weights any more"),
    "replaced": (
        lambda server: server.publish(Publication(IDENTITY, RankCoordinates(), WEIGHTS.store(2))),
        "its weights were replaced by new ones",
    ),
}


@pytest.mark.parametrize(("end", "reason"), ENDINGS.values(), ids=ENDINGS.keys())
def test_a_server_that_ends_the_session_midway_says_why(
    end: Callable[[WeightServer], None], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "EXPLANATION_SECONDS", 20)
    halfway, ended = threading.Event(), threading.Event()

    def end_halfway(server: WeightServer) -> None:
        assert halfway.wait(20)
        end(server)
        ended.set()

    with source(payload(50, hold(halfway, ended))) as (first, server, _), source() as (second, _, _):
        ending = threading.Thread(target=end_halfway, args=(server,))
        ending.start()
        client, fetched = fetch(WEIGHTS, TCP, first.endpoint, second.endpoint)
        ending.join()
    WEIGHTS.assert_in(fetched.memory)
    assert fetched.source == second.endpoint
    assert [attempt.reason for attempt in client.attempts] == [f"it ended the session: {reason}"]
    assert_little_came_twice(client.received.total())


@pytest.fixture(scope="module")
def _process_group_in_use() -> None:
    """The first group of a process imports vLLM, which keeps a pipe."""
    with serving(SMALL, PROCESS_GROUP) as (_, address):
        fetch(SMALL, PROCESS_GROUP, address)


@pytest.mark.usefixtures("_process_group_in_use")
@pytest.mark.parametrize(
    ("death", "reason"),
    [(kill, f"{BROKEN}|the process group failed"), (silence_all, "the process group failed|the peer was silent")],
    ids=["killed", "silent"],
)
def test_a_process_group_whose_control_connection_dies_leads_to_the_next_source(death: Effect, reason: str) -> None:
    among_the_fetches = Fault(Stream.TO_SERVER, 2000, death)
    timeouts = Timeouts(connect=5.0, stall=3.0)
    with serving(WEIGHTS, PROCESS_GROUP, timeouts=timeouts) as (_, address), Proxy(address, among_the_fetches) as first:
        with source() as (second, _, _):
            kinds = (*PROCESS_GROUP, *TCP)
            client, fetched = fetch(WEIGHTS, kinds, first.endpoint, second.endpoint, timeouts=timeouts)
        assert first.struck
    WEIGHTS.assert_in(fetched.memory)
    assert (fetched.source, fetched.transport) == (second.endpoint, "tcp")
    attempt = client.attempts[0]
    assert (attempt.source, attempt.transport) == (str(first.endpoint), "process_group")
    assert re.search(reason, attempt.reason), attempt.reason
    assert 0 < client.received[str(second.endpoint)] < NBYTES
    assert_little_came_twice(client.received.total())
