"""Host names become addresses within a deadline, whatever the name servers do.

The C library asks name servers for as long as it likes, and nothing can interrupt it. So a thread asks, and is left
alone when the time is over: it holds nothing, and ends when the library gives up. Numeric addresses need no thread.
"""

from __future__ import annotations

import errno
import socket
import threading
from typing import Any, NamedTuple

from vllm_ascend.model_loader.netloader.endpoint import Endpoint


class Address(NamedTuple):
    """The family of a socket, and the address that it is bound or connected to, as the socket module has them."""

    family: int
    address: Any


def resolve(endpoint: Endpoint, seconds: float, flags: int = 0) -> list[Address]:
    """The addresses of `endpoint`, best first, found within `seconds`. `flags` are those of getaddrinfo.

    Raises socket.gaierror where the name has none, TimeoutError where no name server has answered in time, and OSError
    where this process can have no thread.
    """
    try:
        return _look_up(endpoint, flags | socket.AI_NUMERICHOST)
    except socket.gaierror:
        return _look_up_within(seconds, endpoint, flags)


def _look_up_within(seconds: float, endpoint: Endpoint, flags: int) -> list[Address]:
    outcome: list[list[Address] | OSError] = []

    def look_up() -> None:
        try:
            outcome.append(_look_up(endpoint, flags))
        except OSError as error:
            outcome.append(error)

    thread = threading.Thread(target=look_up, name=f"netloader-resolve {endpoint.host}", daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        raise OSError(errno.ENOMEM, f"no thread can be had to look up {endpoint.host}: {error}") from error
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f"no name server has told the address of {endpoint.host} within {seconds:g} s")
    if isinstance(outcome[0], OSError):
        raise outcome[0]
    return outcome[0]


def _look_up(endpoint: Endpoint, flags: int) -> list[Address]:
    try:
        answers = socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM, flags=flags)
    except UnicodeError as error:
        raise socket.gaierror(socket.EAI_NONAME, f"{endpoint.host!r} cannot be a host name: {error}") from error
    return list(dict.fromkeys(Address(family, address) for family, _, _, _, address in answers))
