"""How a cache answers on its socket, and how what engines hand over gets onto the shelf.

Engines hand over pages that are sealed, so that nobody can change them any more, themselves included. They are given
away again only after every chunk has been read and has the digest that the engine has told; where it has told none,
digests are made of what lies in the sealed pages. One thread reads, one after another, so that the processors of the
host stay with inference.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from vllm_ascend.model_loader.netloader.cache.contents import Contents, verified
from vllm_ascend.model_loader.netloader.cache.line import Line, Received
from vllm_ascend.model_loader.netloader.cache.messages import (
    Ask,
    Coming,
    Drop,
    Dropped,
    Give,
    Hand,
    HeldWeights,
    Lack,
    Note,
    Over,
    Pass,
    State,
    Taken,
    TakeOver,
    Want,
)
from vllm_ascend.model_loader.netloader.cache.shelf import Item, Shelf
from vllm_ascend.model_loader.netloader.errors import Damaged, NoRoom, PeerError, ProtocolError, TransportError
from vllm_ascend.model_loader.netloader.weights.arena import Arena

logger = logging.getLogger(__name__)

MESSAGE_SECONDS: Final = 10.0
"""For one message, in either direction."""
HANDOVER_SECONDS: Final = 60.0
"""For one step while a new cache process takes over. It has to end sessions of other hosts, for example."""
NEWS_SECONDS: Final = 0.2
"""How often those who wait hear how far what they want has come."""
_LAST_SECONDS: Final = 5.0
"""For the chunk that is being verified when everything ends."""
_BEING_REPLACED: Final = "a new cache process takes over at this moment"


class Checker:
    """Verifies pages and keeps them on `shelf`, in a thread of its own, until `close`."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self._waiting: queue.SimpleQueue[Item | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="netloader-check", daemon=True)
        self._thread.start()

    def take(self, contents: Contents, descriptor: int, reserved: Callable[[Item], object] = lambda _: None) -> None:
        """Makes room for the pages of `descriptor`, which it takes over also if it fails, and verifies them later.

        `reserved` is called with them before that begins. Raises NoRoom if there is no room, TransportError if they are
        not sealed, of another size, or cannot be mapped.
        """
        pages = Arena.adopt(descriptor, contents.nbytes)
        item = self._shelf.reserve(contents, pages)
        reserved(item)
        self._waiting.put(item)

    def close(self) -> None:
        """Ends the thread, once it is done with what is still on the shelf. Idempotent."""
        self._waiting.put(None)
        self._thread.join(_LAST_SECONDS)

    def _run(self) -> None:
        while (item := self._waiting.get()) is not None:
            try:
                self._check(item)
            except Exception:  # nothing may end this thread
                logger.exception("%s could not be verified, and is given up", _name(item))
                self._shelf.give_up(item)

    def _check(self, item: Item) -> None:
        pages = item.pages
        if pages is None:
            return  # it was given up meanwhile
        try:
            contents = verified(item.contents, pages, lambda held: self._shelf.note_progress(item, held))
        except Damaged as error:
            logger.error("%s is given up: %s", _name(item), error)
            self._shelf.give_up(item)
            return
        except OSError:
            if item.is_gone:
                return
            raise
        if contents is not None and self._shelf.complete(item, contents):
            logger.info("holds %s, %.1f MB, root %s", _name(item), item.nbytes / 1e6, contents.root[:16])


