"""Clients that mean no good, one kind at a time: whatever they do, another client is served meanwhile."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from support.corpus import GARBAGE, LIMITS
from support.messages import SESSION
from support.sources import IDENTITY, SMALL, Tensors, fetch, serving
from support.strangers import Intruder, Line, is_idle, many_hosts
from support.wait import wait_until
from vllm_ascend.model_loader.netloader.client.inquiry import inquire
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import SourcesExhausted
from vllm_ascend.model_loader.netloader.server import listener, peer_log
from vllm_ascend.model_loader.netloader.server import session as server_session
from vllm_ascend.model_loader.netloader.server import waiting as waiting_room
from vllm_ascend.model_loader.netloader.server.publications import Publication
from vllm_ascend.model_loader.netloader.server.requests import MAX_INQUIRIES
from vllm_ascend.model_loader.netloader.transport import rate
from vllm_ascend.model_loader.netloader.transport.base import Timeouts
from vllm_ascend.model_loader.netloader.transport.delivery import TRIES_PER_CHUNK
from vllm_ascend.model_loader.netloader.transport.digests import CHUNK_BYTES
from vllm_ascend.model_loader.netloader.transport.registry import transports
from vllm_ascend.model_loader.netloader.transport.sender import Sender
from vllm_ascend.model_loader.netloader.transport.store import WeightStore
from vllm_ascend.model_loader.netloader.transport.tcp import MAX_DATA_CONNECTIONS, TcpTransport
from vllm_ascend.model_loader.netloader.weights.identity import RankCoordinates
from vllm_ascend.model_loader.netloader.wire.access import Access
from vllm_ascend.model_loader.netloader.wire.conversation import Role
from vllm_ascend.model_loader.netloader.wire.messages import (
    DIGESTS_LIMIT,
    FETCH_LIMIT,
    PROTOCOL_VERSION,
    Announce,
    AskDigests,
    Attach,
    Digests,
    Done,
    Fetch,
    Hello,
    Inquire,
    Join,
    Leave,
    Offer,
    Prove,
)
from vllm_ascend.model_loader.netloader.wire.pacing import Pacer

pytestmark = pytest.mark.timeout(100)

TCP = transports(["tcp"])
ALL = transports(["shared_memory", "tcp"])
PATIENT = Timeouts(connect=60.0, stall=60.0)
IMPATIENT = Timeouts(connect=1.0, stall=1.0)
TOKEN = Access(b"a token of thirty-two bytes long")
LARGE = Tensors.of_shapes((8 << 20,))
"""More than the buffers of a connection hold."""


@pytest.fixture
def opened() -> Iterator[contextlib.ExitStack]:
    """For lines, which are closed at the end."""
    with contextlib.ExitStack() as lines:
        yield lines


def assert_serves(source: Endpoint, tensors: Tensors = SMALL, **terms: Any) -> None:
    """Whether a client on an address of its own gets everything."""
    _, fetched = fetch(tensors, TCP, source, **{"timeouts": PATIENT, **terms})
    tensors.assert_in(fetched.memory)
    fetched.memory.close()


def assert_no_error_of_the_server(caplog: pytest.LogCaptureFixture) -> None:
    assert not [record.getMessage() for record in caplog.records if record.exc_info or record.levelno > logging.WARNING]


# Many of them.


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


# Silent ones. Each comes to a point of the conversation and says no more.

Arrival = Callable[[Endpoint, contextlib.ExitStack], Line]


def on_connecting(source: Endpoint, opened: contextlib.ExitStack) -> Line:
    return opened.enter_context(Intruder(source))


def in_a_length(source: Endpoint, opened: contextlib.ExitStack) -> Line:
    return on_connecting(source, opened).send(b"\x00\x00")


def in_a_frame(source: Endpoint, opened: contextlib.ExitStack) -> Line:
    return on_connecting(source, opened).send(b"\x00\x00\xff\xff half a frame")


def after_hello(source: Endpoint, opened: contextlib.ExitStack) -> Line:
    return on_connecting(source, opened).say(Hello())


def after_welcome(source: Endpoint, opened: contextlib.ExitStack) -> Line:
    return opened.enter_context(Intruder(source).greet())


def in_a_join(source: Endpoint, opened: contextlib.ExitStack) -> Line:
    return after_welcome(source, opened).send(b"\x00\x00\x10\x00\x85\xa4type\xa4Join")


def after_inquiring(source: Endpoint, opened: contextlib.ExitStack) -> Line:
    return after_welcome(source, opened).say(Inquire())


def after_join(source: Endpoint, opened: contextlib.ExitStack) -> Line:
    return opened.enter_context(Intruder(source).greet().join(tensors=LARGE))


def after_join_for_shared_memory(source: Endpoint, opened: contextlib.ExitStack) -> Line:
    offer = transports(["shared_memory"])[0].offer()
    join = Join(IDENTITY, RankCoordinates(), LARGE.manifest.digest, (offer,))
    return after_welcome(source, opened).say(join)


def after_a_part_of_the_digests(source: Endpoint, opened: contextlib.ExitStack) -> Line:
    return after_join(source, opened).say(AskDigests(0, 1))


def attached(source: Endpoint, opened: contextlib.ExitStack) -> Intruder:
    control = opened.enter_context(Intruder(source).greet())
    session = control.accepted(tensors=LARGE)
    return opened.enter_context(Intruder(source).greet().attach(session))


def on_a_data_connection(source: Endpoint, opened: contextlib.ExitStack) -> Line:
    return attached(source, opened)


def in_a_fetch(source: Endpoint, opened: contextlib.ExitStack) -> Line:
    return attached(source, opened).send(b"\x00\x00\x00\x20\x83")


def not_reading(source: Endpoint, opened: contextlib.ExitStack) -> Line:
    return attached(source, opened).say(Fetch(0, 16 << 20), Fetch(16 << 20, 16 << 20))


def reading_a_little(source: Endpoint, opened: contextlib.ExitStack) -> Line:
    line = attached(source, opened).say(Fetch(0, 16 << 20))
    line.read(1 << 20)
    return line


SILENCES: tuple[Arrival, ...] = (
    on_connecting,
    in_a_length,
    in_a_frame,
    after_hello,
    after_welcome,
    in_a_join,
    after_inquiring,
    after_join,
    after_join_for_shared_memory,
    after_a_part_of_the_digests,
    on_a_data_connection,
    in_a_fetch,
    not_reading,
    reading_a_little,
)


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


# Slow ones.


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
            line.say(Fetch(0, 16 << 20))
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
        line.say(Fetch(0, 16 << 20))
        for _ in range(128):  # which takes longer than the timeout, with progress all the time
            line.read(piece)
            time.sleep(0.02)
        assert len(server.state().sessions) == 1


def test_a_client_that_fetches_the_same_bytes_without_end_is_sent_away(
    opened: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rate, "RATE_SECONDS", 0.2)
    monkeypatch.setattr(waiting_room, "WAIT_NOTICE", 0.05)
    with serving(SMALL, TCP, timeouts=PATIENT, max_clients=1) as (_, source):
        control = opened.enter_context(Intruder(source).greet())
        session = control.accepted()
        taken, nbytes = 0, SMALL.manifest.nbytes
        with contextlib.suppress(EOFError, OSError):
            for _ in range(10_000):
                line = opened.enter_context(Intruder(source).greet().attach(session))
                taken += len(line.say(Fetch(0, nbytes)).read(nbytes))
        assert taken == TRIES_PER_CHUNK * nbytes
        assert_serves(source)


# Wrong ones.


@pytest.mark.parametrize("arrive", [on_connecting, after_hello, after_welcome, after_join, on_a_data_connection])
@pytest.mark.parametrize("length", [LIMITS[Role.CLIENT] + 1, 0x7FFFFFFF, 0xFFFFFFFF])
def test_a_frame_above_the_limit_ends_the_connection_at_once(
    arrive: Arrival, length: int, opened: contextlib.ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(LARGE, TCP, timeouts=PATIENT) as (server, source):
        line = arrive(source, opened)
        with contextlib.suppress(OSError):  # the server closes while bytes are on their way
            line.send(length.to_bytes(4, "big") + bytes(1 << 20))
        line.hear_out()
        opened.close()
        wait_until(lambda: is_idle(server))
    assert_no_error_of_the_server(caplog)


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


def test_garbage_on_a_data_connection_ends_that_connection_only(opened: contextlib.ExitStack) -> None:
    generator = random.Random(0)
    with serving(SMALL, TCP, timeouts=PATIENT) as (server, source):
        control = opened.enter_context(Intruder(source).greet())
        session = control.accepted()
        for garbage in [*GARBAGE, *(generator.randbytes(generator.randint(4, 300)) for _ in range(30))]:
            with Intruder(source).greet().attach(session) as line:
                line.send(b"\xff" + garbage).hear_out()
        assert control.say(AskDigests(0, 1)).hear()["type"] == "Digests"
        assert control.say(Done()).hear()["type"] == "Confirm"
        assert_serves(source)
        wait_until(lambda: is_idle(server))


LAST = (1 << 62) - 1
RANGES = {
    "behind the end": (SMALL.manifest.nbytes, 1),
    "over the end": (SMALL.manifest.nbytes - 1, 2),
    "all and more": (0, SMALL.manifest.nbytes + 1),
    "a byte": (0, 1),
    "nearly a chunk": (0, SMALL.manifest.nbytes - 1),
    "the end of a chunk": (1, SMALL.manifest.nbytes - 1),
    "the greatest length": (0, FETCH_LIMIT),
    "the greatest offset": (LAST, FETCH_LIMIT),
    "a length above the limit": (0, FETCH_LIMIT + 1),
    "nothing": (0, 0),
    "a negative offset": (-1, 1),
    "a negative length": (0, -1),
    "an offset beyond 64 bits": ((1 << 64) - 1, 1),
}


@pytest.mark.parametrize(("offset", "length"), RANGES.values(), ids=RANGES.keys())
def test_a_fetch_of(offset: int, length: int, opened: contextlib.ExitStack, caplog: pytest.LogCaptureFixture) -> None:
    fetch_content = msgspec.msgpack.encode({"type": "Fetch", "offset": offset, "length": length})
    with serving(SMALL, TCP, timeouts=PATIENT) as (server, source):
        control = opened.enter_context(Intruder(source).greet())
        line = opened.enter_context(Intruder(source).greet().attach(control.accepted()))
        assert line.say_content(fetch_content).socket.recv(1) == b""
        assert_serves(source)
        opened.close()
        wait_until(lambda: is_idle(server))
    assert_no_error_of_the_server(caplog)


def test_a_chunk_can_be_fetched_as_often_as_a_client_may_need_and_no_more(opened: contextlib.ExitStack) -> None:
    with serving(LARGE, TCP, timeouts=PATIENT) as (_, source):
        control = opened.enter_context(Intruder(source).greet())
        session = control.accepted(tensors=LARGE)
        for _ in range(TRIES_PER_CHUNK):
            line = opened.enter_context(Intruder(source).greet().attach(session))
            assert len(line.say(Fetch(0, CHUNK_BYTES)).read(CHUNK_BYTES)) == CHUNK_BYTES
        assert line.say(Fetch(0, CHUNK_BYTES)).socket.recv(1) == b""
        line = opened.enter_context(Intruder(source).greet().attach(session))
        line.say(Fetch(CHUNK_BYTES, CHUNK_BYTES)).read(CHUNK_BYTES)


def test_a_fetch_on_the_control_connection_of_a_transport_that_pulls_ends_the_session(
    opened: contextlib.ExitStack,
) -> None:
    with serving(SMALL, ALL, timeouts=PATIENT) as (server, source):
        line = opened.enter_context(Intruder(source).greet())
        line.accepted()
        line.say(Fetch(0, 1)).hear_out()
        wait_until(lambda: is_idle(server))


def test_sessions_that_nobody_has_cannot_be_attached_to(caplog: pytest.LogCaptureFixture) -> None:
    generator = random.Random(0)
    with serving(SMALL, ALL, timeouts=PATIENT) as (server, source):
        with Intruder(source).greet() as control:
            session = control.accepted()
            near = [session[:15] + bytes([session[15] ^ 1]), bytes(16), SESSION]
            for guess in [*near, *(generator.randbytes(16) for _ in range(300))]:
                with Intruder(source).greet() as line:
                    line.say(Attach(guess), Fetch(0, 1)).hear_out()
        wait_until(lambda: is_idle(server))
        with Intruder(source).greet() as line:  # of a session that is over
            line.say(Attach(session), Fetch(0, 1)).hear_out()
        assert_serves(source)
        wait_until(lambda: is_idle(server))
    assert_no_error_of_the_server(caplog)


def test_a_session_has_a_limited_number_of_data_connections(opened: contextlib.ExitStack) -> None:
    with serving(SMALL, TCP, timeouts=PATIENT) as (server, source):
        control = opened.enter_context(Intruder(source).greet())
        session = control.accepted()
        for _ in range(MAX_DATA_CONNECTIONS):
            opened.enter_context(Intruder(source).greet().attach(session))
        sender = server.sessions.all()[0].sender
        wait_until(lambda: len(sender._channels) == MAX_DATA_CONNECTIONS)  # type: ignore
        for _ in range(20):
            with Intruder(source).greet() as beyond:
                beyond.say(Attach(session), Fetch(0, 1)).hear_out()
        wait_until(lambda: server.state().connections == 1 + MAX_DATA_CONNECTIONS)
        assert_serves(source)


def test_inquiries_on_one_connection_end(opened: contextlib.ExitStack) -> None:
    with serving(SMALL, TCP, timeouts=PATIENT) as (server, source):
        line = opened.enter_context(Intruder(source).greet())
        line.say(*[Inquire()] * MAX_INQUIRIES)
        assert {line.hear()["type"] for _ in range(MAX_INQUIRIES)} == {"Status"}
        line.hear_out()
        wait_until(lambda: is_idle(server))
        assert inquire(source, 60).sessions == 0


def test_inquiries_without_end_whose_answers_nobody_reads_end(opened: contextlib.ExitStack) -> None:
    with serving(SMALL, TCP, timeouts=IMPATIENT) as (server, source):
        line = opened.enter_context(Intruder(source).greet())
        with contextlib.suppress(OSError):
            for _ in range(20_000):
                line.say(Inquire())
        assert_serves(source)
        wait_until(lambda: is_idle(server))


@pytest.mark.parametrize("first", [0, 1])
def test_digests_are_told_as_often_as_a_client_may_need_and_no_more(first: int, opened: contextlib.ExitStack) -> None:
    with serving(LARGE, TCP, timeouts=PATIENT) as (server, source):
        line = opened.enter_context(Intruder(source).greet())
        line.accepted(tensors=LARGE)
        for _ in range(TRIES_PER_CHUNK):
            assert len(line.say(AskDigests(first, DIGESTS_LIMIT)).hear()["digests"]) == 2 - first
        line.say(AskDigests(1, 1)).hear_out()
        wait_until(lambda: is_idle(server))


@pytest.mark.parametrize("first", [2, LAST])
def test_digests_that_do_not_exist_are_not_asked_for_twice(first: int, opened: contextlib.ExitStack) -> None:
    with serving(LARGE, TCP, timeouts=PATIENT) as (server, source):
        line = opened.enter_context(Intruder(source).greet())
        line.accepted(tensors=LARGE)
        line.say(AskDigests(first, 1)).hear_out()
        wait_until(lambda: is_idle(server))


def test_whoever_only_asks_for_the_same_digests_stalls(
    opened: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_session, "TRIES_PER_CHUNK", 1 << 40)
    with serving(SMALL, TCP, timeouts=Timeouts(connect=60.0, stall=0.4)) as (server, source):
        line = opened.enter_context(Intruder(source).greet())
        line.accepted()
        with contextlib.suppress(EOFError, OSError):
            for _ in range(200):
                line.say(AskDigests(0, 1)).hear()
                time.sleep(0.05)
            pytest.fail("the session goes on")
        wait_until(lambda: is_idle(server))


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
        assert held[0].hear() == {"type": "End", "reason": "it took next to nothing, and others wait for their turn"}
        assert len(server.state().sessions) >= 7 - 1
        opened.close()
        wait_until(lambda: is_idle(server))


def make_small(sock: socket.socket) -> None:
    """Its buffers, so that they are soon full."""
    for buffer in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        sock.setsockopt(socket.SOL_SOCKET, buffer, 4096)


def test_questions_for_digests_without_end_whose_answers_nobody_reads_end(
    opened: contextlib.ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(SMALL, TCP, timeouts=IMPATIENT) as (server, source):
        assert server.listener.bound is not None
        make_small(server.listener.bound.socket)  # which its connections inherit
        line = opened.enter_context(Intruder(source).greet())
        line.accepted()
        make_small(line.socket)
        with contextlib.suppress(OSError):
            while True:
                line.say(*[AskDigests(0, 1)] * 100)
        assert_serves(source)
        wait_until(lambda: is_idle(server))
    assert_no_error_of_the_server(caplog)


def took(source: Endpoint, host: str) -> bytes:
    """A session in which somebody on `host` took everything."""
    with Intruder(source, host).greet() as line, Intruder(source, host).greet() as data:
        session = line.accepted()
        line.say(AskDigests(0, 1)).hear_kind(Digests)
        data.attach(session).say(Fetch(0, SMALL.manifest.nbytes)).read(SMALL.manifest.nbytes)
        line.say(Done()).hear()
        return session


def test_who_asks_for_everything_and_reads_next_to_nothing_has_taken_nothing(opened: contextlib.ExitStack) -> None:
    with serving(LARGE, TCP, timeouts=PATIENT) as (server, source):
        line = opened.enter_context(Intruder(source).greet())
        session = line.accepted(tensors=LARGE)
        for offset in range(0, 2 * CHUNK_BYTES, CHUNK_BYTES):
            with Intruder(source).greet().attach(session) as data:
                data.say(Fetch(offset, CHUNK_BYTES)).read(100)
                data.reset()
        line.say(AskDigests(0, 1), Done())
        assert [line.hear()["type"] for _ in range(2)] == ["Digests", "Confirm"]
        announce(source, "127.0.0.3", session)
        wait_until(lambda: is_idle(server))
        assert server.state().replicas["target"] == ()


def announce(source: Endpoint, host: str, session: bytes, port: int = 19001) -> None:
    with Intruder(source, host).greet() as line:
        line.say(Announce(session, port)).hear_out()


def test_only_who_took_weights_can_announce_them_and_once(caplog: pytest.LogCaptureFixture) -> None:
    with serving(SMALL, TCP, timeouts=PATIENT) as (server, source), Intruder(source).greet() as unfinished:
        announce(source, "127.0.0.3", SESSION)
        announce(source, "127.0.0.3", unfinished.accepted())
        announce(source, "127.0.0.4", took(source, "127.0.0.3"))
        with Intruder(source).greet() as line:
            line.accepted()
            line.say(Leave("no more")).hear_out()
        with Intruder(source, "127.0.0.3").greet() as line:
            session = line.accepted()
            line.say(Done()).hear()
        announce(source, "127.0.0.3", session)  # it was confirmed, and had taken nothing
        assert server.state().replicas["target"] == ()
        session = took(source, "127.0.0.3")
        announce(source, "127.0.0.3", session, 1)
        announce(source, "127.0.0.3", session, 2)
        assert server.state().replicas["target"] == (":1",)
    assert_no_error_of_the_server(caplog)


def test_announcements_that_are_lies_cost_a_client_little(
    opened: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting_room, "WAIT_NOTICE", 0.05)
    with serving(SMALL, TCP, timeouts=PATIENT, max_clients=1) as (server, source), socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        for port in itertools.chain([nobody.getsockname()[1], source.port], range(1, 100)):
            announce(source, "127.0.0.3", took(source, "127.0.0.3"), port)
        line = opened.enter_context(Intruder(source).greet())
        line.accepted()
        release = threading.Timer(0.3, line.reset)
        release.start()
        assert_serves(source)
        release.join()
        wait_until(lambda: is_idle(server))


def test_a_client_that_gives_up_without_end_fills_no_log(caplog: pytest.LogCaptureFixture) -> None:
    with serving(SMALL, TCP, timeouts=PATIENT) as (_, source):
        for _ in range(200):
            with Intruder(source).greet() as line:
                line.accepted()
                line.say(Leave("words without end, " * 200)).hear_out()
    lines = [line for line in caplog.messages if "gave up taking the target weights by tcp" in line]
    assert len(lines) <= peer_log.LINES_OF_A_HOST + 1  # one tells of those that were left out
    assert sum(map(len, lines)) < 4000
    assert f"(... and {200 - peer_log.LINES_OF_A_HOST - 1} more like it)" in lines[-1]


def test_the_log_says_what_a_client_has_really_taken(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with serving(LARGE, TCP, timeouts=PATIENT) as (server, source):
        with Intruder(source).greet() as line:
            line.accepted(tensors=LARGE)
            line.say(Done()).hear()
        wait_until(lambda: is_idle(server))
        assert not [line for line in caplog.messages if "took the target weights" in line]
        (nothing,) = [line for line in caplog.messages if "has the target weights" in line]
        assert nothing.endswith(" has the target weights: it took 0.0 of 33.6 MB here, by tcp")
        assert_serves(source, LARGE)
        (all_of_it,) = [line for line in caplog.messages if "took the target weights" in line]
        assert all_of_it.endswith(" took the target weights by tcp: 33.6 MB")


def test_a_client_of_another_protocol_is_told_so(caplog: pytest.LogCaptureFixture) -> None:
    with serving(SMALL, TCP, timeouts=PATIENT) as (server, source):
        for version in (0, PROTOCOL_VERSION + 1, LAST):
            with Intruder(source) as line:
                assert line.say(Hello(version)).hear()["reason"] == "the protocol versions differ"
                line.hear_out()
        wait_until(lambda: is_idle(server))
    assert_no_error_of_the_server(caplog)


def test_a_proof_where_nobody_asked_for_one_ends_the_connection() -> None:
    with serving(SMALL, TCP, timeouts=PATIENT) as (server, source):
        with Intruder(source).greet() as line:
            line.say(Prove(bytes(32))).hear_out()
        wait_until(lambda: is_idle(server))


STRANGE_OFFERS = {
    "none": (),
    "unknown": (Offer("carrier_pigeon"),),
    "of another host": (Offer("shared_memory", "another boot"),),
    "with a scope that means nothing": (Offer("tcp", "x" * 4096),),
    "a thousand": tuple(Offer(f"transport {number}") for number in range(1000)),
}


@pytest.mark.parametrize("offers", STRANGE_OFFERS.values(), ids=STRANGE_OFFERS.keys())
def test_a_join_that_offers_transports_that_cannot_be_used_is_refused(offers: tuple[Offer, ...]) -> None:
    with serving(SMALL, ALL, timeouts=PATIENT) as (server, source):
        with Intruder(source).greet() as line:
            line.say(Join(IDENTITY, RankCoordinates(), SMALL.manifest.digest, offers))
            assert line.hear()["reason"] == "no common transport: this server has shared_memory, tcp"
        wait_until(lambda: is_idle(server))


LONG = "\0\r\n\x1b[2J\u2028\u202e" * 900


@pytest.mark.parametrize("field", ["name", "architecture", "role", "load_options", "versions"])
def test_an_identity_of_thousands_of_control_characters_is_refused_and_not_logged(
    field: str, caplog: pytest.LogCaptureFixture
) -> None:
    identity = msgspec.structs.replace(IDENTITY, **{field: {LONG: LONG} if field == "versions" else LONG})
    with serving(SMALL, ALL, timeouts=PATIENT) as (server, source):
        with Intruder(source).greet() as line:
            line.say(Join(identity, RankCoordinates(), LONG[:4096], (Offer("tcp"),)))
            assert line.hear()["type"] == "Refuse"
        wait_until(lambda: is_idle(server))
    assert_no_error_of_the_server(caplog)
    assert all(len(record.getMessage()) < 5000 and record.getMessage().isprintable() for record in caplog.records)


class Halting(TcpTransport):
    """A session by it does not begin to listen before `go`."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.halted = threading.Event()

    def sender(self, store: WeightStore, timeouts: Timeouts, pacer: Pacer) -> Sender:
        sender = super().sender(store, timeouts, pacer)
        sender.run = self._halt  # type: ignore[method-assign]
        return sender

    def _halt(self) -> None:
        self.halted.set()
        assert self.go.wait(40)


