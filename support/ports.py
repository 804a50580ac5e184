"""Ports for those who want to know their number before anybody listens on them."""

from __future__ import annotations

import contextlib
import socket


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """Different ports of `host` that were free a moment ago. Nothing keeps others from taking them meanwhile."""
    with contextlib.ExitStack() as probes:
        listeners = [probes.enter_context(socket.create_server((host, 0))) for _ in range(count)]
        return [listener.getsockname()[1] for listener in listeners]


def free_port(host: str = "127.0.0.1") -> int:
    """One of `free_ports`."""
    return free_ports(1, host)[0]


def two_free_ports() -> int:
    """The first of two neighbouring ports that were free a moment ago."""
    while True:
        port = free_port()
        with contextlib.suppress(OSError, OverflowError), socket.create_server(("127.0.0.1", port + 1)):
            return port