@dataclass(frozen=True)
class Keeper:
    """Answers one connection at a time with each of its threads.

    `port` is where other hosts are served, 0 if they are not. `leave` is called when a new cache process wants to have
    everything: it stops what the new one will do; `stay` is called if that one fails after all, and `succeeded` once it
    has everything.
    """

    shelf: Shelf
    checker: Checker
    port: Callable[[], int] = lambda: 0
    leave: Callable[[], None] = lambda: None
    stay: Callable[[], None] = lambda: None
    succeeded: Callable[[], None] = lambda: None

    def attend(self, line: Line) -> None:
        """Answers the question that comes on `line`. Raises PeerError or OSError."""
        with line.receive(MESSAGE_SECONDS) as received:
            match received.message:
                case Want() as want:
                    self._give(line, want)
                case Hand(note=note):
                    self._take(line, note, received)
                case Ask():
                    line.send(self.state(), MESSAGE_SECONDS)
                case Drop(selected=selected):
                    dropped = self.shelf.drop(selected)
                    line.send(Dropped(len(dropped), sum(item.nbytes for item in dropped)), MESSAGE_SECONDS)
                case TakeOver():
                    self._pass_on(line)
                case message:
                    raise ProtocolError(f"a peer of the cache began with {type(message).__name__}")

    def state(self) -> State:
        """What is held at this moment."""
        items = self.shelf.items()[::-1]
        holdings = tuple(
            HeldWeights(
                item.contents.request.identity,
                item.contents.request.coordinates,
                item.nbytes,
                item.held,
                item.contents.root if item.is_whole else "",
                self.shelf.idle_seconds(item),
            )
            for item in items
        )
        return State(holdings, self.shelf.nbytes, self.shelf.max_bytes, os.getpid(), self.port())

    def _give(self, line: Line, want: Want) -> None:
        while True:
            item = self.shelf.find(want)
            if isinstance(item, str):
                line.send(Lack(item[:1000]), MESSAGE_SECONDS)
                return
            if item.is_whole:
                descriptor = self.shelf.descriptor_of(item)
                if descriptor is not None:
                    break
                continue  # it was given up just now
            line.send(Coming(item.held), MESSAGE_SECONDS)
            self.shelf.wait_for_news(item, NEWS_SECONDS)

        try:
            line.send(Give(item.contents.note), MESSAGE_SECONDS, descriptor)
        finally:
            os.close(descriptor)
        logger.info("gave %s to an engine", _name(item))

    def _take(self, line: Line, note: Note, received: Received) -> None:
        if self.shelf.refuses_because:
            raise PeerError(self.shelf.refuses_because)  # without an answer, so that the engine tries again
        try:
            self.checker.take(Contents.told_by(note), received.take())
        except (NoRoom, TransportError) as error:
            logger.warning("takes nothing from an engine: %s", error)
            line.send(Lack(str(error)[:1000]), MESSAGE_SECONDS)
        else:
            line.send(Taken(), MESSAGE_SECONDS)

    def _pass_on(self, line: Line) -> None:
        """Hands everything to a new cache process. If that fails, this one goes on as if nobody had asked."""
        self.shelf.refuse(_BEING_REPLACED)
        try:
            self.leave()
            for item in self.shelf.items():
                descriptor = self.shelf.descriptor_of(item)
                if descriptor is None:
                    continue  # it is still being fetched, which the new one does anew
                try:
                    line.send(Pass(item.contents.note), MESSAGE_SECONDS, descriptor)
                finally:
                    os.close(descriptor)
            line.send(Over(), MESSAGE_SECONDS)
            with line.receive(HANDOVER_SECONDS) as received:
                if not isinstance(received.message, Taken):
                    raise ProtocolError(f"a new cache process answered with {type(received.message).__name__}")
        except (PeerError, OSError) as error:
            logger.warning("a new cache process did not take over: %s", error)
            self.shelf.refuse("")
            self.stay()
        else:
            self.succeeded()


def take_over(line: Line, checker: Checker) -> int:
    """Takes all that an earlier cache process holds, on a connection to it. Returns how many weights that were.

    Whoever calls it then sends Taken. Weights for which there is no room here, or that are not as they should be, are
    left out with a warning. Raises PeerError or OSError.
    """
    line.send(TakeOver(), MESSAGE_SECONDS)
    count = 0
    while True:
        with line.receive(HANDOVER_SECONDS) as received:
            match received.message:
                case Pass(note=note):
                    count += restore(checker, note, received.take())
                case Over():
                    return count
                case message:
                    raise ProtocolError(f"the earlier cache process answered with {type(message).__name__}")


def restore(checker: Checker, note: Note, descriptor: int, reserved: Callable[[Item], object] = lambda _: None) -> bool:
    """Takes weights that an earlier cache process has held, as `Checker.take`.

    Returns whether that was possible; if not, it is logged.
    """
    try:
        contents = Contents.told_by(note)
    except ProtocolError as error:
        os.close(descriptor)
        logger.warning("does not keep what an earlier cache process has held: %s", error)
        return False
    try:
        checker.take(contents, descriptor, reserved)
    except (NoRoom, TransportError) as error:
        logger.warning("does not keep what an earlier cache process has held: %s", error)
        return False
    return True


def _name(item: Item) -> str:
    identity, place = item.contents.request.identity, item.contents.request.coordinates
    return (
        f"the {identity.role} weights of {identity.name} for tp {place.tp_rank} of {place.tp_size}, "
        f"pp {place.pp_rank} of {place.pp_size}, ep {place.ep_rank} of {place.ep_size}"
    )
