"""A network that exists only as numbers: events in the order of their times, and transfers that share links.

Every node has a link up and a link down. A transfer runs over the one of its sender and the other of its receiver. The
transfers on a link share it equally, except that what one cannot use, because its other link is narrower, is left to
the others, as TCP connections do it in the long run.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

_SETTLED: Final = 0.01
"""A link whose transfers' share changed by less than this fraction does not trouble other links."""
_LINKS_RESETTLED: Final = 12
"""Links whose shares are computed anew when a transfer begins or ends; what lies farther away hardly changes."""


class Events:
    """What is to happen, and the time."""

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._numbers = itertools.count()

    def after(self, seconds: float, action: Callable[..., None], *arguments: Any) -> None:
        """Lets `action` happen in so many seconds. At equal times, what was asked for first happens first."""
        heapq.heappush(self._heap, (self.now + seconds, next(self._numbers), action, arguments))

    def run(self, is_over: Callable[[], bool]) -> None:
        """Lets everything happen until it is over, or nothing is left."""
        while self._heap and not is_over():
            self.now, _, action, arguments = heapq.heappop(self._heap)
            action(*arguments)


@dataclass(eq=False, repr=False)
class Link:
    """One direction of a node's connection, of `rate` bytes per second."""

    rate: float
    share: float = 0.0
    """Bytes per second that a transfer gets which no other link holds back."""
    transfers: dict[Transfer, Link] = field(default_factory=dict)
    """With the other link of each."""
    carried: float = 0.0
    """Bytes that it has carried."""

    def __post_init__(self) -> None:
        self.share = self.rate

    def fair_share(self) -> float:
        """What a transfer gets that no other link holds back, given what those links allow the others."""
        left, count = self.rate, len(self.transfers)
        limits = sorted(other.share for other in self.transfers.values())
        for number, limit in enumerate(limits):
            if limit * (count - number) >= left:
                return left / (count - number)
            left -= limit
        return left + (limits[-1] if limits else 0.0)


@dataclass(eq=False, repr=False)
class Transfer:
    """So many bytes on their way `up` from a sender and `down` to a receiver."""

    nbytes: float
    up: Link
    down: Link
    done: Callable[[Transfer], None]
    left: float
    rate: float = 0.0
    since: float = 0.0
    version: int = 0


class Network:
    """The transfers in progress. `start` begins one, of which `done` tells the end, unless it is aborted before."""

    def __init__(self, events: Events) -> None:
        self._events = events

    def start(self, nbytes: float, up: Link, down: Link, done: Callable[[Transfer], None]) -> Transfer:
        transfer = Transfer(nbytes, up, down, done, left=nbytes, since=self._events.now)
        up.transfers[transfer] = down
        down.transfers[transfer] = up
        self._resettle(up, down)
        return transfer

    def abort(self, transfer: Transfer) -> float:
        """Ends `transfer` before its time. Returns the bytes that had gone."""
        self._advance(transfer)
        self._remove(transfer)
        return transfer.nbytes - transfer.left

    def _finish(self, transfer: Transfer, version: int) -> None:
        if transfer.version == version:
            self._advance(transfer)
            self._remove(transfer)
            transfer.done(transfer)

    def _remove(self, transfer: Transfer) -> None:
        transfer.version += 1
        del transfer.up.transfers[transfer], transfer.down.transfers[transfer]
        self._resettle(transfer.up, transfer.down)

    def _advance(self, transfer: Transfer) -> None:
        gone = min(transfer.rate * (self._events.now - transfer.since), transfer.left)
        transfer.left -= gone
        transfer.since = self._events.now
        transfer.up.carried += gone
        transfer.down.carried += gone

    def _resettle(self, *links: Link) -> None:
        touched: dict[Transfer, None] = {}
        for link in links:
            touched.update(dict.fromkeys(link.transfers))
        pending = deque(links)
        for _ in range(_LINKS_RESETTLED):
            if not pending:
                break
            link = pending.popleft()
            share = link.fair_share()
            if abs(share - link.share) <= _SETTLED * share:
                continue
            link.share = share
            for transfer, other in link.transfers.items():
                touched[transfer] = None
                if other not in pending:
                    pending.append(other)
        for transfer in touched:
            self._adjust(transfer)

    def _adjust(self, transfer: Transfer) -> None:
        rate = min(transfer.up.share, transfer.down.share)
        if abs(rate - transfer.rate) <= _SETTLED / 10 * rate:
            return
        self._advance(transfer)
        transfer.rate = rate
        transfer.version += 1
        self._events.after(transfer.left / rate, self._finish, transfer, transfer.version)
