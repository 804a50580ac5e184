"""What a transport is: one way to bring an address space of bytes from a server's memory into a client's.

A transport has two halves. The client says in Join what it can use (`offer`); the server makes a `Sender` for the
session, whose `parameters` travel in Accept; the client calls `receive` with them. Whether the client pulls
(`Sender.attach`), is sent what it asks for (`Sender.push`), or is handed everything (`Sender.run`) is the transport's
own affair.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from vllm_ascend.model_loader.netloader.errors import ProtocolError
from vllm_ascend.model_loader.netloader.traits import Traits
from vllm_ascend.model_loader.netloader.transport.delivery import Delivery
from vllm_ascend.model_loader.netloader.transport.sender import Sender
from vllm_ascend.model_loader.netloader.transport.store import WeightStore
from vllm_ascend.model_loader.netloader.weights.memory import Memory
from vllm_ascend.model_loader.netloader.wire.channel import Channel
from vllm_ascend.model_loader.netloader.wire.messages import Offer
from vllm_ascend.model_loader.netloader.wire.pacing import Pacer


@dataclass(frozen=True)
class Timeouts:
    """Seconds: to reach and greet a peer, and without any progress in a transfer."""

    connect: float = 10.0
    stall: float = 30.0


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