PARTING = {"leaves": Leave("no more"), "is done": Done(), "asks on": AskDigests(0, 1)}


@pytest.mark.parametrize("last", PARTING.values(), ids=PARTING.keys())
def test_a_client_may_speak_while_its_session_is_ended(last: Any, caplog: pytest.LogCaptureFixture) -> None:
    transport = Halting()
    with serving(SMALL, (transport,), timeouts=PATIENT) as (server, source):
        with Intruder(source).greet() as line:
            line.accepted()
            assert transport.halted.wait(40)
            line.say(last)
            server.publish(Publication(IDENTITY, RankCoordinates(), SMALL.store(2)))
            transport.go.set()
            line.hear_out()
        wait_until(lambda: is_idle(server))
    assert_no_error_of_the_server(caplog)


@pytest.mark.parametrize("arrive", SILENCES, ids=lambda arrival: arrival.__name__)
def test_a_server_can_be_closed_while_a_client_is_silent(
    arrive: Arrival, opened: contextlib.ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    timeouts = Timeouts(connect=1.0, stall=1000.0)  # `close` would wait that long, and this test may not
    with serving(LARGE, ALL, timeouts=timeouts) as (server, source):
        arrive(source, opened)
    assert not server.state().connections
    assert_no_error_of_the_server(caplog)
