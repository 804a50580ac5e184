"""Addresses that fail again and again to show who they are: nobody listens to them for a while."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator

import pytest

from support.clock import Clock
from support.peers.access import KNOWS, KNOWS_ANOTHER, MEMORY, OPEN, PATIENCE, Certified, Relay, settled, warnings
from support.peers.proxy import Stream
from support.sources import SHORT, SMALL, serving
from vllm_ascend.model_loader.netloader.client.inquiry import inquire
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import SourceError, SourceUnreachable
from vllm_ascend.model_loader.netloader.server import peer_log
from vllm_ascend.model_loader.netloader.server.admission.hosts import Guard
from vllm_ascend.model_loader.netloader.server.server import WeightServer
from vllm_ascend.model_loader.netloader.wire.access import Access

pytestmark = pytest.mark.timeout(60)


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
