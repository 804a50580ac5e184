"""What a transport is: one way to bring a manifest's address space from a server's memory into a client's.

A transport has two halves. In Join the client offers what it can use (`Transport.offer`). The server makes a `Sender`
for the session, and the sender's `parameters` travel to the client in Accept.

What the client's half does depends on whether bytes move. A `CopyingTransport` fills memory of the client's own with
the chunks that are still missing there, and every chunk is verified as it arrives. A `MappingTransport` hands over the
server's own pages, so there is nothing to fill.

Whether a client pulls chunks over data connections (`Sender.attach`), is sent each chunk that it asks for
(`Sender.push`), or is handed everything at once (`Sender.run`) is up to the transport.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec

from vllm_ascend.model_loader.netloader.errors import ProtocolError
from vllm_ascend.model_loader.netloader.traits import Traits
from vllm_ascend.model_loader.netloader.transport.chunks.delivery import Delivery
from vllm_ascend.model_loader.netloader.transport.chunks.inventory import Chunk
from vllm_ascend.model_loader.netloader.transport.sender import Sender
from vllm_ascend.model_loader.netloader.transport.store import WeightStore
from vllm_ascend.model_loader.netloader.weights.arena import Arena
from vllm_ascend.model_loader.netloader.weights.unsealed import UnsealedArena
from vllm_ascend.model_loader.netloader.wire.channel import Channel
from vllm_ascend.model_loader.netloader.wire.messages import Offer
from vllm_ascend.model_loader.netloader.wire.pacing import Pacer
from vllm_ascend.model_loader.netloader.wire.wakeup import Wakeup


@dataclass(frozen=True)
class Timeouts:
    """How long a peer may take, in seconds.

    `connect` is for reaching and greeting it, and for one message. `stall` is for a transfer without any progress.
    """

    connect: float = 10.0
    stall: float = 30.0


@dataclass(frozen=True)
class Reception:
    """What the client's half of a transport knows of its session.

    `parameters` are those of the server's `Sender`, `nbytes` is the size of the whole address space, and `session` is
    the identifier that a data connection must show. `control` is the session's own connection; `connect` opens another
    one to the same server, which the caller closes, and raises PeerError where there is none. `connections` is how many
    of them are worth their threads, None where that is up to the transport.

    `follow` asks the source to say on `control` what is new while chunks move: a transport calls it once it needs no
    other word there but Fetch. `attend` hears what the source says until a wakeup is set, or a little less long, and
    raises PeerError where the source has ended the session or is silent.
    """

    parameters: Mapping[str, str | int]
    nbytes: int
    session: bytes
    control: Channel
    connect: Callable[[], Channel]
    timeouts: Timeouts
    attend: Callable[[Wakeup], None] = Wakeup.wait
    follow: Callable[[], None] = lambda: None
    connections: int | None = None

    def hear(self) -> None:
        """Hears what the source has said by now, if anything."""
        with contextlib.closing(Wakeup()) as wakeup:
            wakeup.set()
            self.attend(wakeup)

    def next_chunk(self, delivery: Delivery) -> Chunk | None:
        """The next chunk to fetch, None where none will come any more. For transports of one thread.

        Hears what the source says before, and as long as there is nothing to fetch.
        """
        with delivery.wakeup() as wakeup:
            wakeup.set()
            while True:
                self.attend(wakeup)
                wakeup.clear()
                if (chunk := delivery.take()) or delivery.is_over:
                    return chunk

    def text(self, name: str) -> str:
        """The text parameter `name`. Raises ProtocolError where the server did not send one."""
        value = self.parameters.get(name)
        if not isinstance(value, str):
            raise ProtocolError(f"the transport parameter {name!r} is {value!r}: expected a string")
        return value


class Transport(ABC):
    """One way to move weights. It keeps no state: one object serves all sessions of a process.

    Derive from `CopyingTransport` or from `MappingTransport`; `traits.copies` says which of the two a transport is.
    """

    traits: Traits
    """Its row of the table, or one of its own where no configuration can name it."""

    @property
    def name(self) -> str:
        """The name by which the configuration and the two peers know it."""
        return self.traits.name

    def offer(self) -> Offer:
        """What a client says of this transport in Join."""
        return Offer(self.name)

    def accepts(self, offer: Offer) -> bool:
        """Whether a server can use this transport with the client that made `offer`."""
        return msgspec.structs.replace(offer, waits=False) == self.offer()

    @abstractmethod
    def sender(self, store: WeightStore, timeouts: Timeouts, pacer: Pacer) -> Sender:
        """The server's half of one session, which sends the contents of `store`. The caller closes it."""


class CopyingTransport(Transport):
    """A transport that copies bytes from the server into memory of the client's own."""

    @abstractmethod
    def receive(self, reception: Reception, delivery: Delivery) -> None:
        """Brings the chunks of `delivery` until there are none left to take; there may be none from the beginning.

        Raises TransportError where this way does not work between these two machines, PeerError or OSError where the
        source failed. Once it has returned or raised, nothing writes into the delivery's memory any more.
        """


class MappingTransport(Transport):
    """A transport by which the client maps the server's own pages, so that nothing is copied."""

    @abstractmethod
    def adopt(self, reception: Reception) -> Arena:
        """The server's arena, sealed, with all `reception.nbytes` bytes. The caller closes it.

        Raises TransportError where this way does not work between these two processes, PeerError where the source
        failed.
        """

    @abstractmethod
    def wait_for(self, reception: Reception) -> UnsealedArena:
        """The arena of a server that still fills it. The caller closes it. Raises as `adopt`."""
