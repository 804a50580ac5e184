"""Which process of this host has certain contents, or brings them for all others.

Whoever is first takes a name in the abstract namespace of Unix sockets. The system gives a name to one process at a
time, and takes it back when that process ends however it ends. So nobody has to agree with anybody, and nobody is left
over. Who finds the name taken asks its holder where it serves. A name reaches as far as those of `shared_memory`, which
is what it is for: the pages of one process become those of all.

Another user may take a name that is made without a secret. That costs the others what they would have shared: they
notice, and each brings its own. What the holder of a name says is an address, which has to prove itself like any other.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import threading
import time
import weakref
from typing import Final, Self

from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.wire.unix_sockets import require_own_user

_ADDRESS_BYTES: Final = 512
_BACKLOG: Final = 128
"""Processes that may ask before the holder knows where it serves."""
_ACCEPT_PAUSE: Final = 0.05
"""Seconds before the next try after a failed accept, as of a process without descriptors."""


class Claim:
    """A name that this process holds until `close`, or until nobody has this object any more."""

    def __init__(self, sock: socket.socket) -> None:
        """Takes over `sock`, which is bound to the name and listens."""
        self._socket = sock
        self._is_told = False
        self._give_up = weakref.finalize(self, _close, sock)

    @classmethod
    def take(cls, name: str) -> Self | None:
        """Holds `name` from now on; None where another process does. Raises OSError."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.bind(f"\0{name}")
            sock.listen(_BACKLOG)
        except OSError as error:
            sock.close()
            if error.errno == errno.EADDRINUSE:
                return None
            raise
        return cls(sock)

    def tell(self, endpoint: Endpoint) -> None:
        """Tells whoever asks, now or before, that this process serves at `endpoint`. Only the first call counts."""
        if self._is_told:
            return
        self._is_told = True
        answer = threading.Thread(
            target=_answer, args=(self._socket, str(endpoint)), name="netloader-claim", daemon=True
        )
        try:
            answer.start()
        except RuntimeError:  # there is no thread: nobody is to wait for an answer
            self.close()

    def close(self) -> None:
        """Gives up the name. Idempotent."""
        self._give_up()


def holder_of(name: str, timeout: float) -> Endpoint | None:
    """Where the holder of `name` serves, once it knows. None where nobody holds it, or it gives the name up.

    Raises OSError where it says nothing within `timeout` seconds, is another user's, or gives no address.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout)
        try:
            sock.connect(f"\0{name}")
            require_own_user(sock)
            with sock.makefile("rb") as answer:
                address = answer.read(_ADDRESS_BYTES)
            return Endpoint.parse(address.decode()) if address else None
        except (ConnectionRefusedError, ConnectionResetError):
            return None
        except ValueError as error:
            raise OSError(f"what the holder of a claim says is no address: {error}") from error


def _answer(sock: socket.socket, address: str) -> None:
    while sock.fileno() >= 0:
        try:
            connection, _ = sock.accept()
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.EBADF):
                return
            time.sleep(_ACCEPT_PAUSE)
            continue
        with connection, contextlib.suppress(OSError):
            require_own_user(connection)
            connection.settimeout(0)
            connection.sendall(address.encode())


def _close(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()
