"""A server behind a line with faults, and how a client of it fares."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from support.peers.proxy import Effect, Fault, Proxy, Stream
from support.sources import SMALL, Tensors, fetch, serving
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.server.server import WeightServer
from vllm_ascend.model_loader.netloader.transport.base import Timeouts
from vllm_ascend.model_loader.netloader.transport.registry import transports
from vllm_ascend.model_loader.netloader.transport.tcp import CONNECTIONS
from vllm_ascend.model_loader.netloader.wire.access import CHALLENGE_BYTES, Access
from vllm_ascend.model_loader.netloader.wire.conversation import frame
from vllm_ascend.model_loader.netloader.wire.messages import Hello

TCP = transports(["tcp"])
CHUNK = 16 << 10
WEIGHTS = Tensors.of_shapes((300_001,), (5,), (77, 1000), (20_000,))
NBYTES = WEIGHTS.manifest.nbytes
IMPATIENT = Timeouts(connect=5.0, stall=1.0)
WITH_TOKEN = Access(token=b"a token of the deployment")
ACCESS = {"without a token": Access(), "with a token": WITH_TOKEN}
BOTH_SIDES = {"what the client says": Stream.TO_SERVER, "what the server says": Stream.TO_CLIENT}
GREETING = len(frame(Hello(challenge=bytes(CHALLENGE_BYTES))))
"""Bytes of the first frame of a client."""
SILENT = "the peer was silent for 1 s"
BROKEN = "the peer closed the connection|the connection broke: (Connection reset by peer|Broken pipe)"
"""The reasons of a client whose source has gone, as a regular expression."""


def payload(percent: int, effect: Effect) -> Fault:
    """`effect` strikes when so much of WEIGHTS has passed."""
    return Fault(Stream.PAYLOAD, NBYTES * percent // 100, effect)


@contextlib.contextmanager
def source(
    *faults: Fault, tensors: Tensors = WEIGHTS, access: Access | None = None, delay: float = 0.0
) -> Iterator[tuple[Proxy, WeightServer, Endpoint]]:
    """A server of `tensors` behind a proxy with `faults`: the proxy, the server, and the server's own address."""
    with serving(tensors, TCP, access=access) as (server, address), Proxy(address, *faults, delay=delay) as proxy:
        yield proxy, server, address


def assert_little_came_twice(received: int) -> None:
    """At most 1 % of WEIGHTS came twice, and besides the chunk that each connection was taking when it broke."""
    assert received <= NBYTES * 1.01 + CONNECTIONS * CHUNK


def said(stream: Stream, access: Access | None = None) -> int:
    """How many bytes one side says on the control connection of a session that takes SMALL."""
    with source(tensors=SMALL, access=access) as (proxy, _, _):
        fetch(SMALL, TCP, proxy.endpoint, access=access or Access())
    return proxy.passed[stream, 0]


def why_left(fault: Fault, healthy: Endpoint, access: Access | None = None) -> str:
    """The reason why a source behind `fault` did not deliver SMALL, which the `healthy` one then did."""
    with source(fault, tensors=SMALL, access=access) as (proxy, _, _):
        client, fetched = fetch(SMALL, TCP, proxy.endpoint, healthy, access=access or Access())
        assert proxy.struck
    SMALL.assert_in(fetched.memory)
    fetched.memory.close()
    assert fetched.source == healthy
    (attempt,) = client.attempts
    assert attempt.source == str(proxy.endpoint)
    return attempt.reason
