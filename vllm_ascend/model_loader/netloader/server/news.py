"""What a client that follows is told: which chunks can be had here, which were sent to others, and who else has them.

The session's own thread tells it, between two messages of its client. A wakeup interrupts its waiting as soon as there
is something, but it tells no more often than a few times in a blink, so that much news makes few messages.
"""

from __future__ import annotations

import time
from typing import Final

from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import Stalled
from vllm_ascend.model_loader.netloader.server.publications import Publication
from vllm_ascend.model_loader.netloader.server.replicas import Copy, Replicas
from vllm_ascend.model_loader.netloader.transport.sender import Sender
from vllm_ascend.model_loader.netloader.wire.channel import Channel, Deadline
from vllm_ascend.model_loader.netloader.wire.messages import NEWS_LIMIT, REFERRALS_LIMIT, Message, News
from vllm_ascend.model_loader.netloader.wire.wakeup import Wakeup

LEAST_SECONDS: Final = 0.02
"""Seconds between two messages of news."""


class Subscription:
    """A client that follows `publication`. For the session's own thread, which closes it."""

    def __init__(
        self, channel: Channel, host: str, publication: Publication, sender: Sender, replicas: Replicas
    ) -> None:
        """`host` is the client's address. Raises OSError if this process has no descriptor left."""
        self._channel = channel
        self._host = host
        self._publication = publication
        self._sender = sender
        self._replicas = replicas
        self._relay: Endpoint | None = None
        self._is_named = False
        self._told_chunks = self._told_sent = 0
        self._told_peers: set[str] = set()
        self._has_new_peers = True
        self._told_whole = False
        self._told_at = 0.0

        self._wakeup = Wakeup()
        store = publication.store
        if store.held is not None:
            store.held.listen(self._wakeup.set)
        store.sent.listen(self._wakeup.set)
        replicas.listen(self._note_peers)

    def close(self) -> None:
        """Ends it. Idempotent."""
        store = self._publication.store
        if store.held is not None:
            store.held.forget(self._wakeup.set)
        store.sent.forget(self._wakeup.set)
        self._replicas.forget_listener(self._note_peers)
        self._wakeup.close()

    def relays_on(self, port: int) -> None:
        """Notes where the client itself can be asked for these weights; 0 for nowhere."""
        if port and self._relay is None:
            self._relay = Endpoint(self._host, port)
            self._told_peers.add(self._replicas.written(self._relay))
            self._publication.joined(self._relay)

    def drop(self) -> None:
        """Names the client to nobody any more: it is gone, or has given up."""
        if self._relay is not None and self._is_named:
            self._replicas.drop(self._relay)

    def receive(self, seconds: float) -> Message | None:
        """The client's next message. None if there is news for it, or after `seconds`. Raises PeerError."""
        soonest = self._told_at + LEAST_SECONDS - time.monotonic()
        try:
            if soonest > 0:
                return self._channel.receive(Deadline(min(soonest, seconds)))
            return self._channel.receive_unless(self._wakeup, Deadline(seconds))
        except Stalled:
            return None

    def tell(self, timeout: float, *, in_any_case: bool = False) -> None:
        """Sends what is new, or with `in_any_case` at least a sign of life. Raises PeerError."""
        self._wakeup.clear()
        self._name()
        while (news := self._news()) != News() or in_any_case:
            self._channel.send(news, timeout)
            self._told_at = time.monotonic()
            in_any_case = False

    def _name(self) -> None:
        """Names the client to others, once it has something from here, so that nobody is named for the asking."""
        if self._relay is not None and not self._is_named and self._sender.has_delivered_any:
            self._is_named = True
            copy = Copy(self._host, self._publication.role, self._publication.store.generation)
            self._replicas.note_relaying(self._relay, copy)

    def _news(self) -> News:
        """What is new, and counts as told from now on."""
        store = self._publication.store
        is_proven = store.digests is None or store.digests.complete
        is_whole = is_proven and not store.is_filling  # before anything is read of what might still be added
        chunks = store.held.since(self._told_chunks, NEWS_LIMIT) if store.held is not None else ()
        self._told_chunks += len(chunks)
        is_whole = is_whole and (store.held is None or self._told_chunks == len(store.held))

        sent = store.sent.since(self._told_sent, NEWS_LIMIT)
        self._told_sent += len(sent)

        tells_whole = is_whole and not self._told_whole
        self._told_whole = is_whole
        others = tuple(number for number in sent if not self._sender.was_asked_for(number))
        return News(chunks, others, self._new_peers(), tells_whole)

    def _new_peers(self) -> tuple[str, ...]:
        """As many of those that were not told yet as one message holds."""
        if not self._has_new_peers:
            return ()
        self._has_new_peers = False  # before anybody is read who might still be added
        copies = self._replicas.known(self._publication.role, self._publication.store.generation)
        known = map(self._replicas.written, copies)
        peers = [each for each in dict.fromkeys(known) if each not in self._told_peers]
        self._has_new_peers = self._has_new_peers or len(peers) > REFERRALS_LIMIT
        self._told_peers.update(peers[:REFERRALS_LIMIT])
        return tuple(peers[:REFERRALS_LIMIT])

    def _note_peers(self) -> None:
        self._has_new_peers = True
        self._wakeup.set()
