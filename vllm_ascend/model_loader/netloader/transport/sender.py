"""The server's half of one session: sends the chunks that a client asks for, and counts what was delivered."""

from __future__ import annotations

import contextlib
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Self

from vllm_ascend.model_loader.netloader.errors import ProtocolError
from vllm_ascend.model_loader.netloader.transport import digests
from vllm_ascend.model_loader.netloader.transport.delivery import TRIES_PER_CHUNK
from vllm_ascend.model_loader.netloader.transport.rate import Rate
from vllm_ascend.model_loader.netloader.wire.channel import Channel
from vllm_ascend.model_loader.netloader.wire.messages import Fetch


class Sender(ABC):
    """The server's half of one session. The session's thread runs and closes it."""

    def __init__(self, nbytes: int) -> None:
        """`nbytes` is the size of what may be sent."""
        self._nbytes = nbytes
        self.rate = Rate()
        """At which the client takes bytes."""
        self._asked_for: Counter[int] = Counter()
        self._sent: dict[int, int] = {}
        self._being_sent = 0
        self._chunk_over = threading.Condition()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    @abstractmethod
    def parameters(self) -> Mapping[str, str | int]:
        """What the client's half must know."""

    def run(self) -> None:
        """Does what the server must do by itself; returns when that is done. Raises PeerError or OSError."""
        return

    def gather(self, control: Channel) -> None:
        """Makes a process group with the client, which has asked for it on the control connection.

        Raises TransportError where none comes about, PeerError or OSError where the client failed.
        """
        raise ProtocolError("this session's transport makes no process group")

    def push(self, fetch: Fetch) -> None:
        """Sends what the client asks for on the control connection. Raises PeerError."""
        raise ProtocolError("this session's transport does not push")

    def attach(self, channel: Channel) -> None:
        """Serves a data connection of this session in the connection's own thread. Raises PeerError."""
        raise ProtocolError("this session's transport has no data connections")

    def idle_seconds(self) -> float:
        """Time since the client last took bytes."""
        return self.rate.idle_seconds()

    @contextlib.contextmanager
    def sending(self, fetch: Fetch) -> Iterator[None]:
        """Within it, the chunk that `fetch` asks for is sent, and counts as delivered when that has succeeded.

        Raises ProtocolError for what is not a whole chunk, and for one that was asked for more often than any client
        needs: others want their turn.
        """
        offset, length = fetch.offset, fetch.length
        whole = min(digests.CHUNK_BYTES, self._nbytes - offset)
        if offset % digests.CHUNK_BYTES or length != whole:
            raise ProtocolError(
                f"Fetch of {length} bytes at {offset}: expected one whole chunk of {digests.CHUNK_BYTES} bytes, or the "
                f"last one of {self._nbytes} bytes"
            )
        with self._chunk_over:
            self._asked_for[offset] += 1
            if self._asked_for[offset] > TRIES_PER_CHUNK:
                raise ProtocolError(f"the client asks for the chunk at {offset} more than {TRIES_PER_CHUNK} times")
            self._being_sent += 1
        sent = False
        try:
            yield
            sent = True
        finally:
            with self._chunk_over:
                self._being_sent -= 1
                if sent:
                    self._sent[offset] = length
                self._chunk_over.notify_all()

    def settle(self, seconds: float) -> None:
        """Waits so long for what is being sent.

        A client may have the last byte, and say so, before the thread that sent it runs.
        """
        with self._chunk_over:
            self._chunk_over.wait_for(lambda: not self._being_sent, seconds)

    @property
    def delivered(self) -> int:
        """Bytes that were sent to the client, those that were sent twice counted once."""
        with self._chunk_over:
            return sum(self._sent.values())

    @property
    def has_delivered_all(self) -> bool:
        return self.delivered == self._nbytes

    def note_progress(self, nbytes: int = 0) -> None:
        self.rate.note(nbytes)

    def abort(self) -> None:
        """Ends all that `attach` still serves, from any thread."""
        return

    @abstractmethod
    def close(self) -> None:
        """Aborts and lets go of everything. For the session's own thread; idempotent."""
