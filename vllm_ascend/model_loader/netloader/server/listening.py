"""The port on which a process serves: had before anything is loaded, and never one that somebody else has bound.

Linux lets two sockets bind one port if both have SO_REUSEADDR and neither listens yet; the first that listens has it.
vLLM binds its HTTP port with that option at its start, and listens minutes later. A listener with the option, as
servers have it to come back after a restart, would take that port from vLLM. Without it, the port is refused to a
server that comes back, for a minute after the last connection that the process before it has ended (TIME_WAIT).

So a port is bound without the option. Where that is refused, /proc/net/tcp must show remains of ended connections and
nothing else; but a socket that is bound and does not listen is not shown there. Such a one makes itself known by
refusing a probe with SO_REUSEPORT, which our own remains allow, because every connection is given that option when it
is accepted. Sockets that have the option themselves (vLLM's, with several API servers) allow that probe too. They are
bound to all addresses, as a rule, and refuse one without options on an address of the loopback network. Only where one
of them is bound to a single address, at which there are remains of ours besides, does the port look free.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import socket
from collections.abc import Iterator
from typing import Any, Final

from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import ConfigError
from vllm_ascend.model_loader.netloader.wire.resolution import Address, resolve

_BACKLOG: Final = 128
_REMAINS: Final = {"04", "05", "06", "09", "0B"}
"""States in which no process has the connection any more: FIN_WAIT1, FIN_WAIT2, TIME_WAIT, LAST_ACK, CLOSING."""
_OF_THE_CONFIGURATION: Final = {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EACCES, errno.EINVAL, errno.ENODEV}


class ListeningSocket:
    """Listens from the beginning until `close`."""

    def __init__(self, host: str | None, port: int, timeout: float) -> None:
        """`host` None means all addresses, `port` 0 an ephemeral one; `timeout` is for looking up a host name.

        Raises ConfigError where the host is none of this machine or the port not for this user, and OSError where the
        port is bound already or there is no socket to be had.
        """
        dual_stack = host is None and socket.has_dualstack_ipv6()
        self.socket = _first_bound(_addresses(host, port, timeout, dual_stack), dual_stack)
        self.socket.listen(_BACKLOG)

    @property
    def port(self) -> int:
        port: int = self.socket.getsockname()[1]
        return port

    def accept(self) -> tuple[socket.socket, Any]:
        """The next connection and the address of its peer. Raises OSError, also after `close`."""
        connection, address = self.socket.accept()
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        return connection, address

    def close(self) -> None:
        """Ends an `accept` that waits, too."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


def _addresses(host: str | None, port: int, timeout: float, dual_stack: bool) -> list[Address]:
    if host is None:
        return [Address(socket.AF_INET6, ("::", port)) if dual_stack else Address(socket.AF_INET, ("", port))]
    try:
        return resolve(Endpoint(host, port), timeout, socket.AI_PASSIVE)
    except socket.gaierror as error:
        if error.errno == socket.EAI_AGAIN:
            raise OSError(f"the name servers cannot tell the address of LISTEN_HOST {host!r} now") from error
        raise ConfigError(f"Netloader key LISTEN_HOST has the value {host!r}: {error.strerror}") from error


def _first_bound(addresses: list[Address], dual_stack: bool) -> socket.socket:
    """At the first of them that is this machine's."""
    for remaining, address in zip(range(len(addresses) - 1, -1, -1), addresses, strict=True):
        try:
            return _bound(address, dual_stack)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise OSError(errno.EADDRINUSE, _taken(address)) from error
            if error.errno not in _OF_THE_CONFIGURATION:
                raise
            if not remaining:
                raise ConfigError(_not_ours(address, error)) from error
    raise OSError("the host has no address")


def _taken(address: Address) -> str:
    return (
        f"{_written(address)} is bound by another socket, which need not listen yet: vLLM's own port (--port), another "
        f"rank or instance (LISTEN_PORT + rank), or another program has it; choose another LISTEN_PORT"
    )


def _not_ours(address: Address, error: OSError) -> str:
    reason = os.strerror(error.errno or 0)
    if error.errno == errno.EACCES:
        return f"LISTEN_PORT: this user may not listen on {_written(address)} ({reason}): choose one above 1023"
    return f"LISTEN_HOST: {_written(address)} is not at an address of this machine ({reason})"


def _written(address: Address) -> str:
    host, port = address.address[:2]
    return str(Endpoint(host, port)) if host not in ("", "::") else f"port {port}"


def _bound(address: Address, dual_stack: bool) -> socket.socket:
    with contextlib.ExitStack() as on_failure:
        sock = on_failure.enter_context(_socket(address.family, dual_stack))
        try:
            sock.bind(address.address)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not _only_remains(address, dual_stack):
                raise
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address.address)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # inherited by connections, for their remains
        on_failure.pop_all()
        return sock


def _socket(family: int, dual_stack: bool) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not dual_stack)
    return sock


def _only_remains(address: Address, dual_stack: bool) -> bool:
    """Whether nobody has the port, although it cannot be bound without SO_REUSEADDR."""
    port = address.address[1]
    states = set(_states(port))
    if not states or not states <= _REMAINS or not _can_be_bound(address, dual_stack, reuse_port=True):
        return False
    loopback = Address(socket.AF_INET, (f"127.{random.randint(1, 254)}.{random.randint(1, 254)}.1", port))
    only_ipv6 = address.family == socket.AF_INET6 and not dual_stack
    return only_ipv6 or _can_be_bound(loopback, dual_stack, reuse_port=False)


def _can_be_bound(address: Address, dual_stack: bool, *, reuse_port: bool) -> bool:
    with _socket(address.family, dual_stack) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, reuse_port)
        try:
            sock.bind(address.address)
        except OSError as error:
            return error.errno != errno.EADDRINUSE
    return True


def _states(port: int) -> Iterator[str]:
    """Of the TCP sockets at `port` that Linux shows in this network namespace; proc_net_tcp.txt tells the columns."""
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError), open(table, encoding="ascii") as lines:  # without IPv6 there is no second
            next(lines)
            for line in lines:
                _, local, _, state, *_ = line.split()
                if int(local.rpartition(":")[2], 16) == port:
                    yield state
