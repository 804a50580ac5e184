"""What is said on the socket of a cache by processes that do not keep to the protocol."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given as examples
from hypothesis import strategies as st

from support.caches import await_held, given, handed, request_for, running, socket_of
from support.sources import IDENTITY, SHORT, SMALL, Tensors
from support.wait import wait_until
from vllm_ascend.model_loader.netloader.cache import asking, messages, place
from vllm_ascend.model_loader.netloader.cache.contents import Contents
from vllm_ascend.model_loader.netloader.cache.line import Line
from vllm_ascend.model_loader.netloader.cache.messages import (
    Ask,
    CacheMessage,
    Coming,
    Drop,
    Give,
    Hand,
    Lack,
    Over,
    TakeOver,
    Want,
    decode,
    encode,
)
from vllm_ascend.model_loader.netloader.cache.process import Cache
from vllm_ascend.model_loader.netloader.errors import PeerError, ProtocolError
from vllm_ascend.model_loader.netloader.transport.base import Timeouts

pytestmark = pytest.mark.timeout(120)
WANT = Want(request_for().identity, request_for().coordinates, SMALL.manifest.digest)
NOTE = Contents(request_for()).note
SAID = (WANT, Hand(NOTE), Ask(), Drop("x"), TakeOver(), Over(), Coming(3), Lack("x"))


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@examples(st.binary(max_size=200))
def test_whatever_comes_is_a_message_or_a_protocol_error(data: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        assert isinstance(decode(data), CacheMessage)


@examples(st.sampled_from(SAID), st.integers(0, 10_000), st.integers(0, 255))
def test_a_message_with_another_byte_is_a_message_or_a_protocol_error(
    message: CacheMessage, place: int, value: int
) -> None:
    data = bytearray(encode(message))
    data[place % len(data)] = value
    with contextlib.suppress(ProtocolError):
        said = decode(bytes(data))
        if isinstance(said, Hand):
            Contents.told_by(said.note)


@pytest.mark.parametrize("message", SAID, ids=lambda message: type(message).__name__)
def test_a_message_comes_as_it_was_sent(message: CacheMessage) -> None:
    assert decode(encode(message)) == message


def test_a_peer_of_another_protocol_is_refused() -> None:
    with pytest.raises(ProtocolError, match="speaks version 99 of the cache's protocol: expected 1"):
        decode(encode(msgspec.structs.replace(WANT, protocol=99)))


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    with running(tmp_path) as cache:
        assert handed(socket_of(tmp_path))
        await_held(cache)
        yield cache


def connected(tmp_path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(socket_of(tmp_path)))
    sock.settimeout(20)
    return sock


def frame(message: CacheMessage) -> bytes:
    data = encode(message)
    return struct.pack("!I", len(data)) + data


def test_frames_that_are_almost_right_end_nothing_but_their_connection(tmp_path: Path, cache: Cache) -> None:
    chance, before = random.Random(7), open_descriptors()
    whole = [message for message in SAID if not isinstance(message, TakeOver | Drop)]
    for _ in range(300):
        data = bytearray(frame(chance.choice(whole)))
        for _ in range(chance.randrange(3)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        with connected(tmp_path) as sock:
            descriptors = [sock.fileno()] * chance.choice((0, 0, 1, 2, 20))
            socket.send_fds(sock, [data[: chance.randrange(1, len(data) + 1)]], descriptors)
    wait_until(lambda: open_descriptors() <= before)
    assert given(socket_of(tmp_path)) is not None


def test_a_length_that_is_too_large_takes_no_memory(
    tmp_path: Path, cache: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with connected(tmp_path) as sock:
        sock.sendall(struct.pack("!I", messages.FRAME_LIMIT + 1))
        assert sock.recv(1) == b""
    assert f"has {messages.FRAME_LIMIT + 1} bytes: at most {messages.FRAME_LIMIT}" in caplog.text


def test_who_says_nothing_keeps_nobody_waiting(tmp_path: Path, cache: Cache) -> None:
    silent = [connected(tmp_path) for _ in range(20)]
    assert given(socket_of(tmp_path)) is not None
    for sock in silent:
        sock.close()


@pytest.mark.parametrize("message", [Lack("x"), Over(), Coming(1)], ids=lambda message: type(message).__name__)
def test_what_only_a_cache_says_is_no_question(tmp_path: Path, cache: Cache, message: CacheMessage) -> None:
    with connected(tmp_path) as sock:
        sock.sendall(frame(message))
        assert sock.recv(1) == b""


def test_a_note_that_contradicts_itself_is_not_taken(tmp_path: Path, cache: Cache) -> None:
    for note in (
        msgspec.structs.replace(NOTE, manifest=b"garbage"),
        msgspec.structs.replace(NOTE, digests=b"x" * 31),
        msgspec.structs.replace(NOTE, manifest=Tensors.of_shapes((1 << 20,)).manifest.encoded),
    ):
        with Line(connected(tmp_path)) as line:
            line.send(Hand(note), 5, cache.shelf.items()[0].pages.descriptor)  # type: ignore[union-attr]
            with contextlib.suppress(PeerError), line.receive(5) as received:
                assert isinstance(received.message, Lack)
    assert len(cache.shelf.items()) == 1


def test_descriptors_that_nobody_takes_are_closed(tmp_path: Path, cache: Cache) -> None:
    before = open_descriptors()
    for count in (1, 3, 8, 60):
        with connected(tmp_path) as sock:
            socket.send_fds(sock, [frame(Ask())], [sock.fileno()] * count)
            sock.recv(1 << 20)
    wait_until(lambda: open_descriptors() <= before)


Answering = Callable[[Line], object]


@pytest.fixture
def impostor(tmp_path: Path) -> Iterator[Callable[[Answering], Path]]:
    """A process of this user that has the place of the cache, and answers one question as it likes."""
    directory = tmp_path / "cache"
    directory.mkdir(mode=0o700)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(directory / place.SOCKET_NAME))
    listener.listen()
    threads = []

    def start(answer: Answering) -> Path:
        def run() -> None:
            with Line(listener.accept()[0]) as line:
                with contextlib.suppress(PeerError, OSError), line.receive(20):
                    answer(line)

        threads.append(threading.Thread(target=run, daemon=True))
        threads[-1].start()
        return directory / place.SOCKET_NAME

    yield start
    listener.close()
    for thread in threads:
        thread.join(20)


def note_of(tensors: Tensors, fingerprint: str = IDENTITY.fingerprint) -> Contents:
    store = tensors.store()
    assert store.digests is not None
    return Contents(request_for(tensors, fingerprint=fingerprint), {}, store.digests.all())


def sealed() -> int:
    store = SMALL.store()
    assert store.memory.descriptor is not None
    return os.dup(store.memory.descriptor)


def test_an_engine_takes_nothing_but_what_it_has_asked_for(
    impostor: Callable[[Answering], Path], caplog: pytest.LogCaptureFixture
) -> None:
    others = Tensors.of_shapes((8, 16), (5,), (33, 7))
    no_digests = msgspec.structs.replace(note_of(SMALL).note, digests=b"")
    wrong = {
        "fingerprint (here": Give(note_of(SMALL, fingerprint="other").note),
        "the tensors differ": Give(note_of(others).note),
        "tells no digests": Give(no_digests),
        "Give came with 0 descriptors": Give(note_of(SMALL).note),
        "the cache answered with Over": Over(),
    }
    for reason, answer in wrong.items():
        descriptor = None if "came with" in reason or isinstance(answer, Over) else sealed()
        before, answer_it = open_descriptors(), (lambda line, a=answer, d=descriptor: line.send(a, 5, d))
        assert asking.ask(impostor(answer_it), request_for(), SHORT) is None
        assert reason in caplog.text
        assert open_descriptors() <= before + 1


def test_an_engine_leaves_a_cache_that_is_silent(
    impostor: Callable[[Answering], Path], caplog: pytest.LogCaptureFixture
) -> None:
    done = threading.Event()
    path = impostor(lambda _: done.wait(30))
    assert asking.ask(path, request_for(), Timeouts(5.0, 0.3)) is None
    done.set()
    assert "is not used: the peer was silent for 0.3 s" in caplog.text


def test_an_engine_takes_no_pages_that_can_still_be_changed(
    impostor: Callable[[Answering], Path], caplog: pytest.LogCaptureFixture
) -> None:
    descriptor = os.memfd_create("not sealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, 4096)
    path = impostor(lambda line: line.send(Give(note_of(SMALL).note), 5, descriptor))
    assert asking.ask(path, request_for(), SHORT) is None
    assert "is not sealed against change" in caplog.text
    os.close(descriptor)
