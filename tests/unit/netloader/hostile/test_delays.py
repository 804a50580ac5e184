"""Clients that come in crowds, fall silent or are slow: nobody else is kept waiting, and they are sent away."""

from __future__ import annotations

import contextlib
import itertools
import math
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from support.logs import assert_no_error_of_the_server
from support.peers.silences import LARGE, SILENCES, Arrival, attached
from support.peers.strangers import Intruder, is_idle, many_hosts
from support.sources import PATIENT, SMALL, assert_serves, fetch, serving
from support.wait import wait_until
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import SourcesExhausted
from vllm_ascend.model_loader.netloader.server import listener
from vllm_ascend.model_loader.netloader.server.admission import waiting as waiting_room
from vllm_ascend.model_loader.netloader.transport import rate
from vllm_ascend.model_loader.netloader.transport.base import Timeouts
from vllm_ascend.model_loader.netloader.transport.digests import CHUNK_BYTES
from vllm_ascend.model_loader.netloader.transport.registry import transports
from vllm_ascend.model_loader.netloader.wire.access import Access
from vllm_ascend.model_loader.netloader.wire.messages import AskDigests, Done, Fetch, Hello

pytestmark = pytest.mark.timeout(100)

TCP = transports(["tcp"])
ALL = transports(["shared_memory", "tcp"])
IMPATIENT = Timeouts(connect=1.0, stall=1.0)
TOKEN = Access(b"a token of thirty-two bytes long")


def greeted(source: Endpoint, host: str) -> Intruder:
    return Intruder(source, host).greet()


def in_session(source: Endpoint, host: str) -> Intruder:
    intruder = Intruder(source, host).greet()
    intruder.accepted()
    return intruder


