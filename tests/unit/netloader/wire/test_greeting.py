"""Who gets in by a token, who is kept out, and what either of them, or whoever listens in, learns.

The servers and clients are real, on real sockets. A relay between them records, and where told alters, what passes.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
from collections.abc import Callable, Iterator, Sequence

import pytest

from support.peers.access import (
    KNOWS,
    KNOWS_ANOTHER,
    MEMORY,
    MODEL,
    OPEN,
    PATIENCE,
    TCP,
    TOKEN,
    Certified,
    Relay,
    assert_no_secret,
    refusal,
    settled,
    warnings,
)
from support.peers.proxy import Stream
from support.sources import SHORT, SMALL, fetch, serving
from vllm_ascend.model_loader.netloader.client.inquiry import announce, inquire
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import (
    PeerError,
    SourceError,
    SourceFailed,
    SourceRefused,
    SourcesExhausted,
)
from vllm_ascend.model_loader.netloader.transport.base import Transport
from vllm_ascend.model_loader.netloader.wire import greeting
from vllm_ascend.model_loader.netloader.wire.access import Access, Proofs
from vllm_ascend.model_loader.netloader.wire.channel import Channel, Deadline
from vllm_ascend.model_loader.netloader.wire.conversation import Role, frame
from vllm_ascend.model_loader.netloader.wire.greeting import greet
from vllm_ascend.model_loader.netloader.wire.messages import (
    PROTOCOL_VERSION,
    Challenge,
    Hello,
    Message,
    Prove,
    Refuse,
    Welcome,
)

pytestmark = pytest.mark.timeout(60)

WAYS: dict[str, Callable[[Endpoint, Access], object]] = {
    "status": lambda source, access: inquire(source, SHORT.connect, access),
    "in_process": lambda source, access: SMALL.assert_in(fetch(SMALL, MEMORY, source, access=access)[1].memory),
    "tcp": lambda source, access: SMALL.assert_in(fetch(SMALL, TCP, source, access=access)[1].memory),
}
KINDS: Sequence[Transport] = (*MEMORY, *TCP)
ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())


@ways
def test_those_with_the_same_token_talk_to_each_other_and_never_send_it(
    caplog: pytest.LogCaptureFixture, way: Callable[[Endpoint, Access], object]
) -> None:
    with serving(SMALL, KINDS, access=KNOWS) as (_, source), Relay(source) as relay:
        way(relay.endpoint, KNOWS)
    assert warnings(caplog) == []
    assert MODEL[0] in relay.overheard  # a token hides nothing else
    assert_no_secret(relay.overheard, TOKEN, *(TOKEN[n : n + 8] for n in range(0, len(TOKEN) - 8, 4)))


@ways
def test_without_a_token_everybody_is_served(way: Callable[[Endpoint, Access], object]) -> None:
    with serving(SMALL, KINDS) as (_, source), Relay(source) as relay:
        way(relay.endpoint, OPEN)
    assert MODEL[0] in relay.overheard


def test_every_connection_has_challenges_and_a_key_of_its_own() -> None:
    with serving(SMALL, MEMORY, access=KNOWS) as (_, source), Relay(source) as relay:
        for _ in range(2):
            inquire(relay.endpoint, SHORT.connect, KNOWS)
    for stream in (Stream.TO_SERVER, Stream.TO_CLIENT):
        first, second = relay.said(stream)
        assert len(first) == len(second)
        assert first != second
        assert first[-16:] != second[-16:]  # the tag of the same last message


def test_the_wrong_token_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    with serving(SMALL, MEMORY, access=KNOWS) as (server, source), Relay(source) as relay:
        assert refusal(relay.endpoint, KNOWS_ANOTHER) == "it refused: the token is not the one of this server"
        settled(server)
    assert_no_secret(relay.overheard, TOKEN, *MODEL)
    (warning,) = warnings(caplog)
    assert warning.startswith("turned away 127.0.0.1:")
    assert warning.endswith(": it has another token")


def test_a_client_without_the_token_is_told_that_it_needs_one(caplog: pytest.LogCaptureFixture) -> None:
    with serving(SMALL, MEMORY, access=KNOWS) as (server, source), Relay(source) as relay:
        assert refusal(relay.endpoint, OPEN) == "it wants a token: set TOKEN_FILE"
        settled(server)
    assert_no_secret(relay.overheard, TOKEN, *MODEL)
    (warning,) = warnings(caplog)
    assert warning.startswith("turned away 127.0.0.1:")
    assert warning.endswith(": it does not show that it knows the token")


def test_a_server_without_the_token_is_not_believed() -> None:
    with serving(SMALL, MEMORY) as (_, source), Relay(source) as relay:
        assert refusal(relay.endpoint, KNOWS) == (
            "it has no token, and weights are not taken from just anybody: set TOKEN_FILE there too"
        )
    assert_no_secret(relay.overheard, TOKEN, *MODEL)


ASKING: dict[str, Callable[[Endpoint, float, Access], object]] = {
    "inquire": inquire,
    "announce": lambda source, timeout, access: announce(source, bytes(16), 19001, timeout, access),
}


@pytest.mark.parametrize("ask", ASKING.values(), ids=ASKING.keys())
def test_nobody_asks_or_announces_without_the_token(ask: Callable[[Endpoint, float, Access], object]) -> None:
    with serving(SMALL, MEMORY, access=KNOWS) as (_, source), Relay(source) as relay:
        for access in (OPEN, KNOWS_ANOTHER):
            with pytest.raises(SourceRefused, match="token"):
                ask(relay.endpoint, SHORT.connect, access)
    assert_no_secret(relay.overheard, *MODEL)


def test_another_version_of_the_protocol_is_refused_before_any_challenge(caplog: pytest.LogCaptureFixture) -> None:
    with serving(SMALL, MEMORY, access=KNOWS) as (server, source):
        with Channel(socket.create_connection(source), Role.CLIENT) as channel:
            channel.send(Hello(PROTOCOL_VERSION + 1, bytes(32)), PATIENCE)
            answer = channel.receive(Deadline(PATIENCE))
        settled(server)
    assert isinstance(answer, Refuse)
    assert answer.reason == "the protocol versions differ"
    (warning,) = warnings(caplog)
    assert warning.startswith("ended the connection with 127.0.0.1:")


@contextlib.contextmanager
def impostor(behave: Callable[[Channel], None]) -> Iterator[tuple[Endpoint, list[Message]]]:
    """Behaves so towards one client, as a server, and notes what else that says."""
    heard: list[Message] = []

    def serve() -> None:
        with Channel(listener.accept()[0], Role.SERVER) as channel, contextlib.suppress(PeerError):
            behave(channel)
            while True:
                heard.append(channel.receive(Deadline(PATIENCE)))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(PATIENCE)
        thread = threading.Thread(target=serve)
        thread.start()
        yield Endpoint("127.0.0.1", listener.getsockname()[1]), heard
        thread.join()


def hello_to(channel: Channel) -> Hello:
    hello = channel.receive(Deadline(PATIENCE))
    assert isinstance(hello, Hello)
    return hello


def proof_to(channel: Channel) -> bytes:
    prove = channel.receive(Deadline(PATIENCE))
    assert isinstance(prove, Prove)
    return prove.proof


def claim(proof: Callable[[Proofs, bytes], bytes]) -> Callable[[Channel], None]:
    """A server that claims to know the token, given the genuine proofs and the one that it has received."""

    def behave(channel: Channel) -> None:
        ours = secrets.token_bytes(32)
        hello = hello_to(channel)
        channel.send(Challenge(ours), PATIENCE)
        received = proof_to(channel)
        channel.send(Welcome(proof=proof(Proofs(TOKEN, hello.challenge, ours), received)), PATIENCE)

    return behave


def returning_the_challenge(channel: Channel) -> None:
    channel.send(Challenge(hello_to(channel).challenge), PATIENCE)
    channel.send(Welcome(proof=proof_to(channel)), PATIENCE)


CLAIMS: dict[str, Callable[[Channel], None]] = {
    "no proof": claim(lambda _, __: b""),
    "random bytes": claim(lambda _, __: secrets.token_bytes(32)),
    "the client's proof": claim(lambda _, received: received),
    "the client's proof for its own challenge": returning_the_challenge,
    "the beginning of the proof": claim(lambda genuine, _: genuine.server[:31]),
    "the proof and more": claim(lambda genuine, _: genuine.server + b"\0"),
    "one bit": claim(lambda genuine, _: bytes([genuine.server[0] ^ 1]) + genuine.server[1:]),
}


@pytest.mark.parametrize("behave", CLAIMS.values(), ids=CLAIMS.keys())
def test_a_server_that_only_claims_to_know_the_token_is_told_nothing(behave: Callable[[Channel], None]) -> None:
    with impostor(behave) as (source, heard):
        assert refusal(source, KNOWS) == "it does not know the token: compare TOKEN_FILE on both sides"
    assert heard == []


def test_a_server_that_knows_the_token_is_believed() -> None:
    with impostor(claim(lambda genuine, _: genuine.server)) as (source, heard):
        greet(source, KNOWS, PATIENCE).close()
    assert heard == []


def test_a_server_that_welcomes_without_a_challenge_is_told_nothing() -> None:
    def behave(channel: Channel) -> None:
        hello_to(channel)
        channel.send(Welcome(proof=secrets.token_bytes(32)), PATIENCE)

    with impostor(behave) as (source, heard):
        assert refusal(source, KNOWS).startswith("it has no token, and weights are not taken from just anybody")
    assert heard == []


def test_a_proof_that_somebody_overheard_is_worth_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with serving(SMALL, MEMORY, access=KNOWS) as (server, source):
        with Relay(source) as relay:
            inquire(relay.endpoint, SHORT.connect, KNOWS)
        (said,) = relay.said(Stream.TO_SERVER)
        with socket.create_connection(source, PATIENCE) as replay:
            replay.sendall(said)
            answers = bytearray()
            while piece := replay.recv(65536):
                answers += piece
        settled(server)
        (warning,) = warnings(caplog)
        assert warning.endswith(": it has another token")
        assert_no_secret(bytes(answers), *MODEL)
        assert answers.endswith(frame(Refuse("the token is not the one of this server")))
        assert inquire(source, SHORT.connect, KNOWS).holdings


def test_what_a_server_said_earlier_is_worth_nothing_to_an_impostor() -> None:
    with serving(SMALL, MEMORY, access=KNOWS) as (_, source), Relay(source) as relay:
        inquire(relay.endpoint, SHORT.connect, KNOWS)
    (said,) = relay.said(Stream.TO_CLIENT)
    with impostor(lambda channel: channel.socket.sendall(said)) as (source, heard):
        assert refusal(source, KNOWS) == "it does not know the token: compare TOKEN_FILE on both sides"
    assert [type(message) for message in heard] == [Hello]


def renaming(altered: Stream) -> Callable[[Stream, bytes], bytes]:
    """Changes the name of the model in one direction, and nothing else."""
    other = MODEL[0][:-1] + b"?"
    return lambda stream, piece: piece.replace(MODEL[0], other) if stream is altered else piece


@pytest.mark.parametrize("access", [KNOWS, OPEN], ids=["token", "no token"])
def test_a_status_that_is_altered_on_the_way_is_noticed(access: Access) -> None:
    with serving(SMALL, MEMORY, access=access) as (_, source), Relay(source, alter=renaming(Stream.TO_CLIENT)) as relay:
        with pytest.raises(SourceFailed, match="a frame of the server was altered on the way or is not its own"):
            inquire(relay.endpoint, SHORT.connect, access)


@pytest.mark.parametrize("access", [KNOWS, OPEN], ids=["token", "no token"])
def test_a_join_that_is_altered_on_the_way_is_noticed(caplog: pytest.LogCaptureFixture, access: Access) -> None:
    with (
        serving(SMALL, MEMORY, access=access) as (server, source),
        Relay(source, alter=renaming(Stream.TO_SERVER)) as relay,
    ):
        with pytest.raises(SourcesExhausted):
            fetch(SMALL, MEMORY, relay.endpoint, access=access)
        settled(server)
    assert any("a frame of the client was altered on the way" in warning for warning in warnings(caplog))


def test_a_server_that_has_closed_already_is_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = socket.socketpair()
    there.sendall(frame(Refuse("no room: there are 1024 connections")))
    there.close()
    monkeypatch.setattr(greeting, "connect", lambda *_: Channel(here, Role.CLIENT))
    with pytest.raises(SourceRefused, match="it refused: no room: there are 1024 connections"):
        greet(Endpoint("any", 1), OPEN, PATIENCE)


def test_a_failed_greeting_leaves_no_connection_open(monkeypatch: pytest.MonkeyPatch, certified: Certified) -> None:
    for access, answer in ((OPEN, b""), (KNOWS, frame(Welcome())), (OPEN, b"?" * 8), (certified.ours, b"?" * 8)):
        here, there = socket.socketpair()
        channel = Channel(here, Role.CLIENT)
        monkeypatch.setattr(greeting, "connect", lambda *_, channel=channel: channel)
        there.sendall(answer)
        there.shutdown(socket.SHUT_WR)
        with there, pytest.raises(SourceError):
            greet(Endpoint("any", 1), access, PATIENCE)
        assert (channel.socket.fileno(), here.fileno()) == (-1, -1)
