"""What a source says on the control connection while its chunks are fetched: what it has, who else has it, and the end.

A source that is there answers, so one that has been silent for too long is gone, even if nothing was asked of it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Protocol

from vllm_ascend.model_loader.netloader.client.verification import Evidence, not_ended
from vllm_ascend.model_loader.netloader.errors import PeerError, ProtocolError, Replaced, Stalled
from vllm_ascend.model_loader.netloader.transport.base import Timeouts
from vllm_ascend.model_loader.netloader.wire.channel import Channel, Deadline
from vllm_ascend.model_loader.netloader.wire.messages import Accept, Confirm, Done, Follow, Message, News
from vllm_ascend.model_loader.netloader.wire.wakeup import Wakeup

_AT_ONCE: Final = 64
"""Messages that are heard before whoever listens looks for something else to do."""
_SIGNS_OF_LIFE: Final = 3
"""How many of them fit into STALL_TIMEOUT."""
PEERS_NAMED: Final = 4096
"""How many peers one source may name."""


class Listener(Protocol):
    """Hears which chunks a source has."""

    def has(self, chunks: Iterable[int]) -> None:
        """Notes that the source says it has `chunks` now."""

    def sent(self, chunks: Iterable[int]) -> None:
        """Notes that the source says it has sent `chunks` to somebody."""


class Following:
    """The control connection of a session after its beginning. For the session's own thread."""

    def __init__(
        self,
        control: Channel,
        timeouts: Timeouts,
        *,
        listener: Listener | None,
        chunks: int,
        has_all: bool,
        port: int,
        named: Callable[[Sequence[str]], object],
        received: Callable[[], int],
    ) -> None:
        """`listener` hears which of the `chunks` the source has, and `named` whom it names; None where nobody follows.

        `has_all` says whether the source had all from the beginning. `port` is where this process relays, or 0.
        `received` tells how many bytes of chunks have come from the source: those are a sign of life, too.
        """
        self.is_whole = has_all
        """Whether the source has all chunks and has had them confirmed."""
        self._control = control
        self._timeouts = timeouts
        self._listener = listener
        self._chunks = chunks
        self._has_all = has_all
        self._port = port
        self._named = named
        self._received = received
        self._received_before = 0
        self._follows = False
        self._told: set[int] = set()
        self._told_sent: set[int] = set()
        self._told_peers: set[str] = set()
        self.has_said_so = False
        """Whether the source has said in News that it is whole."""
        self._follows_said = self._empty_heard = 0
        self._said_at = self._heard_at = self._got_on_at = time.monotonic()

    def follow(self) -> None:
        """Asks for news, if anybody wants them. Raises PeerError."""
        if self._listener is not None:
            self._follows = True
            self._say()

    def attend(self, wakeup: Wakeup) -> None:
        """Hears the source until `wakeup` is set, or until it has said a lot at once. Raises PeerError."""
        for _ in range(_AT_ONCE):
            message = self._hear(wakeup)
            if message is None:
                return
            self.take(message)

    def take(self, message: Message) -> None:
        """Takes in what the source has said. Raises PeerError."""
        news = not_ended(message)
        assert isinstance(news, News)
        assert self._listener is not None
        self._require_news(news)
        self._listener.has(self._new(news.chunks, self._told))
        if news.chunks:
            self._got_on_at = time.monotonic()
        self._listener.sent(self._new(news.sent, self._told_sent))
        self.is_whole = self.is_whole or news.whole
        if news.peers:
            self._named(news.peers)

    def await_whole(self) -> None:
        """Returns when the source has all chunks and has had them confirmed itself, as long as it gets on.

        Raises PeerError.
        """
        if not self._follows:  # because there was nothing to fetch
            self.follow()
        self._got_on_at = time.monotonic()
        with contextlib.closing(Wakeup()) as nothing_else:
            while not self.is_whole:
                left = self._got_on_at + self._timeouts.stall - time.monotonic()
                message = self._hear(nothing_else, Deadline(left)) if left > 0 else None
                if message is None:
                    raise Stalled(self._not_whole())
                self.take(message)

    def confirm(self, accept: Accept, evidence: Evidence | None) -> None:
        """Ends the session that began with `accept`.

        Raises PeerError where the source cannot say that it still has the weights of `evidence`.
        """
        self._control.send(Done(), self._timeouts.connect)
        deadline = Deadline(self._timeouts.stall)
        while isinstance(answer := not_ended(self._control.receive(deadline)), News):
            self.take(answer)

        assert isinstance(answer, Confirm)
        if answer.generation != accept.generation:
            raise Replaced(
                f"its weights changed during the transfer (generation {accept.generation} -> {answer.generation})"
            )
        if evidence is not None and evidence.digests and answer.root != evidence.root:
            raise ProtocolError("the root digest that it confirms is not the one of its chunks")
        if answer.filling:
            raise PeerError("it still loads these weights itself, and can confirm nothing")

    def _hear(self, wakeup: Wakeup, end: Deadline | None = None) -> Message | None:
        """The next message; None as soon as `wakeup` is set, or after `end`. Shows the source that this client is here.

        Raises PeerError.
        """
        stall = self._timeouts.stall
        while end is None or end.remaining():
            wait = self._said_at + stall / _SIGNS_OF_LIFE - time.monotonic() if self._follows else stall
            wait = wait if end is None else min(wait, end.remaining())
            try:
                message = self._control.receive_unless(wakeup, Deadline(max(wait, 0.001)))
            except Stalled as error:
                if not self._follows:
                    continue
                if (received := self._received()) != self._received_before:
                    self._received_before, self._heard_at = received, time.monotonic()
                if time.monotonic() - self._heard_at >= stall:
                    raise Stalled(f"the peer was silent for {stall:g} s") from error
                self._say()
            else:
                self._heard_at = time.monotonic()
                return message
        return None

    def _not_whole(self) -> str:
        stall = self._timeouts.stall
        if len(self._told) == self._chunks:
            return f"it has all chunks and was not sure of them for {stall:g} s"
        return f"it still loads these weights itself, and has got no further for {stall:g} s"

    def _say(self) -> None:
        self._said_at = time.monotonic()
        self._follows_said += 1
        self._control.send(Follow(self._port), self._timeouts.connect)

    def _require_news(self, news: News) -> None:
        """Raises ProtocolError for what keeps this client busy and says nothing.

        A source may say only once for each Follow that there is nothing new.
        """
        before = len(self._told_peers)
        self._told_peers.update(news.peers)
        if len(self._told_peers) != before + len(news.peers):
            raise ProtocolError("it names a peer twice")
        if len(self._told_peers) > PEERS_NAMED:
            raise ProtocolError(f"it names more than {PEERS_NAMED} peers")

        is_empty = not (news.chunks or news.sent or news.peers or (news.whole and not self.has_said_so))
        self.has_said_so = self.has_said_so or news.whole
        self._empty_heard += is_empty
        if self._empty_heard > self._follows_said:
            raise ProtocolError("it says that there is nothing new without being asked")

    def _new(self, numbers: Iterable[int], told: set[int]) -> tuple[int, ...]:
        new = tuple(numbers)
        if any(number >= self._chunks for number in new):
            raise ProtocolError(f"it tells of chunk {max(new)}: there are {self._chunks}")
        before = len(told)
        told.update(new)
        if len(told) != before + len(new):
            raise ProtocolError("it tells of a chunk twice")
        return new
