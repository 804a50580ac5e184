"""Sources that answer wrongly: a client has all bytes right, or says in a line why it has none."""

from __future__ import annotations

import time
from typing import Any

import msgspec
import pytest

from support.logs import assert_orderly
from support.peers.corpus import GARBAGE, SAID_BY
from support.peers.impostor import (
    Act,
    Impostor,
    accepting,
    answering,
    hanging_up,
    outlives,
    resetting,
    saying,
    sending,
    silent,
)
from support.peers.messages import SESSION
from support.peers.strangers import Line
from support.sources import SMALL, Tensors
from vllm_ascend.model_loader.netloader.transport.base import Timeouts
from vllm_ascend.model_loader.netloader.transport.digests import CHUNK_BYTES
from vllm_ascend.model_loader.netloader.transport.registry import transports
from vllm_ascend.model_loader.netloader.weights.identity import Difference
from vllm_ascend.model_loader.netloader.wire.conversation import Role
from vllm_ascend.model_loader.netloader.wire.messages import (
    DIFFERENCES_LIMIT,
    REPLY_LIMIT,
    Accept,
    Challenge,
    Confirm,
    Digests,
    End,
    Message,
    News,
    Refuse,
    Welcome,
)

pytestmark = pytest.mark.usefixtures("brief_explanations")

IMPATIENT = Timeouts(connect=0.15, stall=0.15)


