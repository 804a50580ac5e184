"""Names that stand for several servers: each session stays with the one that it has reached."""

from __future__ import annotations

import contextlib
import functools
import itertools
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from support.peers.impostor import Impostor, answering
from support.peers.proxy import Proxy
from support.sources import IDENTITY, SMALL, fetch, serving
from support.wait import wait_until
from vllm_ascend.model_loader.netloader.client.inquiry import announce
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import SourcesExhausted
from vllm_ascend.model_loader.netloader.server.publications import Publication
from vllm_ascend.model_loader.netloader.server.requests import Settings
from vllm_ascend.model_loader.netloader.server.server import WeightServer
from vllm_ascend.model_loader.netloader.transport.registry import transports
from vllm_ascend.model_loader.netloader.weights.identity import RankCoordinates
from vllm_ascend.model_loader.netloader.wire.access import Access
from vllm_ascend.model_loader.netloader.wire.messages import Refuse

TCP = transports(["tcp"])
NAME = "fleet.test"
HOSTS = ("127.0.0.1", "127.0.0.2")

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def round_robin(monkeypatch: pytest.MonkeyPatch) -> None:
    """NAME has two addresses, and another one comes first each time it is asked for."""
    turn, look_up = itertools.count(), socket.getaddrinfo

    def look_up_in_turn(host: str, port: int, *args: Any, **flags: Any) -> list[Any]:
        if host != NAME or flags.get("flags", 0) & socket.AI_NUMERICHOST:
            return look_up(host, port, *args, **flags)
        first = next(turn) % len(HOSTS)
        ordered = HOSTS[first:] + HOSTS[:first]
        return [(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (each, port)) for each in ordered]

    monkeypatch.setattr(socket, "getaddrinfo", look_up_in_turn)


@contextlib.contextmanager
def fleet() -> Iterator[list[WeightServer]]:
    """Two servers of the same weights on the same port of different addresses."""
    with serving(SMALL, TCP, host=HOSTS[0]) as (first, endpoint):
        with WeightServer(HOSTS[1], endpoint.port, Settings(TCP)) as second:
            second.publish(Publication(IDENTITY, RankCoordinates(), SMALL.store()))
            yield [first, second]


@pytest.mark.usefixtures("round_robin")
def test_all_connections_of_a_session_go_to_the_server_that_it_has_reached() -> None:
    with fleet() as servers:
        for _ in range(4):
            client, fetched = fetch(SMALL, TCP, Endpoint(NAME, servers[0].port))
            assert client.attempts == []
            SMALL.assert_in(fetched.memory)
            assert fetched.source == Endpoint(NAME, servers[0].port)
            assert fetched.address.host in HOSTS


@pytest.mark.usefixtures("round_robin")
def test_an_announcement_goes_to_the_server_from_which_the_weights_came() -> None:
    with fleet() as servers:
        for _ in range(2):
            _, fetched = fetch(SMALL, TCP, Endpoint(NAME, servers[0].port))
            announce(fetched.address, fetched.session, 19001, 5, Access())
            source = servers[HOSTS.index(fetched.address.host)]
            wait_until(functools.partial(has_replicas, source))


@pytest.mark.usefixtures("round_robin")
def test_a_referral_without_a_host_means_the_address_that_was_reached() -> None:
    with Impostor({}, host=HOSTS[0]) as first, serving(SMALL, TCP, host=HOSTS[0]) as (_, elsewhere):
        first.acts["Join"] = answering(Refuse("another rank", referrals=(f":{elsewhere.port}",)))
        for _ in range(2):
            _, fetched = fetch(SMALL, TCP, Endpoint(NAME, first.endpoint.port))
            assert fetched.source == elsewhere


def test_behind_one_address_of_several_servers_the_cause_is_named() -> None:
    with fleet() as servers, serving(SMALL, TCP) as (_, single):
        backends = [Endpoint(host, servers[0].port) for host in HOSTS]
        with Proxy(backends[0], others=backends[1:]) as virtual:
            with pytest.raises(SourcesExhausted) as error:
                fetch(SMALL, TCP, virtual.endpoint)
            assert all(
                "it refused a data connection: this server has no such session: it is over, or this connection reached "
                "another server than the one before, as behind a load balancer, where each instance needs an address "
                "of its own" in reason
                for reason in error.value.reasons
            )
            client, fetched = fetch(SMALL, TCP, virtual.endpoint, single)
        SMALL.assert_in(fetched.memory)
        assert client.attempts[0].source == str(virtual.endpoint)
        for server in servers:
            wait_until(functools.partial(has_no_sessions, server))


def has_replicas(server: WeightServer) -> bool:
    return bool(server.state().replicas["target"])


def has_no_sessions(server: WeightServer) -> bool:
    return not server.state().sessions
