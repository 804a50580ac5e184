"""Who gets in, who is kept out, and what either of them, or whoever listens in, learns.

The servers and clients are real, on real sockets; a relay between them records, and where told alters, what passes.
"""

from __future__ import annotations

import contextlib
import logging
import re
import secrets
import socket
import ssl
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import pytest

from support.certificates import Authority
from support.clock import Clock
from support.proxy import Proxy, Stream
from support.sources import IDENTITY, SHORT, SMALL, fetch, serving
from support.wait import wait_until
from vllm_ascend.model_loader.netloader.client.inquiry import announce, inquire
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import (
    ConnectionLost,
    PeerError,
    SourceError,
    SourceFailed,
    SourceRefused,
    SourcesExhausted,
    SourceUnreachable,
)
from vllm_ascend.model_loader.netloader.server import peer_log
from vllm_ascend.model_loader.netloader.server.admission import Guard
from vllm_ascend.model_loader.netloader.server.server import WeightServer
from vllm_ascend.model_loader.netloader.transport.base import Timeouts, Transport
from vllm_ascend.model_loader.netloader.transport.in_process import InProcessTransport
from vllm_ascend.model_loader.netloader.transport.registry import transports
from vllm_ascend.model_loader.netloader.wire import greeting
from vllm_ascend.model_loader.netloader.wire.access import Access, Proofs
from vllm_ascend.model_loader.netloader.wire.channel import Channel, Deadline
from vllm_ascend.model_loader.netloader.wire.conversation import Role, frame
from vllm_ascend.model_loader.netloader.wire.greeting import greet
from vllm_ascend.model_loader.netloader.wire.messages import (
    PROTOCOL_VERSION,
    Challenge,
    Hello,
    Inquire,
    Message,
    Prove,
    Refuse,
    Welcome,
)

pytestmark = pytest.mark.timeout(60)

TOKEN = b"correct horse battery staple"
KNOWS, KNOWS_ANOTHER, OPEN = Access(TOKEN), Access(b"tr0ub4dor&3 tr0ub4dor&3"), Access()
MEMORY = (InProcessTransport(),)
TCP = transports(["tcp"])
PATIENCE = 20.0
"""Seconds that nothing here takes, unless it hangs."""

MODEL = [field.encode() for field in (IDENTITY.name, IDENTITY.architecture, IDENTITY.config_digest)]
WEIGHTS = SMALL.by_name["w0"].numpy().tobytes()[:32]


class Relay(Proxy):
    """A proxy that records what goes either way. `alter` is given every piece with its direction."""

    def __init__(
        self,
        target: Endpoint,
        host: str = "127.0.0.1",
        alter: Callable[[Stream, bytes], bytes] = lambda _, piece: piece,
    ) -> None:
        super().__init__(target, source_host=host)
        self._alter = alter
        self._records: defaultdict[tuple[Stream, int], bytearray] = defaultdict(bytearray)

    def __exit__(self, *_: object) -> None:
        """When this returns, everything that was said is recorded."""
        self.wait_for_ends()
        self.close()

    def passing(self, connection: int, stream: Stream, piece: bytes) -> bytes:
        self._records[stream, connection] += piece
        return self._alter(stream, piece)

    def said(self, stream: Stream) -> list[bytearray]:
        """What each connection has carried in that direction."""
        return [self._records[stream, connection] for connection in range(self.connections)]

    @property
    def overheard(self) -> bytes:
        return b"".join(self._records.values())


@pytest.fixture(scope="session")
def authorities(tmp_path_factory: pytest.TempPathFactory) -> tuple[Authority, Authority]:
    directory = tmp_path_factory.mktemp("authorities")
    return Authority(directory, "ours"), Authority(directory, "theirs")


@dataclass(frozen=True)
class Certified:
    """What instances may show and want, by the certificates that they have."""

    ours: Access
    of_another_authority: Access
    of_another_authority_that_trusts_ours: Access
    expired: Access
    without_a_certificate: Access


@pytest.fixture(scope="session")
def certified(authorities: tuple[Authority, Authority]) -> Certified:
    ours, theirs = authorities
    without = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    without.check_hostname = False
    without.load_verify_locations(ours.file)
    return Certified(
        ours=ours.identify("instance").access(),
        of_another_authority=theirs.identify("stranger").access(),
        of_another_authority_that_trusts_ours=theirs.identify("spy", ca=ours.file).access(),
        expired=ours.identify("retired", days_ago=1).access(),
        without_a_certificate=Access(client_tls=without),
    )


def with_token(access: Access, token: bytes = TOKEN) -> Access:
    return replace(access, token=token)


