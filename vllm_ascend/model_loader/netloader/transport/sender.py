"""The server's half of a transport, for one session.

It sends each chunk that the client asks for, but none more often than any client needs, and knows what was delivered
and how fast the client takes it.
"""

from __future__ import annotations

import contextlib
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Self

from vllm_ascend.model_loader.netloader.errors import ProtocolError
from vllm_ascend.model_loader.netloader.transport import digests
from vllm_ascend.model_loader.netloader.transport.chunks.delivery import TRIES_PER_CHUNK
from vllm_ascend.model_loader.netloader.transport.rate import Rate
from vllm_ascend.model_loader.netloader.transport.store import WeightStore
from vllm_ascend.model_loader.netloader.wire.channel import Channel
from vllm_ascend.model_loader.netloader.wire.messages import Fetch


class Sender(ABC):
    """The server's half of one session. The session's own thread runs it and closes it.

    A transport overrides what it needs of `run`, `gather`, `push` and `attach`; whatever it leaves alone, its clients
    may not ask for.
    """

    def __init__(self, store: WeightStore) -> None:
        """`store` has the chunks that may be sent, and notes those that were."""
        self.rate = Rate()
        """How fast the client takes bytes."""
        self._store = store
        self._nbytes = store.manifest.nbytes
        self._asked_for: Counter[int] = Counter()
        """How often the client has asked for the chunk at each offset."""
        self._sent: dict[int, int] = {}
        """The length of each chunk that was delivered, by its offset."""
        self._being_sent = 0
        self._chunk_over = threading.Condition()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    @abstractmethod
    def parameters(self) -> Mapping[str, str | int]:
        """What the client's half must know: it travels in Accept, as `Reception.parameters`."""

    def run(self) -> None:
        """Does what the server does without being asked, and returns when that is done.

        Raises PeerError or OSError.
        """
        return

    def gather(self, control: Channel) -> None:
        """Makes a process group with the client, which has sent Gather on the `control` connection.

        Raises TransportError where no group comes about, PeerError or OSError where the client failed.
        """
        raise ProtocolError("this session's transport makes no process group")

    def push(self, fetch: Fetch) -> None:
        """Sends the chunk that the client asks for by `fetch` on the control connection. Raises PeerError."""
        raise ProtocolError("this session's transport does not push")

    def attach(self, channel: Channel) -> None:
        """Serves the data connection `channel` until the client or the session ends it. Raises PeerError.

        It runs in the connection's own thread, beside the session's.
        """
        raise ProtocolError("this session's transport has no data connections")

    def idle_seconds(self) -> float:
        """Seconds since the client last took bytes or made other progress."""
        return self.rate.idle_seconds()

    @contextlib.contextmanager
    def sending(self, fetch: Fetch) -> Iterator[None]:
        """A scope within which the chunk that `fetch` asks for is sent; without an exception it counts as delivered.

        Raises ProtocolError for anything but one whole chunk, for one that is not here yet, and for one that was asked
        for more often than any client needs it, since others wait for their turn.
        """
        offset, length = fetch.offset, fetch.length
        whole = min(digests.CHUNK_BYTES, self._nbytes - offset)
        if offset % digests.CHUNK_BYTES or length != whole:
            raise ProtocolError(
                f"Fetch of {length} bytes at {offset}: expected one whole chunk of {digests.CHUNK_BYTES} bytes, or the "
                f"last one of {self._nbytes} bytes"
            )
        number = offset // digests.CHUNK_BYTES
        if self._store.held is not None and number not in self._store.held:
            raise ProtocolError(f"the client asks for the chunk at {offset}, of which it was not told that it is here")
        with self._chunk_over:
            self._asked_for[offset] += 1
            if self._asked_for[offset] > TRIES_PER_CHUNK:
                raise ProtocolError(f"the client asks for the chunk at {offset} more than {TRIES_PER_CHUNK} times")
            self._being_sent += 1

        self._store.sent.add(number)
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
        """Waits up to `seconds` for chunks that are being sent.

        A client may have the last byte, and say so, before the thread that sent it runs again.
        """
        with self._chunk_over:
            self._chunk_over.wait_for(lambda: not self._being_sent, seconds)

    @property
    def delivered(self) -> int:
        """Bytes that were sent to the client; those that were sent twice count once."""
        with self._chunk_over:
            return sum(self._sent.values())

    @property
    def has_delivered_any(self) -> bool:
        """Whether any chunk was sent to the client."""
        return bool(self._sent)

    def was_asked_for(self, number: int) -> bool:
        """Whether the client has asked for that chunk."""
        return bool(self._asked_for.get(number * digests.CHUNK_BYTES))

    @property
    def has_delivered_all(self) -> bool:
        """Whether every byte was sent to the client at least once."""
        return self.delivered == self._nbytes

    def note_progress(self, nbytes: int = 0) -> None:
        """Notes that the client has just taken `nbytes` bytes, or has made progress without any."""
        self.rate.note(nbytes)

    def abort(self) -> None:
        """Ends whatever this sender still does in any thread. From any thread; idempotent."""
        return

    @abstractmethod
    def close(self) -> None:
        """Aborts, and releases everything that the sender holds. For the session's own thread; idempotent."""
