"""How a process gets a port to serve on: before anything is loaded, and never one that somebody else has bound.

Linux lets two sockets bind one port if both have SO_REUSEADDR and neither listens yet; the first one to listen gets it.
vLLM binds its HTTP port with that option when it starts, and listens minutes later. If our socket had the option, as
servers usually do so that they can restart, it would take that port away from vLLM. But without the option, a server
that restarts is refused its port for a minute after the last connection that its predecessor has ended (TIME_WAIT).

So a port is bound without the option first. If that is refused, the port may still be free, in which case /proc/net/tcp
shows remains of ended connections there and nothing else. That is not enough, because sockets that are bound but do not
listen are missing from that table. Two probes find them:

- A socket with SO_REUSEPORT can be bound beside our own remains, since every connection gets that option when it is
  accepted, but not beside an ordinary socket.
- Sockets that have SO_REUSEPORT themselves (vLLM's, if it has several API servers) allow that probe. As a rule they are
  bound to all addresses, and so they refuse a probe without options on an address of the loopback network.

The port looks free by mistake only if a socket with SO_REUSEPORT is bound to a single address, and there are remains of
ours at that very address.
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
"""Connections that may wait to be accepted."""
_REMAINS: Final = {"04", "05", "06", "09", "0B"}
"""States in which no process has the connection any more: FIN_WAIT1, FIN_WAIT2, TIME_WAIT, LAST_ACK, CLOSING."""
_OF_THE_CONFIGURATION: Final = {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EACCES, errno.EINVAL, errno.ENODEV}
"""Errors of binding that stay until the address or the port is configured otherwise."""


class ListeningSocket:
    """A socket that listens from its creation until `close`."""

    def __init__(self, host: str | None, port: int, timeout: float) -> None:
        """`host` None means all addresses, `port` 0 an ephemeral one; `timeout` is for looking up a host name.

        Raises ConfigError if the host is none of this machine or the port is not for this user, and OSError if the port
        is bound already or no socket can be had.
        """
        self._is_dual_stack = dual_stack = host is None and socket.has_dualstack_ipv6()
        self.socket = _first_bound(_addresses(host, port, timeout, dual_stack), dual_stack)
        self.socket.listen(_BACKLOG)

    @property
    def port(self) -> int:
        """The number of the port that it has got."""
        port: int = self.socket.getsockname()[1]
        return port

    @property
    def address(self) -> Endpoint:
        """Where processes of this host reach it."""
        host: str = self.socket.getsockname()[0]
        loopback = "127.0.0.1" if self.socket.family is socket.AF_INET or self._is_dual_stack else "::1"
        return Endpoint(loopback if host in ("0.0.0.0", "::") else host, self.port)

    def accept(self) -> tuple[socket.socket, Any]:
        """Waits for the next connection, and returns it with its peer's address. Raises OSError, also after `close`."""
        connection, address = self.socket.accept()
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        return connection, address

    def close(self) -> None:
        """Gives the port back, and ends an `accept` that waits. Idempotent."""
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
    """A socket that is bound to the first of `addresses` that belongs to this machine."""
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
    """Whether nobody has the port, although it cannot be bound without SO_REUSEADDR: see the head of this module."""
    port = address.address[1]
    states = set(_states(port))
    if not states or not states <= _REMAINS:
        return False

    if not _can_be_bound(address, dual_stack, reuse_port=True):
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
    """The states of the TCP sockets at `port` that Linux shows in this network namespace.

    Linux's own documentation explains the columns, in networking/proc_net_tcp.rst.
    """
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError), open(table, encoding="ascii") as lines:  # without IPv6 there is no second
            next(lines)
            for line in lines:
                _, local, _, state, *_ = line.split()
                if int(local.rpartition(":")[2], 16) == port:
                    yield state
