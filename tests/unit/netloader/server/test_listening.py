"""Whose a port is: sockets that others hold, listening or not, and what remains of connections that ended."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vllm_ascend.model_loader.netloader.errors import ConfigError
from vllm_ascend.model_loader.netloader.server.listening import ListeningSocket

pytestmark = pytest.mark.timeout(60)

WANTED = {"all addresses": None, "all of IPv4": "0.0.0.0", "one of IPv4": "127.0.0.1", "one of IPv6": "::1"}
HELD = {"vLLM's own": ("0.0.0.0", 1, 0), "one address": ("127.0.0.1", 1, 0), "several API servers": ("0.0.0.0", 1, 1)}
"""Address, SO_REUSEADDR and SO_REUSEPORT of sockets that are bound and do not listen."""


@contextlib.contextmanager
def held(host: str, reuse_address: int, reuse_port: int, port: int) -> Iterator[int]:
    """The port of a socket that is bound as vLLM binds that of its HTTP server, which listens only later."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse_address)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, reuse_port)
        sock.bind((host, port))
        yield sock.getsockname()[1]
        sock.listen()  # nothing has taken it meanwhile


def port_with_remains(host: str | None) -> int:
    """Of a listener that has ended a connection a moment ago, as a process before a restart has."""
    listener = ListeningSocket(host, 0, 5)
    with socket.create_connection((host or "127.0.0.1", listener.port)) as client:
        connection, _ = listener.accept()
        connection.close()  # who closes first keeps the remains
        assert client.recv(1) == b""
    port = listener.port
    listener.close()
    with socket.socket(socket.AF_INET6 if host == "::1" else socket.AF_INET) as sock:
        with pytest.raises(OSError, match="Address already in use"):
            sock.bind((host or "127.0.0.1", port))
    return port


@contextlib.contextmanager
def held_with_remains(wanted: str | None, host: str, reuse_address: int, reuse_port: int) -> Iterator[int]:
    """A port of both kinds; another process of this machine may have the same one for a connection of its own."""
    for _ in range(10):
        with contextlib.ExitStack() as scope:
            try:
                port = scope.enter_context(held(host, reuse_address, reuse_port, port_with_remains(wanted)))
            except OSError:
                continue
            yield port
            return
    raise AssertionError("no port can be bound")


@pytest.mark.parametrize("wanted", WANTED.values(), ids=WANTED.keys())
def test_a_port_is_had_at_once_and_clients_are_accepted(wanted: str | None) -> None:
    listener = ListeningSocket(wanted, 0, 5)
    with contextlib.closing(listener), socket.create_connection((wanted or "127.0.0.1", listener.port)):
        connection, _ = listener.accept()
        connection.close()


def test_all_addresses_are_those_of_ipv4_and_ipv6() -> None:
    with contextlib.closing(ListeningSocket(None, 0, 5)) as listener:
        for host in ("127.0.0.1", "::1"):
            socket.create_connection((host, listener.port)).close()


OVERLAPPING = [
    pytest.param(wanted, holder, id=f"{wanted_name}, {holder_name}")
    for (wanted_name, wanted), (holder_name, holder) in itertools.product(WANTED.items(), HELD.items())
    if wanted != "::1"
]


@pytest.mark.parametrize(("wanted", "holder"), OVERLAPPING)
def test_a_port_that_is_bound_and_not_listened_on_is_not_taken(
    wanted: str | None, holder: tuple[str, int, int]
) -> None:
    with held(*holder, port=0) as port, pytest.raises(OSError, match=f"{port} is bound by another socket"):
        ListeningSocket(wanted, port, 5)


@pytest.mark.parametrize(("wanted", "holder"), OVERLAPPING)
def test_it_is_not_taken_either_where_connections_to_it_have_just_ended(
    wanted: str | None, holder: tuple[str, int, int]
) -> None:
    with held_with_remains(wanted, *holder) as port:
        with pytest.raises(OSError, match=f"{port} is bound by another socket"):
            ListeningSocket(wanted, port, 5)


@pytest.mark.parametrize("wanted", WANTED.values(), ids=WANTED.keys())
def test_what_remains_of_connections_does_not_hinder_a_restart(wanted: str | None) -> None:
    port = port_with_remains(wanted)
    for _ in range(2):
        listener = ListeningSocket(wanted, port, 5)
        assert listener.port == port
        listener.close()


def test_a_port_of_ipv4_is_free_for_ipv6() -> None:
    with held("0.0.0.0", 1, 0, port=0) as port:
        ListeningSocket("::1", port, 5).close()


@pytest.mark.parametrize("wanted", WANTED.values(), ids=WANTED.keys())
def test_a_port_on_which_somebody_listens_is_not_taken(wanted: str | None) -> None:
    with contextlib.closing(ListeningSocket(wanted, 0, 5)) as first:
        with pytest.raises(OSError, match="bound by another socket"):
            ListeningSocket(wanted, first.port, 5)
        with socket.create_connection((wanted or "127.0.0.1", first.port)):
            connection, _ = first.accept()
        connection.close()
        with pytest.raises(OSError, match="bound by another socket"):
            ListeningSocket(wanted, first.port, 5)


def test_nobody_else_takes_the_port_of_a_listener() -> None:
    with contextlib.closing(ListeningSocket("127.0.0.1", 0, 5)) as listener:
        for reuse_address, reuse_port in itertools.product((0, 1), repeat=2):
            with (
                pytest.raises(OSError, match="Address already in use"),
                held("127.0.0.1", reuse_address, reuse_port, listener.port),
            ):
                pass


WRONG_HOSTS = {
    "host.invalid": "LISTEN_HOST has the value 'host.invalid': ",
    "192.0.2.1": r"LISTEN_HOST: 192\.0\.2\.1:0 is not at an address of this machine",
    "2001:db8::1": r"LISTEN_HOST: \[2001:db8::1\]:0 is not at an address of this machine",
    "fe80::1": r"LISTEN_HOST: \[fe80::1\]:0 is not at an address of this machine",
}


@pytest.mark.parametrize(("host", "reason"), WRONG_HOSTS.items(), ids=WRONG_HOSTS.keys())
def test_a_host_that_is_not_this_one_is_a_wrong_configuration(host: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        ListeningSocket(host, 0, 5)


@pytest.mark.parametrize("answer", [socket.EAI_AGAIN, None], ids=["not now", "never"])
def test_name_servers_that_do_not_answer_leave_an_instance_unserved(
    answer: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    original: Any = socket.getaddrinfo

    def getaddrinfo(host: str, *arguments: object, flags: int = 0, **further: object) -> object:
        if flags & socket.AI_NUMERICHOST:
            return original(host, *arguments, flags=flags, **further)
        if answer is None:
            raise TimeoutError("no name server has told the address")
        raise socket.gaierror(answer, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with pytest.raises(OSError, match="name server"):
        ListeningSocket("node-3.example", 0, 5)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give up what lets it have every port")
def test_a_port_that_this_user_may_not_have_is_a_wrong_configuration() -> None:
    if int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text()) < 2:
        pytest.skip("every user may have every port here")
    os.seteuid(65534)
    try:
        with pytest.raises(ConfigError, match=r"LISTEN_PORT: this user may not listen on 127\.0\.0\.1:1 "):
            ListeningSocket("127.0.0.1", 1, 5)
    finally:
        os.seteuid(0)
