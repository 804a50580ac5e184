"""The server's side of one session: from Accept to Confirm, whatever the transport.

Once `end` is called, the session is over whatever its client does. It takes no further message, and tells the client
why if the client still listens. If it is there END_SECONDS later all the same, its connection is closed under it. So
weights that are about to move or change never wait for a client.
"""

from __future__ import annotations

import logging
import secrets
from collections import Counter
from typing import Final

from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import PeerError, ProtocolError, Stalled, TransportError, one_line
from vllm_ascend.model_loader.netloader.server.news import Subscription
from vllm_ascend.model_loader.netloader.server.peer_log import PeerLog
from vllm_ascend.model_loader.netloader.server.publications import Publication
from vllm_ascend.model_loader.netloader.server.replicas import Replicas
from vllm_ascend.model_loader.netloader.transport.base import Timeouts, Transport
from vllm_ascend.model_loader.netloader.transport.chunks.delivery import TRIES_PER_CHUNK
from vllm_ascend.model_loader.netloader.transport.digests import BLAKE3
from vllm_ascend.model_loader.netloader.transport.sender import Sender
from vllm_ascend.model_loader.netloader.wire.channel import Channel, Deadline
from vllm_ascend.model_loader.netloader.wire.conversation import State
from vllm_ascend.model_loader.netloader.wire.messages import (
    Accept,
    AskDigests,
    Confirm,
    Digests,
    Done,
    End,
    Fetch,
    Follow,
    Gather,
    Leave,
    Message,
)

END_SECONDS: Final = 1.0
"""Seconds in which a client can be told why its session was ended. It is short, because somebody waits for the end."""
SETTLE_SECONDS: Final = 1.0
"""Seconds in which the threads that sent the last bytes can note that, once the client says that it has them."""


class _Ended(Exception):
    """Somebody has called `end`."""


