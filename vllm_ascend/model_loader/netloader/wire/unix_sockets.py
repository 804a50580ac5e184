"""Unix sockets on which descriptors travel, between processes of one user."""

from __future__ import annotations

import array
import os
import socket
import struct
from typing import Final

_CREDENTIALS: Final = struct.Struct("3i")  # pid, uid, gid: unix(7), SO_PEERCRED
_MOST_DESCRIPTORS: Final = 8
"""More than any message carries, so that a peer that sends too many is noticed, and all of them are closed."""


def require_own_user(sock: socket.socket) -> None:
    """Raises PermissionError if the process at the other end of `sock` has another user id."""
    _, user, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    if user != os.geteuid():
        raise PermissionError(f"the peer on the Unix socket has user id {user}: expected {os.geteuid()}")


def receive_with_descriptors(sock: socket.socket, nbytes: int) -> tuple[bytes, list[int]]:
    """Up to `nbytes` bytes, empty at the end of the stream, and the descriptors that came with them.

    The caller closes them. They are closed in child processes from the first moment; `socket.recv_fds` cannot do that,
    as it drops the flag. Raises OSError, with no descriptor left open.
    """
    room = socket.CMSG_LEN(_MOST_DESCRIPTORS * array.array("i").itemsize)
    data, ancillary, _, _ = sock.recvmsg(nbytes, room, socket.MSG_CMSG_CLOEXEC)
    descriptors = array.array("i")
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(content[: len(content) - len(content) % descriptors.itemsize])
    return data, list(descriptors)
