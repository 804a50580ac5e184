"""Which source and which transport deliver, when others are gone, fail or are no servers of ours."""

from __future__ import annotations

import os
import socket
import threading
from dataclasses import replace
from itertools import chain, repeat

import pytest

from support.peers.impostor import CONTROL, source_that_says
from support.sources import IN_PROCESS, SHORT, SMALL, Tensors, client_for, fetch, logged, reasons, serving
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import ConnectionLost, SourcesExhausted, TransportError
from vllm_ascend.model_loader.netloader.transport.base import Reception
from vllm_ascend.model_loader.netloader.transport.chunks.delivery import Delivery
from vllm_ascend.model_loader.netloader.transport.chunks.inventory import Chunk
from vllm_ascend.model_loader.netloader.transport.digests import CHUNK_BYTES
from vllm_ascend.model_loader.netloader.transport.in_process import InProcessTransport
from vllm_ascend.model_loader.netloader.wire.conversation import frame
from vllm_ascend.model_loader.netloader.wire.messages import (
    Hello,
    Refuse,
    Welcome,
)


def test_no_source_is_exhausted_at_once() -> None:
    with pytest.raises(SourcesExhausted, match="no SOURCE is configured"):
        fetch(SMALL, IN_PROCESS)


def test_the_second_source_delivers_when_the_first_is_gone() -> None:
    with serving(SMALL, IN_PROCESS) as (_, gone):
        pass
    with serving(SMALL, IN_PROCESS) as (_, source):
        client, fetched = fetch(SMALL, IN_PROCESS, gone, source)
    assert fetched.source == source
    assert [attempt.source for attempt in client.attempts] == [str(gone)]
    SMALL.assert_in(fetched.memory)


def test_the_second_source_delivers_when_the_first_fails_midway() -> None:
    tensors = Tensors.of_shapes((CHUNK_BYTES,))
    chunks_left = chain((True, True, False), repeat(True))

    def fail_once(_: Chunk, content: bytes) -> bytes:
        if not next(chunks_left):
            raise ConnectionLost("failing at the third chunk")
        return content

    with serving(tensors, IN_PROCESS) as (_, first), serving(tensors, IN_PROCESS) as (_, second):
        client, fetched = fetch(tensors, (InProcessTransport(fail_once),), first, second)
    tensors.assert_in(fetched.memory)
    assert fetched.source == second
    assert sum(client.received.values()) == tensors.manifest.nbytes


class UnusableTransport(InProcessTransport):
    traits = replace(InProcessTransport.traits, name="unusable")

    def receive(self, reception: Reception, delivery: Delivery) -> None:
        raise TransportError("not between these machines")


def test_the_same_source_is_asked_with_the_next_transport() -> None:
    kinds = (UnusableTransport(), InProcessTransport())
    with serving(SMALL, kinds) as (_, source):
        client, fetched = fetch(SMALL, kinds, source)
    assert fetched.transport == "in_process"
    assert [(attempt.transport, attempt.reason) for attempt in client.attempts] == [
        ("unusable", "not between these machines")
    ]


def test_a_source_that_declines_is_left_for_the_next() -> None:
    with serving(SMALL, IN_PROCESS) as (server, declining), serving(SMALL, IN_PROCESS) as (_, source):
        server.decline("target", "loading set table")
        client, fetched = fetch(SMALL, IN_PROCESS, declining, source)
    assert fetched.source == source
    assert [attempt.source for attempt in client.attempts] == [str(declining)]


def test_a_source_that_accepts_and_stays_silent_is_left_after_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, serving(SMALL, IN_PROCESS) as (_, source):
        mute = Endpoint("127.0.0.1", silent.getsockname()[1])
        client, fetched = fetch(SMALL, IN_PROCESS, mute, source, timeouts=replace(SHORT, connect=0.5))
    assert fetched.source == source
    assert "it did not greet: the peer was silent" in client.attempts[0].reason


@pytest.mark.parametrize(
    "answer",
    [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x00\x00\x00\x02\xff\xff", frame(Hello()), os.urandom(64)],
    ids=["closes", "another protocol", "no message", "wrong message", "noise"],
)
def test_a_source_that_does_not_speak_the_protocol_is_left(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, serving(SMALL, IN_PROCESS) as (_, source):

        def reply() -> None:
            with listener.accept()[0] as connection:
                connection.recv(64)
                connection.sendall(answer)

        thread = threading.Thread(target=reply)
        thread.start()
        stranger = Endpoint("127.0.0.1", listener.getsockname()[1])
        client, fetched = fetch(SMALL, IN_PROCESS, stranger, source)
        thread.join()
    assert fetched.source == source
    assert len(client.attempts) == 1


@pytest.mark.parametrize("host", ["host.invalid", "a..b", "x" * 70])
def test_an_unknown_host_is_left(host: str) -> None:
    client = client_for(SMALL.request(), IN_PROCESS)
    with pytest.raises(SourcesExhausted, match="no connection"):
        client.fetch([Endpoint(host, 19000)])


def test_control_characters_of_a_refusal_reach_no_log_of_the_client(caplog: pytest.LogCaptureFixture) -> None:
    with source_that_says(Welcome(), Refuse(CONTROL)) as stranger, pytest.raises(SourcesExhausted) as error:
        fetch(SMALL, IN_PROCESS, stranger)
    assert logged(caplog, "could not load from ").isprintable()
    assert reasons(error).endswith("it refused: no?[2J??memory??for ?it")