class ServerSession:
    """One client that takes one publication.

    `run` and then `confirm` are for the thread of its connection; `end` is for any other thread. The creator closes the
    sender and the channel.
    """

    def __init__(
        self,
        channel: Channel,
        peer: Endpoint,
        *,
        publication: Publication,
        transport: Transport,
        sender: Sender,
        replicas: Replicas,
        timeouts: Timeouts,
        log: PeerLog,
    ) -> None:
        self.id = secrets.token_bytes(16)
        self.peer = peer
        self.publication = publication
        self.sender = sender
        self.channel = channel
        self._transport = transport
        self._timeouts = timeouts
        self._log = log
        self._replicas = replicas
        self._subscription: Subscription | None = None
        self._told: Counter[int] = Counter()
        """How often the client was told the digest of each chunk."""
        self._ended_because: str | None = None
        self._denies = False

    def end(self, reason: str, *, denies: bool = True) -> None:
        """Breaks the transfer off and lets the client be told `reason`, the first one if there are several.

        `denies` says whether these weights may be others by now, or none.

        Does not block. Whoever calls it shuts the channel down if the session is not over after END_SECONDS.
        """
        # The reason comes first, because the session's thread looks for it as soon as its transfer breaks off.
        if self._ended_because is None:
            self._denies = denies
            self._ended_because = reason
        self.sender.abort()
        self.channel.interrupt()

    @property
    def has_ended(self) -> bool:
        """Whether it was broken off, by `end` or because its transport failed."""
        return self._ended_because is not None

    def run(self) -> bool:
        """Lets the client take what it asks for. Whether it has everything, so that only `confirm` remains.

        Raises PeerError or OSError if the client or its connection fails.
        """
        complete = False
        try:
            complete = self._run()
        except (PeerError, OSError):
            self._drop()
            raise
        if not complete and self._ended_because is None:
            self._drop()
        return complete

    def close(self) -> None:
        """Ends what the session has begun beside its sender. Idempotent."""
        if self._subscription is not None:
            self._subscription.close()

    def _drop(self) -> None:
        if self._subscription is not None:
            self._subscription.drop()

    def _run(self) -> bool:
        complete = False
        try:
            self.channel.send(self._accept(), self._timeouts.connect)
            self.sender.run()
            complete = self._serve()
        except TransportError as error:
            self._ended_because = self._ended_because or one_line(str(error))
        except (_Ended, PeerError, OSError):
            if self._ended_because is None:
                raise

        if self._ended_because is None or self.channel.state is State.ENDED:  # the client has left by itself
            return complete
        self._say(logging.WARNING, "ended the session of %s: %s", self.peer, self._ended_because)
        self.channel.send(End(self._ended_because, self._denies), END_SECONDS)
        return False

    def confirm(self, current_generation: int) -> None:
        """Lets the client compare what it has with what is served now. Raises PeerError.

        `current_generation` is 0 if nothing is served in its role any more.
        """
        store = self.publication.store
        root = store.root_if_known()
        self.channel.send(Confirm(current_generation, root, store.is_filling), self._timeouts.connect)

        role, transport = self.publication.role, self._transport.name
        taken, whole = self.sender.delivered / 1e6, store.manifest.nbytes / 1e6
        if self.sender.has_delivered_all:
            self._say(logging.INFO, "%s took the %s weights by %s: %.1f MB", self.peer, role, transport, whole)
        else:
            text = "%s has the %s weights: it took %.1f of %.1f MB here, by %s"
            self._say(logging.INFO, text, self.peer, role, taken, whole, transport)

    def _say(self, level: int, message: str, *arguments: object) -> None:
        self._log.say(level, self.peer.host, message, *arguments)

    def _accept(self) -> Accept:
        store = self.publication.store
        return Accept(
            session=self.id,
            generation=store.generation,
            transport=self._transport.name,
            parameters=self.sender.parameters,
            attributes=store.attributes,
            fingerprint=self.publication.identity.fingerprint,
            digest=BLAKE3 if store.digests is not None else "",
            root=store.root_if_known(),
            filling=store.is_filling,
        )

    def _serve(self) -> bool:
        """Answers the client's messages until it is done (True) or leaves (False)."""
        self.sender.note_progress()
        while True:
            match self._next_message():
                case AskDigests(first, count):
                    self._tell_digests(first, count)
                case Gather():
                    self.sender.gather(self.channel)
                    self.sender.note_progress()
                case Follow(port):
                    self._follow(port)
                case Fetch() as fetch:
                    self.sender.note_progress()
                    self.sender.push(fetch)
                case Leave(reason):
                    role, transport = self.publication.role, self._transport.name
                    text = "%s gave up taking the %s weights by %s: %s"
                    # Who follows has other sources, and may leave one for another; who has begun nothing lacks nothing.
                    has_begun = self.sender.delivered and self._subscription is None
                    level = logging.WARNING if has_begun else logging.INFO
                    self._say(level, text, self.peer, role, transport, reason)
                    return False
                case Done():
                    self.sender.settle(SETTLE_SECONDS)
                    self._require_proven()
                    return True

    def _require_proven(self) -> None:
        """Raises TransportError if the client has digests of something else than was loaded."""
        digests = self.publication.store.digests
        if self._told and digests is not None and not digests.prove():
            raise TransportError("its weights are not as they were loaded, so they were changed by something unknown")

    def _follow(self, port: int) -> None:
        """Tells the client what is new from now on; each further time, that this server is still there."""
        if self._subscription is None:
            self._subscription = Subscription(
                self.channel, self.peer.host, self.publication, self.sender, self._replicas
            )
        self._subscription.relays_on(port)
        self.sender.note_progress()
        self._subscription.tell(self._timeouts.connect, in_any_case=True)

    def _tell_digests(self, first: int, count: int) -> None:
        digests = self.publication.store.digests
        if digests is None:
            raise ProtocolError("the client asks for digests, of which it was told that there are none")
        if first >= digests.count:
            raise ProtocolError(f"the client asks for digests from chunk {first} on: there are {digests.count} chunks")

        asked = range(first, min(first + count, digests.count))
        if any(self._told[number] >= TRIES_PER_CHUNK for number in asked):
            raise ProtocolError(f"the client asks for a digest more than {TRIES_PER_CHUNK} times")

        # Only digests that are new to the client are progress: asking for the same ones again keeps no session alive.
        is_progress = not all(number in self._told for number in asked)
        if not is_progress and self.sender.idle_seconds() >= self._timeouts.stall:
            raise self._stalled()

        told: list[bytes] = []
        for number in asked:  # each may have to be made first, which takes time
            self._require_going_on()
            told += digests.part(number, 1)

        self._told.update(asked)
        self.channel.send(Digests(tuple(told)), self._timeouts.connect)
        if is_progress:
            self.sender.note_progress()

    def _stalled(self) -> Stalled:
        return Stalled(f"the client took nothing for {self._timeouts.stall:g} s")

    def _next_message(self) -> Message:
        """The client's next message. Raises PeerError, or _Ended even if a message has arrived before the end."""
        while True:
            self._require_going_on()
            if self._subscription is not None:
                self._subscription.tell(self._timeouts.connect)
            message = self._receive(max(self._timeouts.stall - self.sender.idle_seconds(), 0.001))
            self._require_going_on()
            if message is not None:
                return message
            if self.sender.idle_seconds() >= self._timeouts.stall:
                raise self._stalled()

    def _receive(self, seconds: float) -> Message | None:
        """The client's next message, None where none comes within `seconds` or before there is news for the client."""
        if self._subscription is not None:
            return self._subscription.receive(seconds)
        try:
            return self.channel.receive(Deadline(seconds))
        except Stalled:
            return None

    def _require_going_on(self) -> None:
        if self._ended_because is not None:
            raise _Ended
