"""Who gets in by a certificate, who is kept out, and what either of them, or whoever listens in, learns.

The servers and clients are real, on real sockets. A relay between them records, and where told alters, what passes.
"""

from __future__ import annotations

import re
import socket
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from support.certificates import Authority
from support.peers.access import (
    KNOWS,
    MEMORY,
    MODEL,
    OPEN,
    PATIENCE,
    TCP,
    TOKEN,
    WEIGHTS,
    Certified,
    Relay,
    assert_no_secret,
    refusal,
    settled,
    warnings,
    with_token,
)
from support.peers.proxy import Stream
from support.sources import IDENTITY, SHORT, SMALL, fetch, serving
from support.wait import wait_until
from vllm_ascend.model_loader.netloader.client.inquiry import inquire
from vllm_ascend.model_loader.netloader.errors import ConnectionLost
from vllm_ascend.model_loader.netloader.transport.base import Timeouts
from vllm_ascend.model_loader.netloader.transport.registry import transports
from vllm_ascend.model_loader.netloader.wire.access import Access
from vllm_ascend.model_loader.netloader.wire.channel import Deadline
from vllm_ascend.model_loader.netloader.wire.greeting import greet
from vllm_ascend.model_loader.netloader.wire.messages import Inquire

pytestmark = pytest.mark.timeout(60)


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
