"""The server's side of one session: from Accept to Confirm, by whatever transport."""

from __future__ import annotations

import logging
import secrets
from dataclasses import dataclass

from vllm_ascend.model_loader.netloader.channel import Channel, Deadline, Stalled
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import ProtocolError, one_line
from vllm_ascend.model_loader.netloader.identity import ModelIdentity, RankCoordinates
from vllm_ascend.model_loader.netloader.protocol import (
    Accept,
    AskDigests,
    Confirm,
    Digests,
    Done,
    End,
    Fetch,
    Leave,
    Message,
    State,
    Verification,
)
from vllm_ascend.model_loader.netloader.transport.base import Sender, Timeouts, Transport
from vllm_ascend.model_loader.netloader.weights import WeightStore

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Publication:
    """One model that is served."""

    identity: ModelIdentity
    coordinates: RankCoordinates
    store: WeightStore

    @property
    def role(self) -> str:
        return self.identity.role


class Session:
    """One client that takes one publication. `run` is for the connection's thread; `end` comes from any other."""

    def __init__(
        self,
        channel: Channel,
        peer: Endpoint,
        *,
        publication: Publication,
        transport: Transport,
        sender: Sender,
        timeouts: Timeouts,
    ) -> None:
        self.id = secrets.token_bytes(16)
        self.peer = peer
        self.publication = publication
        self.sender = sender
        self.channel = channel
        self._transport = transport
        self._timeouts = timeouts
        self._told_digests = False
        self._ended_because: str | None = None

    def end(self, reason: str) -> None:
        """Breaks the transfer off; the client is told `reason`."""
        self._ended_because = reason
        self.sender.abort()
        self.channel.interrupt()

    def run(self) -> bool:
        """Whether the client has everything, and only `confirm` remains. Raises ProtocolError or OSError."""
        complete = False
        try:
            self.channel.send(self._accept(), self._timeouts.connect)
            self.sender.run()
            complete = self._serve()
        except (ProtocolError, OSError):
            if self._ended_because is None:
                raise
        if self._ended_because is None or self.channel.state is State.ENDED:  # the client had left by itself
            return complete
        logger.warning("ended the session of %s: %s", self.peer, self._ended_because)
        self.channel.send(End(self._ended_because), self._timeouts.connect)
        return False

    def confirm(self, current_generation: int) -> None:
        """Lets the client compare what it has with what is held now. Raises ProtocolError."""
        store = self.publication.store
        whole = store.digests.whole if store.digests is not None and self._told_digests else b""
        self.channel.send(Confirm(current_generation, whole), self._timeouts.connect)
        logger.info(
            "%s took the %s weights by %s: %.1f MB",
            self.peer,
            self.publication.role,
            self._transport.name,
            store.manifest.nbytes / 1e6,
        )

    def _accept(self) -> Accept:
        store = self.publication.store
        verification = None
        if store.digests is not None:
            verification = Verification(store.digests.algorithm.name, store.digests.algorithm.salt)
        return Accept(
            session=self.id,
            generation=store.generation,
            transport=self._transport.name,
            parameters=self.sender.parameters,
            attributes=store.attributes,
            fingerprint=self.publication.identity.fingerprint,
            verification=verification,
        )

    def _serve(self) -> bool:
        self.sender.note_progress()
        while True:
            match self._next_message():
                case AskDigests(first, count):
                    self._tell_digests(first, count)
                case Fetch() as fetch:
                    self.sender.note_progress()
                    self.sender.push(fetch)
                case Leave(reason):
                    role, transport = self.publication.role, self._transport.name
                    logger.warning(
                        "%s gave up taking the %s weights by %s: %s", self.peer, role, transport, one_line(reason)
                    )
                    return False
                case Done():
                    return True

    def _tell_digests(self, first: int, count: int) -> None:
        digests = self.publication.store.digests
        if digests is None:
            raise ProtocolError("the client asks for digests, of which it was told that there are none")
        self._told_digests = True
        self.channel.send(Digests(digests.part(first, count)), self._timeouts.connect)
        self.sender.note_progress()

    def _next_message(self) -> Message:
        while True:
            remaining = self._timeouts.stall - self.sender.idle_seconds()
            try:
                return self.channel.receive(Deadline(max(remaining, 0.001)))
            except Stalled as error:
                if self.sender.idle_seconds() >= self._timeouts.stall:
                    raise Stalled(f"the client took nothing for {self._timeouts.stall:g} s") from error