def test_an_impostor_that_behaves_is_a_source_like_any_other() -> None:
    tensors = Tensors.of_shapes((CHUNK_BYTES // 4,), (300,))
    with Impostor({}, tensors) as impostor:
        assert outlives(impostor, tensors) == ""
    assert set(impostor.heard) == {"Hello", "Join", "Attach", "AskDigests", "Follow", "Fetch", "Done"}


def dripping(line: Line, _: dict[str, Any]) -> None:
    """Begins a frame, and goes on with it as slowly as possible, until the peer has enough."""
    line.send((REPLY_LIMIT - 1).to_bytes(4, "big"))
    while True:
        line.send(b"\x00")
        time.sleep(0.02)


ANSWERS: dict[str, Act] = {
    "nothing, and hangs up": hanging_up,
    "a reset": resetting,
    "silence": silent,
    "a frame that does not end": dripping,
    "an empty frame": saying(b""),
    "a frame of the greatest length, cut": sending(REPLY_LIMIT.to_bytes(4, "big"), bytes(1 << 20)),
    "a frame above the limit": sending((REPLY_LIMIT + 1).to_bytes(4, "big"), bytes(1 << 20)),
    **{f"garbage {number}": sending(garbage) for number, garbage in enumerate(GARBAGE)},
    **{type(message).__name__: saying(message) for message in SAID_BY[Role.SERVER]},
    "all messages at once": saying(*SAID_BY[Role.SERVER]),
}


GONE = [
    ANSWERS[name]
    for name in (
        "nothing, and hangs up",
        "a reset",
        "silence",
        "a frame that does not end",
        "a frame of the greatest length, cut",
    )
]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("step", ["Hello", "Join", "AskDigests", "Follow", "Done"])
@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS.keys())
def test_a_client_gives_up_a_source_that_answers(step: str, answer: Act, caplog: pytest.LogCaptureFixture) -> None:
    with Impostor({step: answer}) as impostor:
        given_up = outlives(impostor, timeouts=IMPATIENT)
    # All bytes have come by then, or may come all the same, and are proven. Who is just gone has not denied them.
    if step == "Follow" and answer in GONE:
        assert given_up == "" or impostor.heard.count("Join") > 1
    elif step == "Follow":  # who has all bytes by then asks again, and has nothing to follow
        assert given_up or impostor.heard.count("Join") > 1
    else:
        assert bool(given_up) != (step == "Done" and answer in GONE)
    assert_orderly(caplog)


DELIVERIES: dict[str, Act] = {
    "nothing, and hangs up": hanging_up,
    "a reset": resetting,
    "silence": silent,
    "a part": sending(bytes(100)),
    "other bytes": lambda line, heard: line.send(bytes(heard["length"])),
    "more than was asked for": lambda line, heard: line.send(bytes(heard["length"] * 2)),
    "a message": saying(End("no more")),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("delivery", DELIVERIES.values(), ids=DELIVERIES.keys())
def test_a_client_gives_up_a_source_that_delivers(delivery: Act, caplog: pytest.LogCaptureFixture) -> None:
    with Impostor({"Fetch": delivery}) as impostor:
        assert outlives(impostor, timeouts=IMPATIENT)
    assert_orderly(caplog)


NULL = "no\0\r\n\x1b[2Jthing\u2028\u202e"
WRONG_CONTENTS: dict[str, tuple[str, Message, str]] = {
    "a transport that was not offered": ("Join", accepting("in_process"), "'in_process', which was not offered"),
    "a transport that is none": ("Join", accepting(NULL), "which was not offered"),
    "another checkpoint": (
        "Join",
        msgspec.structs.replace(accepting(), fingerprint=NULL),
        "it accepted, but serves a checkpoint with the fingerprint no????[2Jthing??",
    ),
    "no digests": ("Join", Accept(SESSION, 1, "tcp", {}), "it has no digests"),
    "digests of an unknown kind": ("Join", accepting(digest=NULL), "its digests are 'no"),
    "digests that accidents only cannot pass": ("Join", accepting(digest="xxh3_128"), "its digests are 'xxh3_128'"),
    "too few digests": ("AskDigests", Digests(()), "the source sent 0 digests: expected 1"),
    "too many digests": ("AskDigests", Digests((bytes(32),) * 100_000), "Expected `array` of length <= 256"),
    "empty digests": ("AskDigests", Digests((b"",)), "expected 1 of 32 bytes each"),
    "short digests": ("AskDigests", Digests((bytes(16),)), "expected 1 of 32 bytes each"),
    "other digests": ("AskDigests", Digests((bytes(32),)), "arrived damaged 3 times"),
    "another generation": ("Done", Confirm((1 << 62) - 1, ""), "its weights changed during the transfer"),
    "no root": ("Done", Confirm(1, ""), "the root digest that it confirms is not the one of its chunks"),
    "another root": ("Done", Confirm(1, "5eed" * 16), "the root digest that it confirms"),
    "a refusal of data connections": ("Attach", Refuse(NULL), "it refused a data connection: no????[2Jthing??"),
    "an end instead of digests": ("AskDigests", End(NULL), "it ended the session: no????[2Jthing??"),
    "an end instead of a confirmation": ("Done", End(NULL), "it ended the session: no????[2Jthing??"),
    "another protocol": ("Hello", Welcome((1 << 62) - 1), "it speaks protocol 4611686018427387903: expected 2"),
    "a wish for a token": ("Hello", Challenge(b""), "it wants a token"),
    "a refusal": ("Join", Refuse(NULL), "it refused: no????[2Jthing??"),
    "a refusal at once": ("Hello", Refuse(NULL), "it refused: no????[2Jthing??"),
}


@pytest.mark.parametrize(("step", "message", "reason"), WRONG_CONTENTS.values(), ids=WRONG_CONTENTS.keys())
def test_a_client_says_what_was_wrong(
    step: str, message: Message, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with Impostor({step: answering(message)}) as impostor:
        assert reason in outlives(impostor)
    assert_orderly(caplog)


def test_an_end_during_the_transfer_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with Impostor({}) as impostor:
        control: list[Line] = []
        join = impostor.acts["Join"]
        impostor.acts["Join"] = lambda line, heard: (control.append(line), join(line, heard))
        impostor.acts["Fetch"] = lambda line, _: (control[-1].say(End(NULL)), line.reset())
        assert "it ended the session: no????[2Jthing??" in outlives(impostor)
    assert_orderly(caplog)


WRONG_PARAMETERS: dict[str, tuple[str, dict[str, Any]]] = {
    "no socket": ("shared_memory", {}),
    "a socket that is a number": ("shared_memory", {"socket": 7}),
    "an empty socket": ("shared_memory", {"socket": ""}),
    "a socket that nobody has": ("shared_memory", {"socket": "netloader-nobody"}),
    "a socket of control characters": ("shared_memory", {"socket": NULL}),
    "a socket without end": ("shared_memory", {"socket": "x" * 4096}),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("transport", "parameters"), WRONG_PARAMETERS.values(), ids=WRONG_PARAMETERS.keys())
def test_a_client_gives_up_a_source_with_parameters(
    transport: str, parameters: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with Impostor({"Join": answering(accepting(transport, **parameters))}) as impostor:
        assert outlives(impostor, kinds=transports([transport]), timeouts=Timeouts(1, 1))
    assert_orderly(caplog)


def manifest(*specs: tuple[Any, ...]) -> bytes:
    return msgspec.msgpack.encode([specs, []])


SPOILT_MANIFESTS: dict[str, bytes] = {
    "noise": bytes(range(256)),
    "an extension type": msgspec.msgpack.encode(msgspec.msgpack.Ext(-1, b"no time")),
    "nesting": b"\x91" * 50_000 + b"\xc0",
    "tensors without end": b"\x92\xdd\xff\xff\xff\xff",
    "a name of a million characters": manifest(("\u2028" * 1_000_000, "float33", [1], [1], 0)),
    "a name of control characters": manifest((NULL, "float32", [2], [1], 0), (NULL, "float32", [2], [1], 64)),
    "a type of a million characters": manifest(("w0", "f" * 1_000_000, [1], [1], 0)),
    "a million dimensions": manifest(("w0", "float32", [1] * 1_000_000, [1] * 1_000_000, 0)),
    "strides without end": manifest(("w0", "float32", [1], [1] * 1_000_000, 0)),
    "negative sizes": manifest(("w0", "float32", [-1, -1], [1, 1], 0)),
    "sizes beyond memory": manifest(("w0", "float32", [(1 << 64) - 1] * 64, [1] * 64, 0)),
    "other tensors without end": manifest(*((f"{NULL}{n}", "float32", [1], [1], 64 * n) for n in range(50_000))),
    "our own": SMALL.manifest.encoded,
}


@pytest.mark.parametrize("manifest", SPOILT_MANIFESTS.values(), ids=SPOILT_MANIFESTS.keys())
def test_a_client_tells_in_short_what_differs_in_a_manifest_of(
    manifest: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with Impostor({"Join": answering(Refuse("the tensors differ", (), manifest))}) as impostor:
        assert outlives(impostor)
    assert_orderly(caplog)


@pytest.mark.parametrize("step", ["Hello", "Join"])
def test_a_client_tells_in_short_of_differences_without_end(step: str, caplog: pytest.LogCaptureFixture) -> None:
    difference = Difference(NULL, "x" * 1000, "y" * 1000)
    with Impostor({step: answering(Refuse("no", (difference,) * DIFFERENCES_LIMIT))}) as impostor:
        assert "it refused: no" in outlives(impostor)
    assert_orderly(caplog)


def test_a_source_that_is_not_sure_of_its_digests_and_goes_has_vouched_for_nothing() -> None:
    """It tells digests, but neither the root nor that it is whole: it may still find that its weights were changed."""
    unsure: dict[str, Act] = {"Follow": saying(News())}
    gone: dict[str, Act] = {"Done": hanging_up}
    with Impostor(gone) as impostor:
        assert outlives(impostor, timeouts=IMPATIENT) == ""
    with Impostor(unsure | gone) as impostor:
        assert outlives(impostor, timeouts=IMPATIENT)
