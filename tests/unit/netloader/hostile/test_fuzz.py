"""Frames that are almost right, thrown at everything that reads frames: nothing breaks but the session they came in."""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import socket
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.certificates import Authority
from support.corpus import GARBAGE, LIMITS, SAID_BY, Corpus
from support.impostor import Act, Impostor, Misbehaved, answering, hanging_up, resetting, saying, sending, silent
from support.messages import SESSION, payload, tag
from support.sources import SMALL, Tensors, client_for, fetch, serving
from support.strangers import Intruder, Line, is_idle, many_hosts, netloader_threads
from support.wait import wait_until
from vllm_ascend.model_loader.netloader.client import connections
from vllm_ascend.model_loader.netloader.client.inquiry import inquire
from vllm_ascend.model_loader.netloader.client.order import REFERRALS_FOLLOWED, TRIES
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import PeerError, ProtocolError, SourceError, SourcesExhausted
from vllm_ascend.model_loader.netloader.transport.base import Timeouts, Transport
from vllm_ascend.model_loader.netloader.transport.digests import BLAKE3, CHUNK_BYTES
from vllm_ascend.model_loader.netloader.transport.registry import transports
from vllm_ascend.model_loader.netloader.weights.identity import Difference
from vllm_ascend.model_loader.netloader.wire.access import Access
from vllm_ascend.model_loader.netloader.wire.channel import Channel, Deadline
from vllm_ascend.model_loader.netloader.wire.conversation import Conversation, Role, State
from vllm_ascend.model_loader.netloader.wire.messages import (
    DIFFERENCES_LIMIT,
    REFERRALS_LIMIT,
    REPLY_LIMIT,
    Accept,
    Challenge,
    Confirm,
    Digests,
    End,
    Fetch,
    Gather,
    Message,
    Publish,
    Refuse,
    Status,
    Wait,
    Welcome,
)

KEY = bytes(range(32))
TOKEN = b"a token of thirty-two bytes long"
FRAMES = 100_000
TRACED = 1000
"""Frames under the eyes of tracemalloc, which takes its time."""
LINE_LIMIT = 12_000
"""Characters in a line of the log: a refusal names up to eight tensors."""
TCP = transports(["tcp"])
PATIENT = Timeouts(connect=20.0, stall=20.0)
IMPATIENT = Timeouts(connect=0.15, stall=0.15)


def other(role: Role) -> Role:
    return Role.SERVER if role is Role.CLIENT else Role.CLIENT


def listening(role: Role, state: State, key: bytes | None) -> Conversation:
    """An end that has come to `state`."""
    end = Conversation(role)
    end.state = state
    if key is not None:
        end.authenticate(key)
    return end


def outcome(end: Conversation) -> str:
    """What an end makes of all that it was fed: nothing but messages and ProtocolErrors come out."""
    heard = "waits for more"
    try:
        while (message := end.next_message()) is not None:
            heard = type(message).__name__
    except PeerError as error:
        return next(kind for kind in FAULTS if kind in str(error))
    return heard


FAULTS = ("is no message", " in state ", "announces a frame of", "was altered on the way")