def warnings(log: pytest.LogCaptureFixture) -> list[str]:
    """Those of the server."""
    return [
        record.getMessage()
        for record in log.records
        if record.levelno >= logging.WARNING and record.name.endswith(".server")
    ]


def refusal(source: Endpoint, access: Access) -> str:
    """Why a client gets nothing."""
    with pytest.raises(SourcesExhausted) as error:
        fetch(SMALL, MEMORY, source, access=access)
    (reason,) = error.value.reasons
    return reason.removeprefix(f"{source}: ")


def settled(server: WeightServer) -> None:
    """Returns when the server has done with every connection."""
    wait_until(lambda: not server.state().connections)


def assert_no_secret(overheard: bytes, *secret: bytes) -> None:
    for each in secret:
        assert each not in overheard
        assert each.hex().encode() not in overheard


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


@pytest.mark.parametrize("kind", ["in_process", "tcp", "shared_memory"])
def test_under_tls_everything_works_and_nothing_can_be_read_on_the_way(
    certified: Certified, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    kinds = MEMORY if kind == "in_process" else transports([kind])
    with serving(SMALL, kinds, access=certified.ours) as (_, source), Relay(source) as relay:
        (holding,) = inquire(relay.endpoint, SHORT.connect, certified.ours).holdings
        assert holding.identity == IDENTITY
        client, fetched = fetch(SMALL, kinds, relay.endpoint, access=certified.ours)
        SMALL.assert_in(fetched.memory)
        fetched.memory.close()
    assert (client.attempts, warnings(caplog)) == ([], [])
    assert_no_secret(relay.overheard, *MODEL, WEIGHTS)
    assert b"Hello" not in relay.overheard


def test_without_tls_everything_can_be_read_on_the_way() -> None:
    with serving(SMALL, TCP) as (_, source), Relay(source) as relay:
        fetch(SMALL, TCP, relay.endpoint)
    assert all(each in relay.overheard for each in (*MODEL, WEIGHTS, b"Hello"))


def test_the_names_in_certificates_do_not_matter(authorities: tuple[Authority, Authority]) -> None:
    ours, _ = authorities
    one, two = (ours.identify(name).access() for name in ("node-1.example.org", "node-2.example.org"))
    with serving(SMALL, MEMORY, access=one) as (_, source):
        assert inquire(source, SHORT.connect, two).holdings


@dataclass(frozen=True)
class Mismatch:
    """Which accesses do not fit, what the client is told, and what the server logs."""

    server: Callable[[Certified], Access]
    client: Callable[[Certified], Access]
    told: str
    logged: str


TURNED_AWAY = r"turned away 127\.0\.0\.1:\d+: no TLS with a certificate of our authority: .*"
MISMATCHES: dict[str, Mismatch] = {
    "a client without a certificate": Mismatch(
        lambda certified: certified.ours,
        lambda certified: certified.without_a_certificate,
        "it did not greet under TLS: .*certificate required [^;]*$",
        TURNED_AWAY + "peer did not return a certificate",
    ),
    "a client with a certificate of another authority": Mismatch(
        lambda certified: certified.ours,
        lambda certified: certified.of_another_authority_that_trusts_ours,
        "it did not greet under TLS: .*unknown ca [^;]*$",
        TURNED_AWAY + "certificate verify failed",
    ),
    "a client whose certificate has expired": Mismatch(
        lambda certified: certified.ours,
        lambda certified: certified.expired,
        "it did not greet under TLS: .*certificate expired [^;]*$",
        TURNED_AWAY + "certificate has expired",
    ),
    "a server with a certificate of another authority": Mismatch(
        lambda certified: certified.of_another_authority_that_trusts_ours,
        lambda certified: certified.ours,
        "it did not greet under TLS: .*certificate verify failed[^;]*$",
        TURNED_AWAY + "unknown ca",
    ),
    "a server whose certificate has expired": Mismatch(
        lambda certified: certified.expired,
        lambda certified: certified.ours,
        "it did not greet under TLS: .*certificate has expired[^;]*$",
        TURNED_AWAY + "certificate expired",
    ),
    "two authorities": Mismatch(
        lambda certified: certified.ours,
        lambda certified: certified.of_another_authority,
        "it did not greet under TLS: .*certificate verify failed[^;]*$",
        TURNED_AWAY + "unknown ca",
    ),
    "a client without TLS": Mismatch(
        lambda certified: certified.ours,
        lambda _: OPEN,
        r"it did not greet: .*; it may want TLS \(TLS_CERT, TLS_KEY, TLS_CA\) or have blocked this address",
        TURNED_AWAY + "wrong version number",
    ),
    "a client with a token instead of TLS": Mismatch(
        lambda certified: certified.ours,
        lambda _: KNOWS,
        r"it did not greet: .*; it may want TLS \(TLS_CERT, TLS_KEY, TLS_CA\) or have blocked this address",
        TURNED_AWAY + "wrong version number",
    ),
    "a server without TLS": Mismatch(
        lambda _: OPEN,
        lambda certified: certified.ours,
        "it did not greet under TLS: .*; it has no TLS: TLS_CERT, TLS_KEY and TLS_CA belong on all instances",
        r"ended the connection with 127\.0\.0\.1:\d+: it speaks TLS, which is not configured here",
    ),
    "a server with a token instead of TLS": Mismatch(
        lambda _: KNOWS,
        lambda certified: certified.ours,
        "it did not greet under TLS: .*; it has no TLS: TLS_CERT, TLS_KEY and TLS_CA belong on all instances",
        r"ended the connection with 127\.0\.0\.1:\d+: it speaks TLS, which is not configured here",
    ),
    "the right certificates and another token": Mismatch(
        lambda certified: with_token(certified.ours),
        lambda certified: with_token(certified.ours, b"x" * 16),
        "it refused: the token is not the one of this server",
        r"turned away 127\.0\.0\.1:\d+: it has another token",
    ),
    "the right certificates and no token": Mismatch(
        lambda certified: with_token(certified.ours),
        lambda certified: certified.ours,
        "it wants a token: set TOKEN_FILE",
        r"turned away 127\.0\.0\.1:\d+: it does not show that it knows the token",
    ),
    "the right token and no TLS": Mismatch(
        lambda certified: with_token(certified.ours),
        lambda _: KNOWS,
        r"it did not greet: .*; it may want TLS \(TLS_CERT, TLS_KEY, TLS_CA\) or have blocked this address",
        TURNED_AWAY + "wrong version number",
    ),
    "the right token and a certificate of another authority": Mismatch(
        lambda certified: with_token(certified.ours),
        lambda certified: with_token(certified.of_another_authority_that_trusts_ours),
        "it did not greet under TLS: .*unknown ca [^;]*$",
        TURNED_AWAY + "certificate verify failed",
    ),
}


@pytest.mark.parametrize("mismatch", MISMATCHES.values(), ids=MISMATCHES.keys())
def test_who_does_not_fit_is_told_why_logged_with_its_address_and_shown_nothing(
    certified: Certified, caplog: pytest.LogCaptureFixture, mismatch: Mismatch
) -> None:
    with serving(SMALL, MEMORY, access=mismatch.server(certified)) as (server, source), Relay(source) as relay:
        assert re.match(mismatch.told, refusal(relay.endpoint, mismatch.client(certified)))
        settled(server)
    (warning,) = warnings(caplog)
    assert re.match(mismatch.logged, warning)
    assert_no_secret(relay.overheard, TOKEN, WEIGHTS, *MODEL)


@pytest.mark.parametrize("kind", ["in_process", "tcp"])
def test_a_token_and_tls_go_together(certified: Certified, caplog: pytest.LogCaptureFixture, kind: str) -> None:
    kinds, access = MEMORY if kind == "in_process" else TCP, with_token(certified.ours)
    with serving(SMALL, kinds, access=access) as (_, source), Relay(source) as relay:
        assert inquire(relay.endpoint, SHORT.connect, access).holdings
        SMALL.assert_in(fetch(SMALL, kinds, relay.endpoint, access=access)[1].memory)
    assert warnings(caplog) == []
    assert_no_secret(relay.overheard, TOKEN, WEIGHTS, *MODEL)


def test_under_tls_what_is_altered_on_the_way_is_noticed(certified: Certified) -> None:
    class Flip:
        """One bit of the last piece of a status: the handshake takes fewer bytes before it."""

        def __init__(self) -> None:
            self.armed = False

        def __call__(self, stream: Stream, piece: bytes) -> bytes:
            if not self.armed or stream is Stream.TO_SERVER:
                return piece
            return piece[:-1] + bytes([piece[-1] ^ 1])

    flip = Flip()
    with serving(SMALL, MEMORY, access=certified.ours) as (_, source), Relay(source, alter=flip) as relay:
        with greet(relay.endpoint, certified.ours, SHORT.connect) as channel:
            flip.armed = True
            channel.send(Inquire(), SHORT.connect)
            with pytest.raises(ConnectionLost, match=r"(?i)bad.record.mac"):
                channel.receive(Deadline(PATIENCE))


@contextlib.contextmanager
def guarded(access: Access) -> Iterator[tuple[WeightServer, Endpoint, Clock]]:
    """A server that keeps the time of `Guard` by a clock of the test."""
    clock = Clock()
    with serving(SMALL, MEMORY, access=access) as (server, source):
        server.listener.guard = Guard(clock)
        yield server, source, clock


FAILURES: dict[str, tuple[Callable[[Certified], Access], Callable[[Certified], Access]]] = {
    "another token": (lambda _: KNOWS, lambda _: KNOWS_ANOTHER),
    "no token": (lambda _: KNOWS, lambda _: OPEN),
    "no certificate": (lambda certified: certified.ours, lambda certified: certified.without_a_certificate),
    "another authority": (
        lambda certified: certified.ours,
        lambda certified: certified.of_another_authority_that_trusts_ours,
    ),
    "no TLS": (lambda certified: certified.ours, lambda _: OPEN),
}

failures = pytest.mark.parametrize(("right", "wrong"), FAILURES.values(), ids=FAILURES.keys())


def fail(server: WeightServer, source: Endpoint, access: Access, times: int) -> None:
    for _ in range(times):
        with pytest.raises(SourceError):
            inquire(source, SHORT.connect, access)
        settled(server)


@failures
def test_an_address_that_fails_again_and_again_is_not_listened_to_for_a_while(
    certified: Certified,
    caplog: pytest.LogCaptureFixture,
    right: Callable[[Certified], Access],
    wrong: Callable[[Certified], Access],
) -> None:
    with guarded(right(certified)) as (server, source, clock):
        fail(server, source, wrong(certified), times=4)
        with pytest.raises(SourceUnreachable, match="it did not greet"):
            inquire(source, SHORT.connect, right(certified))
        with Relay(source, host="127.0.0.2") as elsewhere:
            assert inquire(elsewhere.endpoint, SHORT.connect, right(certified)).holdings
        clock.now += 1
        assert inquire(source, SHORT.connect, right(certified)).holdings
    assert len(warnings(caplog)) == 4


def test_whoever_is_not_listened_to_is_told_nothing() -> None:
    with guarded(KNOWS) as (server, source, _):
        fail(server, source, KNOWS_ANOTHER, times=4)
        with Relay(source) as relay:
            with pytest.raises(SourceUnreachable):
                inquire(relay.endpoint, SHORT.connect, KNOWS)
    assert [bytes(said) for said in relay.said(Stream.TO_CLIENT)] == [b""]


@failures
def test_a_few_failures_may_be_corrected_at_once(
    certified: Certified, right: Callable[[Certified], Access], wrong: Callable[[Certified], Access]
) -> None:
    with guarded(right(certified)) as (server, source, _):
        for _ in range(3):
            fail(server, source, wrong(certified), times=3)
            assert inquire(source, SHORT.connect, right(certified)).holdings
            settled(server)


def test_only_a_few_failures_of_an_address_are_logged(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_log, "LINES_OF_A_HOST", 1)
    with guarded(KNOWS) as (server, source, _):
        fail(server, source, KNOWS_ANOTHER, times=3)
        assert len(warnings(caplog)) == 1
        with Relay(source, host="127.0.0.2") as elsewhere:
            fail(server, elsewhere.endpoint, KNOWS_ANOTHER, times=3)
        beginnings = [warning.partition(":")[0] for warning in warnings(caplog)]
        assert beginnings == ["turned away 127.0.0.1", "turned away 127.0.0.2"]
    assert warnings(caplog)[1].endswith("it has another token (... and 2 more like it)")
    assert warnings(caplog)[2].endswith("it has another token (... and 1 more like it)")


@pytest.mark.parametrize("tls", [True, False], ids=["TLS", "token"])
def test_connections_that_say_nothing_are_no_failures(
    certified: Certified, caplog: pytest.LogCaptureFixture, tls: bool
) -> None:
    access = certified.ours if tls else KNOWS
    with guarded(access) as (server, source, _):
        for _ in range(6):
            socket.create_connection(source, PATIENCE).close()
            settled(server)
        assert inquire(source, SHORT.connect, access).holdings
    assert warnings(caplog) == []


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


def test_a_server_that_closes_does_not_wait_for_a_handshake(certified: Certified) -> None:
    patient = Timeouts(connect=PATIENCE * 2, stall=PATIENCE * 2)
    with serving(SMALL, MEMORY, access=certified.ours, timeouts=patient) as (server, source):
        with socket.create_connection(source, PATIENCE) as silent:
            silent.sendall(b"\x16\x03\x01")
            wait_until(
                lambda: any(isinstance(channel.socket, ssl.SSLSocket) for channel in list(server.listener.connections))
            )
            closing = threading.Thread(target=server.close)
            closing.start()
            closing.join(PATIENCE)
            assert not closing.is_alive()
