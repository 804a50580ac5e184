"""Handshakes that break or fall silent, at every message up to the first byte of weights: the next source delivers."""

from __future__ import annotations

import re

import pytest

from support.peers.faults import ACCESS, BOTH_SIDES, BROKEN, GREETING, TCP, said, source, why_left
from support.peers.proxy import Fault, Stream, close, half_close, reset, silence_all
from support.sources import SMALL, fetch, serving
from vllm_ascend.model_loader.netloader.transport.base import Timeouts
from vllm_ascend.model_loader.netloader.wire.access import Access
from vllm_ascend.model_loader.netloader.wire.conversation import frame
from vllm_ascend.model_loader.netloader.wire.messages import Attach, Welcome

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("small_scale", "nothing_is_left_behind")]

CUTS = (close, reset, half_close)


@pytest.mark.parametrize("access", ACCESS.values(), ids=ACCESS.keys())
@pytest.mark.parametrize("stream", BOTH_SIDES.values(), ids=BOTH_SIDES.keys())
def test_a_cut_at_any_byte_of_the_conversation_leads_to_the_next_source(stream: Stream, access: Access) -> None:
    step = 1 if access.token is None else 4
    with serving(SMALL, TCP, access=access) as (_, healthy):
        for at in range(0, said(stream, access), step):
            reason = why_left(Fault(stream, at, CUTS[at % len(CUTS)], connection=0), healthy, access)
            assert re.search(BROKEN, reason), f"byte {at}: {reason}"


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