@pytest.mark.parametrize("key", [None, KEY], ids=["without a key", "with a key"])
@pytest.mark.parametrize("role", Role, ids=lambda role: role.value)
def test_of_100_000_frames_nothing_comes_but_messages_and_protocol_errors_and_no_memory_stays(
    role: Role, key: bytes | None
) -> None:
    speaker, outcomes = other(role), Counter[str]()
    corpus, states = Corpus(1, speaker), list(State)

    def hear(count: int) -> None:
        for _ in range(count):
            content = corpus.content()
            ending = tag(key, speaker, 0, content) if corpus.random.random() < 0.9 else corpus.random.randbytes(16)
            end = listening(role, corpus.random.choice(states), key)
            end.feed(corpus.stream(content + ending))
            outcomes[outcome(end)] += 1

    hear(FRAMES // 4 - 2 * TRACED)
    tracemalloc.start()
    try:
        hear(TRACED)
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        hear(TRACED)
        gc.collect()
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 64 << 10
    assert peak - before < 1 << 20
    assert outcomes.keys() == set(FAULTS) | {"waits for more"} | {type(each).__name__ for each in SAID_BY[speaker]}


@pytest.mark.parametrize("role", Role, ids=lambda role: role.value)
def test_of_a_frame_above_the_limit_no_more_is_kept_than_one_read(role: Role) -> None:
    ours, theirs = socket.socketpair()
    with Channel(ours, role) as channel, theirs:
        data = (LIMITS[other(role)] + 1).to_bytes(4, "big") + bytes(8 << 20)
        flood = threading.Thread(target=_send_all, args=(theirs, data))
        flood.start()
        tracemalloc.start()
        try:
            with pytest.raises(ProtocolError, match="announces a frame of"):
                channel.receive(Deadline(20))
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
            channel.close()
            flood.join()
    assert peak < 1 << 20


def _send_all(sock: socket.socket, data: bytes) -> None:
    with contextlib.suppress(OSError):  # the other end has heard enough
        sock.sendall(data)


def heard(end: Conversation, pieces: Iterable[bytes]) -> tuple[list[Message], str]:
    """The messages, and how it ended."""
    messages: list[Message] = []
    try:
        for piece in pieces:
            end.feed(piece)
            while (message := end.next_message()) is not None:
                messages.append(message)
    except PeerError as error:
        return messages, str(error)
    return messages, ""


@given(
    role=st.sampled_from(Role),
    state=st.sampled_from(State),
    key=st.sampled_from([None, KEY]),
    seed=st.integers(0, 1 << 32),
    cuts=st.lists(st.integers(0, 2000), max_size=5),
)
def test_how_a_stream_is_cut_does_not_change_what_is_heard(
    role: Role, state: State, key: bytes | None, seed: int, cuts: list[int]
) -> None:
    corpus = Corpus(seed, other(role))
    contents = [*map(payload, corpus.random.sample(SAID_BY[other(role)], 2)), corpus.content()]
    stream = b"".join(
        corpus.stream(content + tag(key, other(role), number, content)) for number, content in enumerate(contents)
    )
    places = sorted({0, len(stream), *(cut % (len(stream) + 1) for cut in cuts)})
    pieces = [stream[begin:end] for begin, end in itertools.pairwise(places)]
    whole = heard(listening(role, state, key), [stream])
    assert heard(listening(role, state, key), pieces) == whole


# The same at a live server, over real sockets.


def accesses(directory: Path) -> dict[str, Access]:
    tls = Authority(directory, "ours").identify("instance").access()
    return {"nobody is asked": Access(), "token": Access(TOKEN), "TLS": tls}


@pytest.fixture(params=["nobody is asked", "token", "TLS"])
def access(request: pytest.FixtureRequest, tmp_path: Path) -> Access:
    return accesses(tmp_path)[request.param]


Stage = Callable[[Endpoint, Access, str], contextlib.AbstractContextManager[Line]]


@contextlib.contextmanager
def before_the_greeting(source: Endpoint, access: Access, host: str) -> Iterator[Line]:
    with Intruder(source, host, access) as line:
        yield line


@contextlib.contextmanager
def before_tls(source: Endpoint, access: Access, host: str) -> Iterator[Line]:
    with Intruder(source, host) as line:
        yield line


@contextlib.contextmanager
def greeted(source: Endpoint, access: Access, host: str) -> Iterator[Line]:
    with Intruder(source, host, access) as line:
        yield line.greet()


@contextlib.contextmanager
def in_a_session(source: Endpoint, access: Access, host: str) -> Iterator[Line]:
    with Intruder(source, host, access) as line:
        line.greet().accepted()
        yield line


@contextlib.contextmanager
def attached(source: Endpoint, access: Access, host: str) -> Iterator[Line]:
    with Intruder(source, host, access) as control, Intruder(source, host, access) as line:
        session = control.greet().accepted()
        line.greet().attach(session).say(Fetch(0, SMALL.manifest.nbytes)).read(SMALL.manifest.nbytes)
        yield line


@contextlib.contextmanager
def gathering(source: Endpoint, access: Access, host: str) -> Iterator[Line]:
    with Intruder(source, host, access) as line:
        line.greet().accepted("process_group")
        line.say(Gather()).hear_kind(Publish)
        yield line


STAGES: tuple[Stage, ...] = (before_tls, before_the_greeting, greeted, in_a_session, attached, gathering)


def test_a_server_outlives_whatever_is_said_to_it(access: Access, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    corpus, hosts = Corpus(2, Role.CLIENT), many_hosts()
    kinds = transports(["shared_memory", "tcp", "process_group"])
    with serving(SMALL, kinds, timeouts=PATIENT, access=access) as (server, source):
        for stage in itertools.chain.from_iterable(itertools.repeat(STAGES, 30)):
            with stage(source, access, next(hosts)) as line, contextlib.suppress(OSError):
                for _ in range(corpus.random.randint(1, 5)):
                    line.send(_some_bytes(corpus, line))
                corpus.random.choice((line.reset, line.socket.close, lambda line=line: _finish(line)))()
        wait_until(lambda: is_idle(server))
        _, fetched = fetch(SMALL, TCP, source, access=access)
        SMALL.assert_in(fetched.memory)
    assert_orderly(caplog)


def _some_bytes(corpus: Corpus, line: Line) -> bytes:
    match corpus.random.randrange(8):
        case 0:
            return corpus.random.choice(GARBAGE)
        case 1 | 2:
            return corpus.stream(_whole(corpus.content(), Role.CLIENT))
        case 3:
            return line.tagged(payload(corpus.random.choice(SAID_BY[Role.CLIENT])))
        case _:
            return line.tagged(corpus.content())


def _whole(content: bytes, role: Role) -> bytes:
    """With what it ends in where nobody is asked for a token."""
    return content + tag(None, role, 0, content)


def _finish(line: Line) -> None:
    """Says no more, and waits for the server to have enough."""
    line.socket.shutdown(socket.SHUT_WR)
    line.hear_out()


def assert_orderly(caplog: pytest.LogCaptureFixture) -> None:
    """Whether all that went wrong was put down to the peer, in lines that can be read."""
    messages = [record.getMessage() for record in caplog.records]
    assert not [record.getMessage() for record in caplog.records if record.exc_info or record.levelno > logging.WARNING]
    assert not [message for message in messages if "an error of this server" in message]
    assert not [message[:200] for message in messages if len(message) > LINE_LIMIT or not message.isprintable()]


# The same at a client: whatever a source answers, the client has all bytes right, or says why it has none.


def outlives(impostor: Impostor, tensors: Tensors = SMALL, kinds: Sequence[Transport] = TCP, **terms: Any) -> str:
    """How a client ends that asks `impostor`: with every byte right, or with one line for each attempt."""
    client = client_for(tensors, kinds, **{"timeouts": PATIENT, **terms})
    reasons: tuple[str, ...] = ()
    try:
        fetched = client.fetch([impostor.endpoint])
    except SourcesExhausted as error:
        reasons = error.reasons
    else:
        tensors.assert_in(fetched.memory)
        fetched.memory.close()
    assert not [reason[:200] for reason in reasons if len(reason) > LINE_LIMIT or not reason.isprintable()]
    wait_until(lambda: not netloader_threads())
    return "\n".join(reasons)


@pytest.fixture(autouse=True)
def brief_explanations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Impostors have nothing to explain when they break off, and time goes by while a client listens for it."""
    monkeypatch.setattr(connections, "EXPLANATION_SECONDS", 0.02)


STEPS = ("Hello", "Join", "AskDigests", "Fetch", "Done")


def test_an_impostor_that_behaves_is_a_source_like_any_other() -> None:
    tensors = Tensors.of_shapes((CHUNK_BYTES // 4,), (300,))
    with Impostor({}, tensors) as impostor:
        assert outlives(impostor, tensors) == ""
    assert set(impostor.heard) == {*STEPS, "Attach"}


def once_behaved(times: int, act: Act, then: Act) -> Act:
    """Does `act`, and from the time after `times` on, `then`."""
    counter = itertools.count()

    def next_act(line: Line, heard: dict[str, Any]) -> None:
        (act if next(counter) < times else then)(line, heard)

    return next_act


@pytest.mark.parametrize("step", STEPS)
def test_a_client_outlives_whatever_is_answered(step: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    corpus, failed = Corpus(3, Role.SERVER), 0
    for _ in range(60):
        with Impostor({}) as impostor:
            behaving = impostor.acts[step]
            strange = sending(_some_answer(corpus, impostor.right_answer(step)))
            impostor.acts[step] = once_behaved(corpus.random.choice((0, 0, 1)), behaving, strange)
            failed += bool(outlives(impostor))
    assert failed > 20
    assert_orderly(caplog)


def _some_answer(corpus: Corpus, right: Message | None) -> bytes:
    """Bytes instead of the right message, or of weights where that is None."""
    if right is None:
        return corpus.random.randbytes(corpus.random.randrange(2 * SMALL.manifest.nbytes))
    match corpus.random.randrange(8):
        case 0:
            return corpus.random.choice(GARBAGE)
        case 1:
            return corpus.stream(_whole(corpus.content(), Role.SERVER))
        case _:
            return corpus.stream(_whole(corpus.content(payload(right)), Role.SERVER))


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


@pytest.mark.timeout(60)
@pytest.mark.parametrize("step", ["Hello", "Join", "AskDigests", "Done"])
@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS.keys())
def test_a_client_gives_up_a_source_that_answers(step: str, answer: Act, caplog: pytest.LogCaptureFixture) -> None:
    with Impostor({step: answer}) as impostor:
        assert outlives(impostor, timeouts=IMPATIENT)
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


def accepting(transport: str = "tcp", digest: str = BLAKE3, **parameters: str | int) -> Accept:
    return Accept(SESSION, 1, transport, parameters, digest=digest)


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
    "too many digests": ("AskDigests", Digests((bytes(32),) * 100_000), "Expected `array` of length <= 64"),
    "empty digests": ("AskDigests", Digests((b"",)), "expected 1 of 32 bytes each"),
    "short digests": ("AskDigests", Digests((bytes(16),)), "expected 1 of 32 bytes each"),
    "other digests": ("AskDigests", Digests((bytes(32),)), "arrived damaged 3 times"),
    "another generation": ("Done", Confirm((1 << 62) - 1, ""), "its weights changed during the transfer"),
    "no root": ("Done", Confirm(1, ""), "the root digest that it confirms is not the one of its chunks"),
    "another root": ("Done", Confirm(1, "5eed" * 16), "the root digest that it confirms"),
    "a refusal of data connections": ("Attach", Refuse(NULL), "it refused a data connection: no????[2Jthing??"),
    "an end instead of digests": ("AskDigests", End(NULL), "it ended the session: no????[2Jthing??"),
    "an end instead of a confirmation": ("Done", End(NULL), "it ended the session: no????[2Jthing??"),
    "another protocol": ("Hello", Welcome((1 << 62) - 1), "it speaks protocol 4611686018427387903: expected 1"),
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


WRONG_PARAMETERS: dict[str, tuple[str, dict[str, str | int]]] = {
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
    transport: str, parameters: dict[str, str | int], caplog: pytest.LogCaptureFixture
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


SMALL_ROOT = SMALL.store().root()


def waiting(*referrals: str) -> Act:
    """Tells a client for ever that it is not its turn, and that others have what it wants."""

    def act(line: Line, _: dict[str, Any]) -> None:
        while True:
            line.say(Wait(1, referrals, SMALL_ROOT, "f00d"))
            time.sleep(0.01)

    return act


@pytest.mark.timeout(60)
def test_a_client_does_not_wait_for_ever() -> None:
    with Impostor({"Join": waiting()}) as impostor:
        assert "its turns were taken for WAIT_TIMEOUT" in outlives(impostor, wait_timeout=0.3)


@pytest.mark.timeout(60)
def test_a_client_does_not_wait_for_a_source_that_falls_silent() -> None:
    with Impostor({"Join": answering(Wait(1))}) as impostor:
        assert "the peer was silent for" in outlives(impostor, timeouts=IMPATIENT)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("refer", [waiting, lambda *others: answering(Refuse("not here", referrals=others))])
def test_a_client_does_not_go_in_a_circle(refer: Callable[..., Act]) -> None:
    with Impostor({}) as first, Impostor({}) as second, Impostor({}) as third:
        circle = [str(impostor.endpoint) for impostor in (first, second, third)]
        for impostor in (first, second, third):
            impostor.acts["Join"] = refer(*circle)
        assert outlives(first, wait_timeout=0.1)
        everybody_heard = first.heard + second.heard + third.heard
    assert everybody_heard.count("Join") <= 3 * TRIES


NO_ENDPOINTS = (
    "",
    ":",
    ":0",
    ":65536",
    ":-1",
    ":99999999999999999999",
    ":" + "9" * 4000,
    "[",
    "[]:1",
    "[[::1]]:1",
    "::1:1",
    "a b:1",
    "a/b:1",
    "\0:1",
    "..:1",
    "x" * 4000 + ":1",
    "\u2028:1",
    "\u0130\u0131.\u202e:1",
    f"{NULL}:1",
    "1e3:1",
    "http://127.0.0.1:1",
)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("answer", [Wait, Refuse])
def test_a_client_leaves_out_referrals_that_are_none(
    answer: type[Wait] | type[Refuse], caplog: pytest.LogCaptureFixture
) -> None:
    message = Wait(1, NO_ENDPOINTS, SMALL_ROOT) if answer is Wait else Refuse("not here", referrals=NO_ENDPOINTS)
    with Impostor({"Join": saying(message)}) as impostor:
        assert outlives(impostor)
    assert_orderly(caplog)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("answer", [Wait, Refuse])
def test_a_client_follows_a_limited_number_of_referrals(answer: type[Wait] | type[Refuse]) -> None:
    number = itertools.count()

    def refer(line: Line, _: dict[str, Any]) -> None:
        """To others at every time, where nobody is."""
        others = tuple(f"127.9.{n // 250}.{n % 250 + 1}:{port}" for n in itertools.islice(number, REFERRALS_LIMIT // 2))
        line.say(Wait(1, others, SMALL_ROOT) if answer is Wait else Refuse("not here", referrals=others))
        if next(number) > REFERRALS_FOLLOWED:
            raise Misbehaved

    with socket.socket() as closed, Impostor({"Join": refer}) as impostor:
        closed.bind(("", 0))
        port = closed.getsockname()[1]
        reasons = outlives(impostor, timeouts=IMPATIENT).splitlines()
    followed = REFERRALS_FOLLOWED if answer is Wait else REFERRALS_LIMIT // 2
    assert sum("127.9." in reason for reason in reasons) == followed


@pytest.mark.parametrize("answer", [Wait, Refuse])
def test_a_client_does_not_take_referrals_without_end(answer: type[Wait] | type[Refuse]) -> None:
    referrals = (":1",) * (REFERRALS_LIMIT + 1)
    message = Wait(1, referrals) if answer is Wait else Refuse("not here", referrals=referrals)
    with Impostor({"Join": saying(message)}) as impostor:
        assert "is no message" in outlives(impostor)


@pytest.mark.parametrize("answer", [Wait, Refuse])
def test_a_client_does_not_take_a_referral_of_a_million_characters(answer: type[Wait] | type[Refuse]) -> None:
    referrals = ("x" * 1_000_000 + ":19000",)
    message = Wait(1, referrals) if answer is Wait else Refuse("not here", referrals=referrals)
    with Impostor({"Join": saying(message)}) as impostor:
        assert "is no message" in outlives(impostor)


def test_who_inquires_outlives_whatever_is_answered() -> None:
    corpus, status = Corpus(4, Role.SERVER), next(each for each in SAID_BY[Role.SERVER] if isinstance(each, Status))
    faults: list[str] = []
    for _ in range(150):
        with Impostor({"Inquire": sending(_some_answer(corpus, status))}) as impostor:
            try:
                assert isinstance(inquire(impostor.endpoint, 20), Status)
            except SourceError as error:
                faults.append(str(error))
    assert len(faults) > 50
    assert not [fault[:200] for fault in faults if len(fault) > LINE_LIMIT or not fault.isprintable()]
