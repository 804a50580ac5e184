"""What a cache holds: in what order it is given up, and how many bytes it may be. No sockets and no threads.

Weights are on the shelf from the moment when room is made for them. They are given to nobody before they are complete
and verified; whoever wants them can wait for that. Of one rank of one model there is one: weights of another checkpoint
take the place of earlier ones, because an engine without files could be given either.

All pages count, whoever has made them: as long as this process holds them, nobody else can have their memory.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

from vllm_ascend.model_loader.netloader.cache.contents import Contents
from vllm_ascend.model_loader.netloader.cache.messages import Want
from vllm_ascend.model_loader.netloader.errors import NoRoom
from vllm_ascend.model_loader.netloader.weights.arena import Arena


@dataclass(eq=False)
class Item:
    """The weights of one rank. Only the shelf changes it.

    `held` bytes are there for certain. `pages` are None as long as somebody else fills them.
    """

    contents: Contents
    used_at: float
    pages: Arena | None = None
    held: int = 0
    is_whole: bool = False
    is_gone: bool = False
    number: int = field(default=0)
    """Distinguishes it from all others of its shelf, in the order in which they came."""

    @property
    def nbytes(self) -> int:
        return self.contents.nbytes


class Watcher(Protocol):
    """Is told what is on a shelf. It must neither block nor raise."""

    def kept(self, item: Item) -> None:
        """`item` is complete and verified, and may be given away from now on."""

    def gone(self, item: Item) -> None:
        """`item` is given up, whether it was kept before or not."""


class Shelf:
    """Weights of at most `max_bytes` bytes. Thread-safe. `clock` counts seconds."""

    def __init__(self, max_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.max_bytes = max_bytes
        self._watchers: list[Watcher] = []
        self._clock = clock
        self._changed = threading.Condition()
        self._items: list[Item] = []
        self._count = 0
        self.refuses_because = ""
        """Why nothing is taken at the moment; empty if it is."""

    @property
    def nbytes(self) -> int:
        """The size of all that is on the shelf, that included which is still being filled."""
        with self._changed:
            return sum(item.nbytes for item in self._items)

    def items(self) -> list[Item]:
        """Everything, the latest used last."""
        with self._changed:
            return sorted(self._items, key=lambda item: (item.used_at, item.number))

    def reserve(self, contents: Contents, pages: Arena | None = None, *, root: str = "") -> Item:
        """Makes room for weights that will be complete later. `complete` or `give_up` follows.

        `root` is the root digest that they are to have, where it is known. Other weights of their rank are given up,
        also if there is no room. It takes over `pages`, also if it fails. Raises NoRoom if there is no room, whatever
        was given up for it.
        """
        with self._changed, contextlib.ExitStack() as on_failure:
            if pages is not None:
                on_failure.callback(pages.close)
            if self.refuses_because:
                raise NoRoom(self.refuses_because)

            for item in self.items():
                if _is_replaced(item.contents, contents, root):
                    self._remove(item)
            others = [item for item in self.items() if item.pages is not None]
            left = sum(item.nbytes for item in self._items if item.pages is None)
            if left + contents.nbytes > self.max_bytes:
                raise NoRoom(
                    f"the weights have {contents.nbytes} bytes, and the cache may hold {self.max_bytes}, of which "
                    f"{left} are being filled: start it with a higher --max-bytes"
                )
            while others and self.nbytes + contents.nbytes > self.max_bytes:
                self._remove(others.pop(0))

            on_failure.pop_all()
            self._count += 1
            item = Item(contents, self._clock(), pages, number=self._count)
            self._items.append(item)
            return item

    def note_progress(self, item: Item, held: int) -> bool:
        """Notes that `held` bytes of `item` are there for certain. Returns whether anybody still wants the rest."""
        with self._changed:
            item.held = held
            self._changed.notify_all()
            return not item.is_gone

    def complete(self, item: Item, contents: Contents, pages: Arena | None = None) -> bool:
        """Keeps `item`, whose weights are verified; `contents` has their digests. It takes over `pages` if given.

        Returns False, having closed the pages, if it was given up meanwhile or is there already.
        """
        assert contents.digests is not None, "what is not verified cannot be kept"
        with self._changed:
            if item.is_gone:
                if pages is not None:
                    pages.close()
                return False
            item.pages = pages or item.pages
            assert item.pages is not None, "there is nothing to keep"

            others = [each for each in self._items if each is not item and each.contents.is_of_the_same_rank(contents)]
            for other in others:
                if other.is_whole and other.contents.root == contents.root:
                    if _has_nothing_new(contents, other.contents):
                        self._remove(item)
                        self._use(other)
                        return False
                    contents = replace(contents, guards=contents.guards | other.contents.guards)
                self._remove(other)

            item.contents, item.held, item.is_whole = contents, contents.nbytes, True
            self._use(item)
            for watcher in self._watchers:
                watcher.kept(item)
            self._changed.notify_all()
            return True

    def give_up(self, item: Item) -> None:
        """Gives up `item` with its pages. Idempotent."""
        with self._changed:
            self._remove(item)

    def find(self, want: Want) -> Item | str:
        """What an engine wants, complete or not yet. If there is nothing of the kind, why the nearest one is not it."""
        with self._changed:
            reasons = [(item.contents.why_not(want), item) for item in reversed(self.items())]
            for is_whole in (True, False):
                for reason, item in reasons:
                    if not reason and item.is_whole is is_whole:
                        self._use(item)
                        return item
            return min((reason for reason, _ in reasons), key=len, default="the cache holds nothing")

    def wait_for_news(self, item: Item, seconds: float) -> None:
        """Waits until `item` is complete or gone, at most so many seconds."""
        with self._changed:
            self._changed.wait_for(lambda: item.is_whole or item.is_gone, seconds)

    def descriptor_of(self, item: Item) -> int | None:
        """A duplicate of the descriptor of the pages of `item`, None if it has none now. The caller closes it.

        Raises OSError where this process has no descriptor left.
        """
        with self._changed:
            return os.dup(item.pages.descriptor) if item.pages is not None and not item.is_gone else None

    def idle_seconds(self, item: Item) -> float:
        """For how long nobody has asked for `item`."""
        return max(0.0, self._clock() - item.used_at)

    def drop(self, selected: str) -> list[Item]:
        """Gives up everything whose root digest begins with `selected`, or whose model has that name; all if empty."""
        with self._changed:
            dropped = [item for item in self._items if _is_selected(item, selected)]
            for item in dropped:
                self._remove(item)
            return dropped

    def watch(self, watcher: Watcher) -> None:
        """Tells `watcher` of all that is kept, now and from now on."""
        with self._changed:
            for item in self.items():
                if item.is_whole:
                    watcher.kept(item)
            self._watchers.append(watcher)

    def unwatch(self, watcher: Watcher) -> None:
        """Tells `watcher` nothing more."""
        with self._changed:
            self._watchers.remove(watcher)

    def stop_watching(self) -> None:
        """Tells nobody anything more."""
        with self._changed:
            self._watchers.clear()

    def refuse(self, reason: str) -> None:
        """Takes nothing more, for `reason`; an empty one lifts that."""
        with self._changed:
            self.refuses_because = reason

    def _use(self, item: Item) -> None:
        item.used_at = self._clock()

    def _remove(self, item: Item) -> None:
        if item.is_gone:
            return
        item.is_gone = True
        self._items.remove(item)
        for watcher in self._watchers:
            watcher.gone(item)
        if item.pages is not None:  # whoever reads them now has a mapping of them
            item.pages.close()
            item.pages = None
        self._changed.notify_all()


def _is_replaced(earlier: Contents, later: Contents, root: str) -> bool:
    """Whether `later`, with that `root`, is known already to be other weights of the same rank than `earlier`."""
    if not earlier.is_of_the_same_rank(later):
        return False
    fingerprints = {each.request.identity.fingerprint for each in (earlier, later)} - {""}
    roots = {earlier.root, later.root or root} - {""}
    return len(fingerprints) > 1 or len(roots) > 1


def _has_nothing_new(later: Contents, earlier: Contents) -> bool:
    """Whether `later` says nothing of the same bytes that `earlier` does not say."""
    fingerprint = later.request.identity.fingerprint
    return fingerprint in ("", earlier.request.identity.fingerprint) and later.guards <= earlier.guards


def _is_selected(item: Item, selected: str) -> bool:
    root, name = item.contents.root, item.contents.request.identity.name
    return not selected or name == selected or (item.is_whole and root.startswith(selected))
