"""Points of a conversation with a server at which a client may fall silent, be reset, or do something worse."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from support.peers.strangers import Intruder, Line
from support.sources import IDENTITY, Tensors
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.transport.digests import CHUNK_BYTES
from vllm_ascend.model_loader.netloader.transport.registry import transports
from vllm_ascend.model_loader.netloader.weights.identity import RankCoordinates
from vllm_ascend.model_loader.netloader.wire.messages import AskDigests, Fetch, Hello, Inquire, Join

LARGE = Tensors.of_shapes((8 << 20,))
"""More than the buffers of a connection hold."""
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
    return attached(source, opened).say(Fetch(0, CHUNK_BYTES), Fetch(CHUNK_BYTES, CHUNK_BYTES))


def reading_a_little(source: Endpoint, opened: contextlib.ExitStack) -> Line:
    line = attached(source, opened).say(Fetch(0, CHUNK_BYTES))
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
