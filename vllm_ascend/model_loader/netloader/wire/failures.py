"""What an error of a socket means: that the peer went away, that it was silent, or that something is missing here.

The first two are PeerErrors, which end this session and no other. What this process or host lacks stays an OSError,
because no peer is to blame for it.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import ssl
from collections.abc import Iterator
from typing import Final

from vllm_ascend.model_loader.netloader.errors import ConnectionLost, Stalled

_OUR_OWN: Final = {errno.ENOSPC, errno.ENOMEM, errno.ENOBUFS, errno.EMFILE, errno.ENFILE, errno.EFBIG, errno.EPERM}
"""Error numbers that tell of a limit of this process or host."""


def is_our_own(error: OSError) -> bool:
    """Whether `error` tells of something that this process or host lacks, for which no peer is to blame."""
    has_other_numbers = isinstance(error, ssl.SSLError | socket.gaierror)
    return error.errno in _OUR_OWN and not has_other_numbers


@contextlib.contextmanager
def translated_errors(timeout: float) -> Iterator[None]:
    """Makes an OSError, unless it is our own, what it means for the peer, which had `timeout` seconds.

    Raises Stalled when these are over, and ConnectionLost for anything else.
    """
    try:
        yield
    except (TimeoutError, BlockingIOError) as error:
        raise Stalled(f"the peer was silent for {timeout:g} s") from error
    except OSError as error:
        if is_our_own(error):
            raise
        raise ConnectionLost(f"the connection broke: {error.strerror or error}") from error
