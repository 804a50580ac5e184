"""Host names become addresses within a deadline, whatever the name servers do.

The C library asks them for as long as it likes and cannot be interrupted. So names are looked up in a thread, which is
left to itself when the time is over: it holds nothing and ends when the library gives up. Addresses need no thread.
"""

from __future__ import annotations

import errno
import socket
import threading
from typing import Any, NamedTuple

from vllm_ascend.model_loader.netloader.endpoint import Endpoint


class Address(NamedTuple):
    """What a socket is made from and what it is bound or connected to."""

    family: int
    address: Any


def resolve(endpoint: Endpoint, seconds: float, flags: int = 0) -> list[Address]:
    """The addresses of `endpoint`, best first; `flags` are those of getaddrinfo.

    Raises OSError, of which socket.gaierror says that the name has none, and TimeoutError that nobody answered in time.
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
