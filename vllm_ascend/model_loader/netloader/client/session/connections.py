"""The connections of one session with a source, and what becomes of their failures.

All of them go to the address that the first has reached, since a name may stand for several servers. Another thread may
shut them down at any moment, including those that are not open yet.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Final

from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import (
    ConnectionLost,
    OtherContents,
    PeerError,
    ProtocolError,
    Replaced,
    SessionEnded,
    SourceError,
    SourceFailed,
    TransportError,
    one_line,
)
from vllm_ascend.model_loader.netloader.wire.access import Access
from vllm_ascend.model_loader.netloader.wire.channel import Channel, Deadline
from vllm_ascend.model_loader.netloader.wire.greeting import greet
from vllm_ascend.model_loader.netloader.wire.messages import End, Leave

EXPLANATION_SECONDS: Final = 1.0
"""How long a client listens for the reason of a source that has broken a transfer off."""


class Connections:
    """The control connection to `source`, and the data connections that follow it. Whoever made it closes it."""

    def __init__(self, source: Endpoint, access: Access, timeout: float) -> None:
        """`timeout` is how many seconds connecting, greeting and one message may take."""
        self._access = access
        self._timeout = timeout
        self.was_denied = False
        """Whether the source has other contents than those that are being loaded, may have others by now, or has said
        what it may not say, so that nothing it has said before counts either.
        """
        self._control: Channel | None = None
        self._address = source
        self._lock = threading.Lock()
        self._channels: list[Channel] = []
        self._is_shut_down = False

    @property
    def control(self) -> Channel:
        """The connection on which the session speaks. Only after `open`."""
        assert self._control is not None, "the source has not been asked"
        return self._control

    @property
    def address(self) -> Endpoint:
        """Where the source was reached; before that, where it is to be reached."""
        return self._address

    def open(self) -> Channel:
        """Connects and greets, and returns the control connection.

        Raises SourceError, or TransportError where this process cannot connect.
        """
        self._control = self._connect()
        with self.failures_translated():
            self._address = self._control.peer
        return self._control

    def connect(self) -> Channel:
        """Another connection to the same server, which the caller closes. Raises ConnectionLost or TransportError."""
        try:
            return self._connect()
        except SourceError as error:  # it answered a moment ago, so it may do so again
            raise ConnectionLost(f"it takes no data connection: {error}") from error

    def shut_down(self) -> None:
        """Ends whatever waits on any of the connections, now or later. From any thread; idempotent."""
        with self._lock:
            self._is_shut_down = True
            for channel in self._channels:
                channel.shut_down()

    def close(self) -> None:
        """Closes the control connection, which ends the session for the source, too. Idempotent."""
        if self._control is not None:
            self._control.close()

    def leave(self, reason: str) -> None:
        """Tells the source that its client goes, and why, if it may be told now. Raises nothing."""
        if not self.control.may_send(Leave):
            return
        with contextlib.suppress(PeerError, OSError):  # whether it hears of it or not, the next way is tried
            self.control.send(Leave(one_line(reason)), self._timeout)

    @contextlib.contextmanager
    def failures_translated(self) -> Iterator[None]:
        """A scope in which what the source does wrong becomes a SourceError, and what this process lacks becomes a
        TransportError.

        The source is told why its client goes, unless it was the one that went.
        """
        try:
            yield
        except PeerError as error:
            raise SourceFailed(self._explanation(error)) from error
        except OSError as error:
            self.leave(str(error))
            raise TransportError(f"this process cannot go on: {error}") from error
        except (SourceError, TransportError) as error:
            self.was_denied = self.was_denied or isinstance(error, OtherContents)
            self.leave(str(error))
            raise

    def _connect(self) -> Channel:
        channel = greet(self._address, self._access, self._timeout)
        with self._lock:
            self._channels.append(channel)
            is_shut_down = self._is_shut_down
        if is_shut_down:
            channel.shut_down()
        return channel

    def _explanation(self, error: PeerError) -> str:
        """Why the source has ended the session, if it has: it breaks the transfer off first, and then says so."""
        if isinstance(error, SessionEnded):
            self.was_denied = self.was_denied or error.denies
            return str(error)
        self.was_denied = self.was_denied or isinstance(error, ProtocolError | Replaced)
        if not isinstance(error, ConnectionLost):
            self.leave(str(error))
            return str(error)

        deadline = Deadline(EXPLANATION_SECONDS)
        try:
            while not isinstance(last := self.control.receive(deadline), End):
                pass
        except ConnectionLost as lost:  # and what became of other connections may follow from that
            return str(lost)
        except (PeerError, OSError):
            return str(error)
        return self._explanation(SessionEnded(one_line(last.reason), denies=last.denies))
