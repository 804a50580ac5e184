"""Frames that are almost right, thrown at everything that reads frames: nothing breaks but the session they came in."""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import socket
import threading
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.certificates import Authority
from support.logs import LINE_LIMIT, assert_orderly
from support.peers.corpus import GARBAGE, LIMITS, SAID_BY, Corpus
from support.peers.impostor import Act, Impostor, outlives, sending
from support.peers.messages import other, payload, tag
from support.peers.strangers import Intruder, Line, is_idle, many_hosts
from support.sources import SMALL, fetch, serving
from support.wait import wait_until
from vllm_ascend.model_loader.netloader.client.inquiry import inquire
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import PeerError, ProtocolError, SourceError
from vllm_ascend.model_loader.netloader.transport.base import Timeouts
from vllm_ascend.model_loader.netloader.transport.registry import transports
from vllm_ascend.model_loader.netloader.wire.access import Access
from vllm_ascend.model_loader.netloader.wire.channel import Channel, Deadline
from vllm_ascend.model_loader.netloader.wire.conversation import Conversation, Role, State
from vllm_ascend.model_loader.netloader.wire.messages import Fetch, Follow, Gather, Message, News, Publish, Status

pytestmark = pytest.mark.usefixtures("brief_explanations")

KEY = bytes(range(32))
TOKEN = b"a token of thirty-two bytes long"
FRAMES = 100_000
TRACED = 1000
"""Frames under the eyes of tracemalloc, which takes its time."""
TCP = transports(["tcp"])
PATIENT = Timeouts(connect=20.0, stall=20.0)


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


@contextlib.contextmanager
def following(source: Endpoint, access: Access, host: str) -> Iterator[Line]:
    with Intruder(source, host, access) as line:
        line.greet().accepted()
        line.say(Follow(19001)).hear_kind(News)
        yield line


STAGES: tuple[Stage, ...] = (before_tls, before_the_greeting, greeted, in_a_session, attached, gathering, following)


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
    """`content` with the checksum of a frame of `role`."""
    return content + tag(None, role, 0, content)


def _finish(line: Line) -> None:
    """Says no more, and waits for the server to have enough."""
    line.socket.shutdown(socket.SHUT_WR)
    line.hear_out()


STEPS = ("Hello", "Join", "AskDigests", "Follow", "Fetch", "Done")


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
