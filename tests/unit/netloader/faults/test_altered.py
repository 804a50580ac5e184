"""Bytes that change on the way, at the socket: weights are fetched again, and no altered frame is believed."""

from __future__ import annotations

import random

import pytest

from support.peers.faults import (
    ACCESS,
    BOTH_SIDES,
    CHUNK,
    GREETING,
    IMPATIENT,
    NBYTES,
    TCP,
    WEIGHTS,
    WITH_TOKEN,
    payload,
    said,
    source,
    why_left,
)
from support.peers.proxy import Effect, Fault, Stream, flip, insert, lose_a_byte, repeat_a_byte
from support.sources import SMALL, fetch, serving
from vllm_ascend.model_loader.netloader.transport.base import Timeouts
from vllm_ascend.model_loader.netloader.transport.chunks.delivery import TRIES_PER_CHUNK
from vllm_ascend.model_loader.netloader.wire.access import Access
from vllm_ascend.model_loader.netloader.wire.conversation import frame
from vllm_ascend.model_loader.netloader.wire.messages import Challenge, Prove, Welcome

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("small_scale", "nothing_is_left_behind")]


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
