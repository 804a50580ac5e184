"""Clients that ask for what they may not have, or without end: it ends their own session and no other."""

from __future__ import annotations

import contextlib
import random
import socket
import time

import msgspec
import pytest

from support.logs import assert_no_error_of_the_server
from support.peers.corpus import GARBAGE, LIMITS
from support.peers.messages import SESSION
from support.peers.silences import (
    LARGE,
    Arrival,
    after_hello,
    after_join,
    after_welcome,
    on_a_data_connection,
    on_connecting,
)
from support.peers.strangers import Intruder, is_idle
from support.sources import PATIENT, SMALL, assert_serves, serving
from support.wait import wait_until
from vllm_ascend.model_loader.netloader.client.inquiry import inquire
from vllm_ascend.model_loader.netloader.server import session as server_session
from vllm_ascend.model_loader.netloader.server.admission import waiting as waiting_room
from vllm_ascend.model_loader.netloader.server.requests import MAX_INQUIRIES
from vllm_ascend.model_loader.netloader.transport import rate
from vllm_ascend.model_loader.netloader.transport.base import Timeouts
from vllm_ascend.model_loader.netloader.transport.chunks.delivery import TRIES_PER_CHUNK
from vllm_ascend.model_loader.netloader.transport.digests import CHUNK_BYTES
from vllm_ascend.model_loader.netloader.transport.registry import transports
from vllm_ascend.model_loader.netloader.transport.tcp import MAX_DATA_CONNECTIONS
from vllm_ascend.model_loader.netloader.wire.conversation import Role
from vllm_ascend.model_loader.netloader.wire.messages import (
    DIGESTS_LIMIT,
    FETCH_LIMIT,
    AskDigests,
    Attach,
    Done,
    Fetch,
    Inquire,
)

pytestmark = pytest.mark.timeout(100)

TCP = transports(["tcp"])
ALL = transports(["shared_memory", "tcp"])
IMPATIENT = Timeouts(connect=1.0, stall=1.0)


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


CHUNKS = LARGE.manifest.nbytes // CHUNK_BYTES
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
        wait_until(lambda: len(sender._channels) == MAX_DATA_CONNECTIONS)  # type: ignore[attr-defined]
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
            assert len(line.say(AskDigests(first, DIGESTS_LIMIT)).hear()["digests"]) == CHUNKS - first
        line.say(AskDigests(1, 1)).hear_out()
        wait_until(lambda: is_idle(server))


@pytest.mark.parametrize("first", [CHUNKS, LAST])
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
