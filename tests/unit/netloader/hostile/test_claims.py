"""Clients that claim what is not true: what they are, what they took, what they serve, and why they leave."""

from __future__ import annotations

import contextlib
import itertools
import logging
import socket
import threading
from typing import Any

import msgspec
import pytest

from support.logs import assert_no_error_of_the_server
from support.peers.messages import SESSION
from support.peers.silences import LARGE
from support.peers.strangers import Intruder, is_idle
from support.sources import IDENTITY, PATIENT, SMALL, assert_serves, serving
from support.wait import wait_until
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.server import peer_log
from vllm_ascend.model_loader.netloader.server.admission import waiting as waiting_room
from vllm_ascend.model_loader.netloader.server.publications import Publication
from vllm_ascend.model_loader.netloader.transport.base import Timeouts
from vllm_ascend.model_loader.netloader.transport.digests import CHUNK_BYTES
from vllm_ascend.model_loader.netloader.transport.registry import transports
from vllm_ascend.model_loader.netloader.transport.sender import Sender
from vllm_ascend.model_loader.netloader.transport.store import WeightStore
from vllm_ascend.model_loader.netloader.transport.tcp import TcpTransport
from vllm_ascend.model_loader.netloader.weights.identity import RankCoordinates
from vllm_ascend.model_loader.netloader.wire.messages import (
    PROTOCOL_VERSION,
    Announce,
    AskDigests,
    Digests,
    Done,
    Fetch,
    Hello,
    Join,
    Leave,
    Offer,
    Prove,
)
from vllm_ascend.model_loader.netloader.wire.pacing import Pacer

pytestmark = pytest.mark.timeout(100)

TCP = transports(["tcp"])
ALL = transports(["shared_memory", "tcp"])
LAST = (1 << 62) - 1


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
    caplog.set_level(logging.INFO)
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
