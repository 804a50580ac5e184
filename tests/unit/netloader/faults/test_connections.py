"""Connections that break, fall silent or change what they carry, at every point: real servers behind a faulty proxy."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import re
import threading
from collections.abc import Callable, Iterator

import pytest

from support.proxy import (
    Effect,
    Fault,
    Proxy,
    Stream,
    close,
    flip,
    half_close,
    hold,
    insert,
    kill,
    lose_a_byte,
    repeat_a_byte,
    reset,
    silence,
    silence_all,
)
from support.sources import IDENTITY, SHORT, SMALL, Tensors, fetch, serving
from support.wait import wait_until
from vllm_ascend.model_loader.netloader.client import connections
from vllm_ascend.model_loader.netloader.client.inquiry import inquire
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import SourcesExhausted
from vllm_ascend.model_loader.netloader.server.publications import Publication
from vllm_ascend.model_loader.netloader.server.server import WeightServer
from vllm_ascend.model_loader.netloader.transport import delivery, digests
from vllm_ascend.model_loader.netloader.transport.base import Timeouts
from vllm_ascend.model_loader.netloader.transport.delivery import TRIES_PER_CHUNK
from vllm_ascend.model_loader.netloader.transport.registry import transports
from vllm_ascend.model_loader.netloader.transport.tcp import CONNECTIONS
from vllm_ascend.model_loader.netloader.weights.identity import RankCoordinates
from vllm_ascend.model_loader.netloader.wire.access import CHALLENGE_BYTES, Access
from vllm_ascend.model_loader.netloader.wire.conversation import frame
from vllm_ascend.model_loader.netloader.wire.messages import Attach, Challenge, Hello, Prove, Welcome

pytestmark = pytest.mark.timeout(120)

TCP = transports(["tcp"])
PROCESS_GROUP = transports(["process_group"])
CHUNK = 16 << 10
WEIGHTS = Tensors.of_shapes((300_001,), (5,), (77, 1000), (20_000,))
NBYTES = WEIGHTS.manifest.nbytes
IMPATIENT = Timeouts(connect=5.0, stall=1.0)
WITH_TOKEN = Access(token=b"a token of the deployment")
PERCENT = (10, 50, 90)


@pytest.fixture(autouse=True)
def _small_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (digests, delivery):
        monkeypatch.setattr(module, "CHUNK_BYTES", CHUNK)
    monkeypatch.setattr(connections, "EXPLANATION_SECONDS", 0.1)


@pytest.fixture(autouse=True)
def _nothing_is_left_behind(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    threads, descriptors, failed = set(threading.enumerate()), open_descriptors(), request.session.testsfailed
    yield
    if request.session.testsfailed > failed:
        return  # its traceback keeps what it had
    caplog.get_records("call").clear()  # logged errors have tracebacks too

    def nothing_is_left() -> bool:
        return set(threading.enumerate()) <= threads and open_descriptors() <= descriptors

    if not nothing_is_left():
        gc.collect()
    wait_until(nothing_is_left)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def payload(percent: int, effect: Effect) -> Fault:
    return Fault(Stream.PAYLOAD, NBYTES * percent // 100, effect)


@contextlib.contextmanager
def source(
    *faults: Fault, tensors: Tensors = WEIGHTS, access: Access | None = None, delay: float = 0.0
) -> Iterator[tuple[Proxy, WeightServer, Endpoint]]:
    """A server behind a proxy, and its own address."""
    with serving(tensors, TCP, access=access) as (server, address), Proxy(address, *faults, delay=delay) as proxy:
        yield proxy, server, address


def assert_little_came_twice(received: int) -> None:
    """At most 1 %, and of each connection the chunk that it was taking when it broke."""
    assert received <= NBYTES * 1.01 + CONNECTIONS * CHUNK


def test_a_connection_without_faults_passes() -> None:
    with source() as (proxy, _, _):
        client, fetched = fetch(WEIGHTS, TCP, proxy.endpoint)
    WEIGHTS.assert_in(fetched.memory)
    assert client.attempts == []
    assert proxy.payload == client.received[str(proxy.endpoint)] == NBYTES
    assert proxy.connections == 1 + CONNECTIONS


SILENT = "the peer was silent for 1 s"
BROKEN = "the peer closed the connection|the connection broke: (Connection reset by peer|Broken pipe)"
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


# The handshake: every message of the control connection, and of a data connection up to the first byte of weights.


def said(stream: Stream, access: Access | None = None) -> int:
    """How many bytes one side says on the control connection of a session that takes SMALL."""
    with source(tensors=SMALL, access=access) as (proxy, _, _):
        fetch(SMALL, TCP, proxy.endpoint, access=access or Access())
    return proxy.passed[stream, 0]


def why_left(fault: Fault, healthy: Endpoint, access: Access | None = None) -> str:
    """The reason why a source behind `fault` did not deliver SMALL; the healthy one did."""
    with source(fault, tensors=SMALL, access=access) as (proxy, _, _):
        client, fetched = fetch(SMALL, TCP, proxy.endpoint, healthy, access=access or Access())
        assert proxy.struck
    SMALL.assert_in(fetched.memory)
    fetched.memory.close()
    assert fetched.source == healthy
    (attempt,) = client.attempts
    assert attempt.source == str(proxy.endpoint)
    return attempt.reason


ACCESS = {"without a token": Access(), "with a token": WITH_TOKEN}
BOTH_SIDES = {"what the client says": Stream.TO_SERVER, "what the server says": Stream.TO_CLIENT}
CUTS = (close, reset, half_close)


@pytest.mark.parametrize("access", ACCESS.values(), ids=ACCESS.keys())
@pytest.mark.parametrize("stream", BOTH_SIDES.values(), ids=BOTH_SIDES.keys())
def test_a_cut_at_any_byte_of_the_conversation_leads_to_the_next_source(stream: Stream, access: Access) -> None:
    step = 1 if access.token is None else 4
    with serving(SMALL, TCP, access=access) as (_, healthy):
        for at in range(0, said(stream, access), step):
            reason = why_left(Fault(stream, at, CUTS[at % len(CUTS)], connection=0), healthy, access)
            assert re.search(BROKEN, reason), f"byte {at}: {reason}"


GREETING = len(frame(Hello(challenge=bytes(CHALLENGE_BYTES))))
DATA_CUTS = {
    "the greeting": (Stream.TO_CLIENT, 0),
    "within the greeting": (Stream.TO_CLIENT, 10),
    "Attach": (Stream.TO_SERVER, GREETING),
    "within Attach": (Stream.TO_SERVER, GREETING + 20),
    "Attached": (Stream.TO_CLIENT, len(frame(Welcome()))),
    "within Attached": (Stream.TO_CLIENT, len(frame(Welcome())) + 5),
    "the first Fetch": (Stream.TO_SERVER, GREETING + len(frame(Attach(bytes(16))))),
    "the first byte of weights": (Stream.PAYLOAD, 0),
}


@pytest.mark.parametrize(("stream", "at"), DATA_CUTS.values(), ids=DATA_CUTS.keys())
def test_a_data_connection_that_is_cut_before_it_brings_weights_leads_to_the_next_source(
    stream: Stream, at: int
) -> None:
    with serving(SMALL, TCP) as (_, healthy):
        assert re.search(BROKEN, why_left(Fault(stream, at, reset, connection=1), healthy))


def test_a_source_that_breaks_before_confirming_has_brought_everything() -> None:
    last = said(Stream.TO_CLIENT) - 1
    with source(Fault(Stream.TO_CLIENT, last, reset), tensors=SMALL) as (first, _, _):
        with source(tensors=SMALL) as (second, _, _):
            client, fetched = fetch(SMALL, TCP, first.endpoint, second.endpoint)
    SMALL.assert_in(fetched.memory)
    assert (fetched.source, len(client.attempts)) == (second.endpoint, 1)
    assert (first.payload, second.payload) == (SMALL.manifest.nbytes, 0)


SILENCES = {
    "before it greets": (Stream.TO_CLIENT, 0, "it did not greet: the peer was silent for 1 s"),
    "before it takes the greeting": (Stream.TO_SERVER, 0, "it did not greet: the peer was silent for 1 s"),
    "before it hears Join": (Stream.TO_SERVER, GREETING, "the peer was silent for 1 s"),
    "in the middle of a frame": (Stream.TO_CLIENT, len(frame(Welcome())) + 30, "the peer was silent for 1 s"),
}


@pytest.mark.parametrize(("stream", "at", "reason"), SILENCES.values(), ids=SILENCES.keys())
def test_a_source_that_falls_silent_in_the_handshake_is_left(stream: Stream, at: int, reason: str) -> None:
    silent = Fault(stream, at, silence_all)
    with source(silent, tensors=SMALL) as (first, _, _), source(tensors=SMALL) as (second, _, _):
        client, fetched = fetch(SMALL, TCP, first.endpoint, second.endpoint, timeouts=Timeouts(1.0, 1.0))
    SMALL.assert_in(fetched.memory)
    assert client.attempts[0].source == str(first.endpoint)
    assert client.attempts[0].reason.startswith(reason)


# Bytes that change on the way, at the level of the socket.


def mask(generator: random.Random) -> int:
    return 1 << generator.randrange(8)


@pytest.mark.parametrize("access", ACCESS.values(), ids=ACCESS.keys())
def test_weights_that_are_altered_on_the_way_are_fetched_again(
    access: Access, caplog: pytest.LogCaptureFixture
) -> None:
    for seed in range(10):
        caplog.clear()
        generator = random.Random(seed)
        fault = Fault(Stream.PAYLOAD, generator.randrange(NBYTES), flip(mask(generator)))
        with source(fault, access=access) as (proxy, _, _):
            client, fetched = fetch(WEIGHTS, TCP, proxy.endpoint, access=access)
        WEIGHTS.assert_in(fetched.memory)
        fetched.memory.close()
        assert (proxy.struck, client.attempts) == (True, [])
        assert len([message for message in caplog.messages if "arrived damaged" in message]) == 1
        assert NBYTES < client.received.total() <= NBYTES + CHUNK


def test_without_verification_altered_weights_go_through() -> None:
    at = WEIGHTS.manifest.nbytes // 2  # within a tensor
    with source(Fault(Stream.PAYLOAD, at, flip(1))) as (proxy, _, _):
        client, fetched = fetch(WEIGHTS, TCP, proxy.endpoint, verify=False)
    with pytest.raises(AssertionError):
        WEIGHTS.assert_in(fetched.memory)
    assert client.attempts == []


@pytest.mark.parametrize("access", ACCESS.values(), ids=ACCESS.keys())
def test_a_source_on_a_line_that_alters_all_weights_is_left(access: Access) -> None:
    all_along = [Fault(Stream.PAYLOAD, at, flip(1)) for at in range(0, 8 * NBYTES, CHUNK // 4)]
    with source(*all_along, access=access) as (first, _, _), source(access=access) as (second, _, _):
        client, fetched = fetch(WEIGHTS, TCP, first.endpoint, second.endpoint, access=access)
    WEIGHTS.assert_in(fetched.memory)
    assert fetched.source == second.endpoint
    assert client.received[str(second.endpoint)] == NBYTES
    (attempt,) = client.attempts
    assert attempt.reason.endswith(f"arrived damaged {TRIES_PER_CHUNK} times")


SHIFTS = {"garbage": insert(b"\xa5" * 13), "a repeated byte": repeat_a_byte, "a lost byte": lose_a_byte}


@pytest.mark.parametrize("shift", SHIFTS.values(), ids=SHIFTS.keys())
def test_weights_among_which_bytes_appear_or_vanish_are_never_taken(
    shift: Effect, caplog: pytest.LogCaptureFixture
) -> None:
    """All that follows on that connection is out of place; whether the other one can repair it is chance."""
    with source(payload(30, shift)) as (first, _, _), source() as (second, _, _):
        client, fetched = fetch(WEIGHTS, TCP, first.endpoint, second.endpoint, timeouts=IMPATIENT)
    WEIGHTS.assert_in(fetched.memory)
    assert any("arrived damaged" in message for message in caplog.messages)
    assert {attempt.source for attempt in client.attempts} <= {str(first.endpoint)}


TOKEN_GREETINGS = {
    Stream.TO_SERVER: GREETING + len(frame(Prove(bytes(32)))),
    Stream.TO_CLIENT: len(frame(Challenge(bytes(32)))) + len(frame(Welcome(proof=bytes(32)))),
}
PREFIX = 4


@pytest.mark.parametrize("stream", BOTH_SIDES.values(), ids=BOTH_SIDES.keys())
def test_with_a_token_an_altered_frame_is_seen(stream: Stream, caplog: pytest.LogCaptureFixture) -> None:
    begin, end = TOKEN_GREETINGS[stream] + PREFIX, said(stream, WITH_TOKEN)
    places = [*range(begin, begin + 60, 7), *range(end - 24, end, 3)]  # in Join and Done, or in Accept and Confirm
    who = "client" if stream is Stream.TO_SERVER else "server"
    seen = f"a frame of the {who} was altered on the way or is not its own"
    with serving(SMALL, TCP, access=WITH_TOKEN) as (_, healthy):
        for at in places:
            caplog.clear()
            fault = Fault(stream, at, flip(mask(random.Random(at))), connection=0)
            reason = why_left(fault, healthy, WITH_TOKEN)
            assert any(seen in message for message in (reason, *caplog.messages)), f"byte {at}: {reason}"


@pytest.mark.parametrize(
    ("stream", "at", "reason"),
    [
        (Stream.TO_SERVER, GREETING - 7, "the peer closed the connection"),
        (Stream.TO_SERVER, TOKEN_GREETINGS[Stream.TO_SERVER] - 7, "the peer closed the connection"),
        (Stream.TO_CLIENT, len(frame(Challenge(bytes(32)))) - 12, "a frame of the server was altered on the way"),
        (Stream.TO_CLIENT, TOKEN_GREETINGS[Stream.TO_CLIENT] - 7, "a frame of the server was altered on the way"),
    ],
    ids=["the client's challenge", "the client's proof", "the server's challenge", "the server's proof"],
)
def test_an_altered_greeting_is_seen(stream: Stream, at: int, reason: str) -> None:
    with serving(SMALL, TCP, access=WITH_TOKEN) as (_, healthy):
        assert reason in why_left(Fault(stream, at, flip(1), connection=0), healthy, WITH_TOKEN)


@pytest.mark.parametrize("stream", BOTH_SIDES.values(), ids=BOTH_SIDES.keys())
def test_without_a_token_no_altered_frame_goes_unnoticed(stream: Stream, caplog: pytest.LogCaptureFixture) -> None:
    with source(tensors=SMALL) as (second, _, _):
        for at in range(1, said(stream), 5):
            fault = Fault(stream, at, flip(mask(random.Random(at))), connection=0)
            with source(fault, tensors=SMALL) as (first, _, _):
                client, fetched = fetch(SMALL, TCP, first.endpoint, second.endpoint, timeouts=Timeouts(4.0, 1.0))
                assert first.struck
            SMALL.assert_in(fetched.memory)
            fetched.memory.close()
            assert {attempt.source for attempt in client.attempts} == {str(first.endpoint)}, f"byte {at}"
    assert not any("an error of this server" in message for message in caplog.messages)


# The process group has connections of its own, which no proxy sees; its sessions depend on the control connection.


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
