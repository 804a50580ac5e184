"""What a transport is: one way to bring an address space of bytes from a server's arena into a client's.

A transport has two halves. The client says in Join what it can use (`offer`); the server makes a `Sender` for the
session, whose `parameters` travel in Accept; the client calls `receive` with them. Whether the server pushes (in
`Sender.run`) or the client pulls is the transport's own affair.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Final, Protocol, Self

from vllm_ascend.model_loader.netloader.arena import Arena
from vllm_ascend.model_loader.netloader.channel import Channel
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import ProtocolError
from vllm_ascend.model_loader.netloader.protocol import Offer
from vllm_ascend.model_loader.netloader.weights import WeightStore


@dataclass(frozen=True)
class Timeouts:
    """Seconds: to reach and greet a peer, and without any progress in a transfer."""

    connect: float = 10.0
    stall: float = 30.0


class Allocate(Protocol):
    def __call__(self, *, mapped: bool) -> Arena: ...


@dataclass(frozen=True)
class Reception:
    """All that a client's half needs.

    `allocate` gives the arena to fill, its pages being made (`mapped` for filling through the mapping); `progress` is
    told the bytes that arrived, from any thread.
    """

    source: Endpoint
    session: bytes
    parameters: Mapping[str, str | int]
    nbytes: int
    allocate: Allocate
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

    def __init__(self) -> None:
        self._last_progress = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    @abstractmethod
    def parameters(self) -> Mapping[str, str | int]:
        """What the client's half must know."""

    def run(self) -> None:
        """Does what the server must do by itself; returns when that is done. Raises ProtocolError or OSError."""
        return

    def attach(self, channel: Channel) -> None:
        """Serves a data connection of this session in the connection's own thread. Raises ProtocolError."""
        raise ProtocolError("this session's transport has no data connections")

    def idle_seconds(self) -> float:
        """Time since the client last took bytes."""
        return time.monotonic() - self._last_progress

    def note_progress(self) -> None:
        self._last_progress = time.monotonic()

    @abstractmethod
    def close(self) -> None:
        """Ends all that `attach` still serves. Idempotent."""


class Transport(ABC):
    """Stateless; one object serves all sessions of a process."""

    name: ClassVar[str]

    def offer(self) -> Offer:
        """What a client says of it in Join."""
        return Offer(self.name)

    def accepts(self, offer: Offer) -> bool:
        """Whether a server can use it with the client that made `offer`."""
        return offer == self.offer()

    @abstractmethod
    def sender(self, store: WeightStore, server_host: str, timeouts: Timeouts) -> Sender:
        """The server's half. `server_host` is the address under which the client reached this server."""

    @abstractmethod
    def receive(self, reception: Reception) -> Arena:
        """Returns an arena that holds all bytes.

        Raises TransportError where this way does not work between these machines, ProtocolError or OSError where the
        source failed. On failure, nothing writes into the allocated arena any more.
        """


CHUNK_BYTES: Final = 16 << 20
"""Bytes that are asked for and moved as one."""