CONNECTIONS = 64
FLOODS = {
    "that say nothing": (Intruder, CONNECTIONS // listener.STRANGERS_SHARE),
    "that greet": (greeted, CONNECTIONS // listener.STRANGERS_SHARE),
    "that take weights": (in_session, CONNECTIONS // listener.HOST_SHARE),
}


@pytest.mark.parametrize(("open_one", "limit"), FLOODS.values(), ids=FLOODS.keys())
def test_a_flood_of_connections_from_one_address(
    open_one: Callable[[Endpoint, str], Intruder],
    limit: int,
    opened: contextlib.ExitStack,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert limit < CONNECTIONS < listener.MAX_CONNECTIONS
    monkeypatch.setattr(listener, "MAX_CONNECTIONS", CONNECTIONS)
    with serving(SMALL, TCP, timeouts=PATIENT, max_clients=limit + 1) as (server, source):
        for _ in range(limit):
            opened.enter_context(open_one(source, "127.0.0.3"))
        wait_until(lambda: server.state().connections == limit)
        for _ in range(50):
            with Intruder(source) as beyond:
                assert "no room" in beyond.hear()["reason"]
                beyond.hear_out()
        assert server.state().connections == limit
        assert_serves(source)
        opened.close()
        wait_until(lambda: is_idle(server))
        assert_serves_intruder(source)


def assert_serves_intruder(source: Endpoint) -> None:
    with Intruder(source) as reformed:
        reformed.greet().accepted()


def test_a_flood_of_connections_from_many_addresses_leaves_the_server_and_those_inside_alone(
    opened: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts, limit = many_hosts(), 100
    monkeypatch.setattr(listener, "MAX_CONNECTIONS", limit)
    with serving(SMALL, TCP, timeouts=PATIENT) as (server, source):
        inside = opened.enter_context(Intruder(source, "127.0.0.2").greet())
        session = inside.accepted()
        data = opened.enter_context(Intruder(source, "127.0.0.2").greet().attach(session))
        flood = opened.enter_context(contextlib.ExitStack())
        for _ in range(limit - 2):
            flood.enter_context(Intruder(source, next(hosts)))
        wait_until(lambda: server.state().connections == limit)
        with pytest.raises(SourcesExhausted):
            fetch(SMALL, TCP, source)
        assert len(data.say(Fetch(0, SMALL.manifest.nbytes)).read(SMALL.manifest.nbytes)) == SMALL.manifest.nbytes
        inside.say(AskDigests(0, 1), Done())
        assert [inside.hear()["type"] for _ in range(2)] == ["Digests", "Confirm"]
        flood.close()
        data.socket.close()
        wait_until(lambda: is_idle(server))
        assert_serves(source)


def test_those_who_fall_silent_delay_nobody_and_are_sent_away(
    opened: contextlib.ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(LARGE, ALL, timeouts=Timeouts(3.0, 3.0), max_clients=32) as (server, source):
        silent = [fall_silent(source, opened) for fall_silent in SILENCES]
        assert server.state().connections > len(silent)  # they are all still there
        assert_serves(source, LARGE)
        wait_until(lambda: is_idle(server))
        assert_serves(source, LARGE)
    assert_no_error_of_the_server(caplog)


def test_one_who_does_not_prove_that_it_knows_the_token_is_sent_away(opened: contextlib.ExitStack) -> None:
    with serving(SMALL, TCP, timeouts=IMPATIENT, access=TOKEN) as (server, source):
        lines = [opened.enter_context(Intruder(source).say(Hello(challenge=bytes(32)))) for _ in range(20)]
        assert {line.hear()["type"] for line in lines} == {"Challenge"}
        assert_serves(source, access=TOKEN)
        wait_until(lambda: is_idle(server))


def test_one_who_waits_for_its_turn_and_is_gone_does_not_get_it(
    opened: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting_room, "WAIT_NOTICE", 0.05)
    with serving(SMALL, TCP, timeouts=PATIENT, max_clients=1) as (server, source):
        first = opened.enter_context(Intruder(source).greet())
        first.accepted()
        waiting = [Intruder(source).greet().join() for _ in range(20)]
        wait_until(lambda: server.state().waiting == 20)
        for line in waiting:
            line.reset()
        wait_until(lambda: server.state().waiting == 0)
        first.reset()
        assert_serves(source)
        wait_until(lambda: is_idle(server))


@pytest.mark.parametrize("greet_first", [False, True], ids=["Hello", "Join"])
def test_a_message_that_comes_byte_by_byte_must_be_whole_in_time(
    greet_first: bool, opened: contextlib.ExitStack
) -> None:
    with serving(SMALL, TCP, timeouts=Timeouts(2.0, 2.0)) as (server, source):
        lines = [opened.enter_context(Intruder(source)) for _ in range(10)]
        for line in lines:
            if greet_first:
                line.greet()
            line.send(b"\x00\x00\xff\xff")
        wait_until(lambda: server.state().connections == len(lines))
        while server.state().connections:  # ends, though each byte comes well before any deadline
            for line in lines:
                with contextlib.suppress(OSError):
                    line.send(b"\x00")
            assert_serves(source)
            time.sleep(0.05)
        wait_until(lambda: is_idle(server))


class SlowReaders:
    """Clients that take next to nothing, and never end."""

    def __init__(self, source: Endpoint, count: int) -> None:
        self._source = source
        self._stop = threading.Event()
        self._started = threading.Semaphore(0)
        self._threads = [threading.Thread(target=self._read, daemon=True) for _ in range(count)]
        self.taken = 0
        self.ended = 0

    def __enter__(self) -> SlowReaders:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _read(self) -> None:
        with contextlib.suppress(EOFError, OSError), contextlib.ExitStack() as opened:
            line = attached(self._source, opened)
            self._started.release()
            line.say(Fetch(0, CHUNK_BYTES))
            while not self._stop.wait(0.05):
                line.read(1000)
        self.ended += 1

    def wait_for(self, count: int) -> None:
        for _ in range(count):
            assert self._started.acquire(timeout=40)


def test_those_who_take_next_to_nothing_yield_their_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rate, "RATE_SECONDS", 0.2)
    monkeypatch.setattr(waiting_room, "WAIT_NOTICE", 0.05)
    with serving(LARGE, TCP, timeouts=PATIENT, max_clients=2) as (server, source):
        with SlowReaders(source, 8) as readers:
            readers.wait_for(8)
            assert_serves(source, LARGE)
            assert readers.ended == 0
        wait_until(lambda: is_idle(server))


def test_what_filled_the_buffers_at_once_does_not_count_for_long() -> None:
    now = 0.0
    measured = rate.Rate(lambda: now)
    measured.note(1 << 30)
    assert measured.lately() == math.inf
    now = rate.RATE_SECONDS + 0.1
    assert measured.lately() == 0


def test_a_client_that_is_slow_but_steady_is_not_taken_for_a_silent_one(opened: contextlib.ExitStack) -> None:
    piece = 64 << 10
    with serving(LARGE, TCP, timeouts=Timeouts(connect=60.0, stall=1.5)) as (server, source):
        line = attached(source, opened)
        line.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 512 << 10)  # the server is to notice how slow it is
        line.say(*(Fetch(number * CHUNK_BYTES, CHUNK_BYTES) for number in range(4)))
        for _ in range(128):  # which takes longer than the timeout, with progress all the time
            line.read(piece)
            time.sleep(0.02)
        assert len(server.state().sessions) == 1


@pytest.mark.parametrize("arrive", SILENCES, ids=lambda arrival: arrival.__name__)
def test_a_reset_ends_what_it_belongs_to(
    arrive: Arrival, opened: contextlib.ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(LARGE, ALL, timeouts=replace(PATIENT, connect=2.0)) as (server, source):
        for _ in range(5):
            arrive(source, opened).reset()
        opened.close()
        wait_until(lambda: is_idle(server))
        assert_serves(source, LARGE)
    assert_no_error_of_the_server(caplog)


def test_slow_ones_from_many_hosts_do_not_keep_the_next_host_waiting(
    opened: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rate, "RATE_SECONDS", 0.2)
    monkeypatch.setattr(waiting_room, "WAIT_NOTICE", 0.05)
    with serving(LARGE, TCP, timeouts=PATIENT, max_clients=2) as (server, source):
        held = [opened.enter_context(Intruder(source, host).greet()) for host in itertools.islice(many_hosts(), 8)]
        for line in held:
            line.accepted(tensors=LARGE)
        assert_serves(source, LARGE)
        assert held[0].hear() == {
            "type": "End",
            "reason": "it took next to nothing, and others wait for their turn",
            "denies": False,
        }
        assert len(server.state().sessions) >= 7 - 1
        opened.close()
        wait_until(lambda: is_idle(server))


@pytest.mark.parametrize("arrive", SILENCES, ids=lambda arrival: arrival.__name__)
def test_a_server_can_be_closed_while_a_client_is_silent(
    arrive: Arrival, opened: contextlib.ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    timeouts = Timeouts(connect=1.0, stall=1000.0)  # `close` would wait that long, and this test may not
    with serving(LARGE, ALL, timeouts=timeouts) as (server, source):
        arrive(source, opened)
    assert not server.state().connections
    assert_no_error_of_the_server(caplog)
