"""With which of the peers that were named a client has sessions: a value without I/O, threads or a clock, like `swarm`.

Sources name peers of the same weights, and so does this process as a server: whoever joins it as a client relays too.
The sources that the configuration names are no concern of this module.

**By chance.** One of those who name is chosen, then one of the peers that it has named. So whoever names many does not
drown what others have named, and the clients of a server spread. A peer that failed is not tried again, one that had no
room only if it is named again.

**Late ones too.** Whoever gets its first chunk first is named first, so that all would choose the same few, whose links
would then have to carry everything. Therefore one of the chosen gives way to a peer that is named later, with such a
chance that in the end everybody was as likely to be chosen, whenever he was named.

**Both ways.** Peers that join are joined in turn, first of all and beyond `DEGREE`. Otherwise those who came first
would have all their places taken before others are there to be known, nobody would ask the later ones for anything, and
most links up would lie idle. Nobody has more than `SESSIONS` in either direction, which spreads the clients further; a
relay names its peers to whom it has to refuse.

A session with somebody who has long had nothing new gives way to a peer that was not tried yet.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterable, Mapping
from typing import Final, Generic, TypeVar

Peer = TypeVar("Peer", bound=Hashable)

DEGREE: Final = 8
"""Peers that a client chooses by itself."""
SESSIONS: Final = 12
"""Peers that a client takes from at most, those that have joined it included; and those that may join one relay."""
NAMED_BY_ONE: Final = 64
"""Peers that are remembered of one that names others: as many as one message holds."""
NAMING: Final = 64
"""How many are listened to that name others."""
USELESS_SECONDS: Final = 5.0
"""For how long a peer may have nothing new before another one is tried in its place."""


class Peering(Generic[Peer]):
    """The peers that a client knows, and those that it has sessions with or is connecting to.

    Peers are whatever the caller tells them apart by. `itself` are the names of this process, which may be named too.
    """

    def __init__(
        self,
        chance: random.Random,
        *,
        itself: Iterable[Peer] = (),
        degree: int = DEGREE,
        sessions: int = SESSIONS,
    ) -> None:
        self._chance = chance
        self._degree = degree
        self._sessions = sessions
        self._tried = set(itself)
        """Those that are not to be chosen any more."""
        self._itself = frozenset(self._tried)
        self._named: dict[Peer, list[Peer]] = {}
        """By who has named them, in the order in which they were named."""
        self._seen: set[Peer] = set()
        """All that were ever named."""
        self._swaps = 0
        """How many of the chosen are to give way."""
        self._drawn: list[Peer] = []
        """Those for whom they do."""
        self._joined_here: list[Peer] = []
        self._chosen: dict[Peer, None] = {}

    @property
    def chosen(self) -> frozenset[Peer]:
        """Those that were handed out by `choose` and are not lost."""
        return frozenset(self._chosen)

    def named(self, by: Peer, peers: Iterable[Peer]) -> list[Peer]:
        """Notes that `by` has named `peers`. Returns those that are remembered; what is too many is forgotten."""
        if by not in self._named and len(self._named) >= NAMING:
            return []
        known = self._named.setdefault(by, [])
        remembered = []
        for peer in peers:
            if peer not in known and len(known) < NAMED_BY_ONE:
                known.append(peer)
                self._note_seen(peer)
            if peer in known:
                remembered.append(peer)
        return remembered

    def joined_here(self, peer: Peer) -> bool:
        """Notes that `peer`, which relays, has joined this process as a client. Whether it is remembered."""
        is_new = peer not in self._tried and len(self._joined_here) < self._sessions
        if is_new:
            self._joined_here.append(peer)
        return is_new

    def choose(self) -> Peer | None:
        """A peer to connect to now, which counts as chosen from then on; None where there are enough, or none is left.

        Ask again when others were named or have joined, or one is lost.
        """
        self._joined_here = [peer for peer in self._joined_here if peer not in self._tried]
        if self._joined_here and len(self._chosen) < self._sessions:
            peer = self._joined_here.pop()
        elif len(self._chosen) < self._degree and (choices := self._choices()):
            drawn = next((each for each in self._drawn if any(each in peers for peers in choices)), None)
            peer = self._chance.choice(self._chance.choice(choices)) if drawn is None else drawn
        else:
            return None
        self._drawn = [each for each in self._drawn if each != peer]
        self._tried.add(peer)
        self._chosen[peer] = None
        return peer

    def lost(self, peer: Peer, *, was_busy: bool = False) -> None:
        """Notes that there is no session with `peer` any more, or that none came about.

        `was_busy` says that it had no room; then it is tried again if it is named again.
        """
        self._chosen.pop(peer, None)
        if was_busy:
            self._tried.discard(peer)
            for known in self._named.values():
                if peer in known:
                    known.remove(peer)

    def to_leave(self, useless: Mapping[Peer, float]) -> Peer | None:
        """A chosen peer that is to make room for another one, None where none is. The caller ends that session.

        `useless` tells for how many seconds peers have had nothing that is missing here. Ask again when others were
        named, and every now and then.
        """
        if not self._choices():
            self._swaps = 0
            return None
        if len(self._chosen) < self._degree:
            return None
        if self._swaps:
            self._swaps -= 1
            return self._chance.choice(list(self._chosen))
        left = {peer: seconds for peer, seconds in useless.items() if peer in self._chosen}
        peer = max(left, key=lambda each: left[each], default=None)
        return peer if peer is not None and left[peer] >= USELESS_SECONDS else None

    def _note_seen(self, peer: Peer) -> None:
        """Lets one of the chosen give way, with a chance that makes the chosen a fair sample of all that were named."""
        if peer in self._seen or peer in self._itself:
            return
        self._seen.add(peer)
        if len(self._chosen) >= self._degree and self._chance.random() * len(self._seen) < self._degree:
            self._swaps += 1
            self._drawn.append(peer)

    def _choices(self) -> list[list[Peer]]:
        """Those that can be tried, by who has named them."""
        choices = ([peer for peer in known if peer not in self._tried] for known in self._named.values())
        return [peers for peers in choices if peers]
