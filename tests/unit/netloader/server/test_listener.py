"""Connections of all kinds: where the server can be reached, and bad peers that end only their own connection."""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import Callable, Iterator

import pytest

from support.sources import IDENTITY, IN_PROCESS, SHORT, SMALL, fetch, serving
from support.wait import wait_until
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.server.listener import MAX_CONNECTIONS, STRANGERS_SHARE
from vllm_ascend.model_loader.netloader.server.publications import Publication
from vllm_ascend.model_loader.netloader.server.requests import Settings
from vllm_ascend.model_loader.netloader.server.server import WeightServer
from vllm_ascend.model_loader.netloader.transport.base import Timeouts
from vllm_ascend.model_loader.netloader.transport.registry import transports
from vllm_ascend.model_loader.netloader.weights.identity import RankCoordinates
from vllm_ascend.model_loader.netloader.wire.conversation import frame
from vllm_ascend.model_loader.netloader.wire.messages import (
    REQUEST_LIMIT,
    Hello,
    Join,
    Message,
    Offer,
)


def test_ipv6_and_dual_stack() -> None:
    with serving(SMALL, IN_PROCESS, host="::1") as (_, source):
        assert fetch(SMALL, IN_PROCESS, source)[1].source.host == "::1"
    with WeightServer(None, 0, Settings(transports(["process_group"]), SHORT)) as server:
        server.publish(Publication(IDENTITY, RankCoordinates(), SMALL.store()))
        for host in ("127.0.0.1", "::1", "localhost"):
            _, fetched = fetch(SMALL, transports(["process_group"]), Endpoint(host, server.port))
            SMALL.assert_in(fetched.memory)


def test_a_port_in_use_is_an_error_at_start() -> None:
    with serving(SMALL, IN_PROCESS) as (_, source), pytest.raises(OSError, match="is bound by another socket"):
        WeightServer("127.0.0.1", source.port, Settings(IN_PROCESS, SHORT)).start()


def connected(source: Endpoint, *messages: Message) -> socket.socket:
    connection = socket.create_connection(source, timeout=5)
    for message in messages:
        connection.sendall(frame(message))
    return connection


def silent(source: Endpoint) -> Iterator[socket.socket]:
    yield connected(source)


def silent_after_hello(source: Endpoint) -> Iterator[socket.socket]:
    yield connected(source, Hello())


def silent_in_the_middle_of_a_frame(source: Endpoint) -> Iterator[socket.socket]:
    connection = connected(source, Hello())
    connection.sendall(b"\x00\x00\x10\x00half a frame")
    yield connection


def one_byte_at_a_time(source: Endpoint) -> Iterator[socket.socket]:
    connection = connected(source)
    for byte in frame(Hello()):
        connection.sendall(bytes([byte]))
    yield connection


def announces_too_much(source: Endpoint) -> Iterator[socket.socket]:
    connection = connected(source)
    connection.sendall((REQUEST_LIMIT + 1).to_bytes(4, "big"))
    yield connection


def not_utf8(source: Endpoint) -> Iterator[socket.socket]:
    connection = connected(source, Hello())
    connection.sendall(b"\x00\x00\x00\x08\x81\xa4type\xa1\xff")
    yield connection


def noise(source: Endpoint) -> Iterator[socket.socket]:
    generator = random.Random(0)
    for _ in range(50):
        connection = connected(source)
        connection.sendall(generator.randbytes(generator.randrange(200)))
        yield connection


def resets(source: Endpoint) -> Iterator[socket.socket]:
    for messages in ((), (Hello(),)):
        connection = connected(source, *messages)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
        yield connection


def joins_and_vanishes(source: Endpoint) -> Iterator[socket.socket]:
    join = Join(IDENTITY, RankCoordinates(), SMALL.manifest.digest, (Offer("in_process"),))
    yield connected(source, Hello(), join)


def many_at_once(source: Endpoint) -> Iterator[socket.socket]:
    for _ in range(MAX_CONNECTIONS // STRANGERS_SHARE - 8):
        yield connected(source)


WRONG = [
    silent,
    silent_after_hello,
    silent_in_the_middle_of_a_frame,
    one_byte_at_a_time,
    announces_too_much,
    not_utf8,
    noise,
    resets,
    joins_and_vanishes,
    many_at_once,
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
def test_a_bad_peer_ends_only_its_own_session(wrong: Callable[[Endpoint], Iterator[socket.socket]]) -> None:
    with serving(SMALL, IN_PROCESS) as (server, source):
        connections = list(wrong(source))
        _, fetched = fetch(SMALL, IN_PROCESS, source)
        SMALL.assert_in(fetched.memory)
        for connection in connections:
            connection.close()
        wait_until(lambda: not server.state().connections)


IMPATIENT = Timeouts(connect=0.3, stall=0.3)


def test_silent_peers_are_dropped_after_the_deadline() -> None:
    with serving(SMALL, IN_PROCESS, timeouts=IMPATIENT) as (server, source):
        join = Join(IDENTITY, RankCoordinates(), SMALL.manifest.digest, (Offer("in_process"),))
        connections = [connected(source), connected(source, Hello()), connected(source, Hello(), join)]
        wait_until(lambda: not server.state().connections and not server.state().sessions)
        for connection in connections:
            connection.close()
