"""What a transport is: one way to bring an address space of bytes from a server's memory into a client's.

A transport has two halves. The client says in Join what it can use (`offer`); the server makes a `Sender` for the
session, whose `parameters` travel in Accept; the client calls `receive` with them. Whether the client pulls
(`Sender.attach`), is sent what it asks for (`Sender.push`), or is handed everything (`Sender.run`) is the transport's
own affair.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Self

from vllm_ascend.model_loader.netloader.errors import ProtocolError
from vllm_ascend.model_loader.netloader.traits import Traits
from vllm_ascend.model_loader.netloader.transport import digests
from vllm_ascend.model_loader.netloader.transport.delivery import TRIES_PER_CHUNK, Delivery
from vllm_ascend.model_loader.netloader.transport.store import WeightStore
from vllm_ascend.model_loader.netloader.weights.memory import Memory
from vllm_ascend.model_loader.netloader.wire.channel import Channel
from vllm_ascend.model_loader.netloader.wire.messages import Fetch, Offer
from vllm_ascend.model_loader.netloader.wire.pacing import Pacer


@dataclass(frozen=True)
class Timeouts:
    """Seconds: to reach and greet a peer, and without any progress in a transfer."""

    connect: float = 10.0
    stall: float = 30.0


RATE_SECONDS: Final = 5.0


@dataclass(frozen=True)
class Reception:
    """All that a client's half needs.

    `control` is the session's own connection and `connect` makes further ones to the same source. `deliver` makes the
    memory to fill and says which chunks of it are missing; `progress` is told the bytes that come without it.
    """

    parameters: Mapping[str, str | int]
    nbytes: int
    control: Channel
    connect: Callable[[], Channel]
    session: bytes
    deliver: Callable[[], Delivery]
    progress: Callable[[int], None]
    timeouts: Timeouts

    def number(self, name: str) -> int:
        """An integer parameter. Raises ProtocolError where the server did not send one."""
        value = self.parameters.get(name)
        if not isinstance(value, int):
            raise ProtocolError(f"the transport parameter {name!r} is {value!r}: expected an integer")
        return value

    def text(self, name: str) -> str:
        """A text parameter. Raises ProtocolError where the server did not send one."""
        value = self.parameters.get(name)
        if not isinstance(value, str):
            raise ProtocolError(f"the transport parameter {name!r} is {value!r}: expected a string")
        return value


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


class Rate:
    """How fast bytes go. Threads may lose an update to one another: nothing is decided by a single one."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._created = self._begin = self._last = clock()
        self._bytes = self._total = 0
        self._before = math.inf

    def note(self, nbytes: int) -> None:
        self._last = now = self._clock()
        self._bytes += nbytes
        self._total += nbytes
        if now - self._begin >= RATE_SECONDS:
            self._before = self._bytes / (now - self._begin)
            self._begin, self._bytes = now, 0

    def idle_seconds(self) -> float:
        return self._clock() - self._last

    def lately(self) -> float:
        """Bytes per second over the last RATE_SECONDS or more; infinite before that."""
        if self.idle_seconds() >= RATE_SECONDS:  # what filled the buffers at once before does not count
            return 0.0
        elapsed = self._clock() - self._begin
        return self._before if elapsed < RATE_SECONDS else self._bytes / elapsed

    def overall(self) -> float:
        """Bytes per second since the beginning."""
        return self._total / max(self._clock() - self._created, 1e-3)


class Transport(ABC):
    """Stateless; one object serves all sessions of a process."""

    traits: Traits
    """Its row of the table, or one of its own where no configuration can name it."""

    @property
    def name(self) -> str:
        return self.traits.name

    def offer(self) -> Offer:
        """What a client says of it in Join."""
        return Offer(self.name)

    def accepts(self, offer: Offer) -> bool:
        """Whether a server can use it with the client that made `offer`."""
        return offer == self.offer()

    @abstractmethod
    def sender(self, store: WeightStore, timeouts: Timeouts, pacer: Pacer) -> Sender:
        """The server's half."""

    @abstractmethod
    def receive(self, reception: Reception) -> Memory:
        """Returns memory that holds all bytes.

        Raises TransportError where this way does not work between these machines, PeerError or OSError where the
        source failed. On failure, nothing writes into the allocated memory any more.
        """
