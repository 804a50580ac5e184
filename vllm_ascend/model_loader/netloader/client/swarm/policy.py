"""Which chunk is asked of which source, where several bring the same weights at once.

A value without I/O, threads, a clock or chance of its own. Whoever drives it tells it what each source has and what
arrives, under one lock, and asks it for the next request to a source.

**The rarest first.** A chunk that few sources have is asked for before those that many have, so that every client soon
has something that others lack, and the source that alone has all sends each chunk about once. Ties fall differently for
every client: each has the chunks in an order of its own, made by chance. A source may tell what it has sent to others;
that counts as one more who has it, because a client hears of it before the chunk has arrived there.

**Fast sources more.** About `WINDOW` requests are on their way, shared out equally, and each chunk that arrives leads
to the next request to its source. So whoever is fast is asked more often. Shares by speed would be wrong: where this
client's own link is the narrow one, a source has the speed that it is given, and whoever is ahead would get it all.
More requests would fill queues in front of the sources, where a chunk waits that could have come from a relay by then;
and when little is missing, everybody would have asked the one that has everything for the same. At the beginning it is
one, and one more for each chunk that has arrived: where many start together, each soon has a whole chunk to pass on,
instead of parts of many.

**The end.** When everything has been asked for, a source with nothing to do is asked for a chunk that is late at
another, if it would bring it in a fraction of the time; so a slow source, or one that has fallen silent, does not hold
up the end. That is done for at most one chunk in `TWICE`, since whatever comes second is thrown away.

Sets of chunks are integers with a bit for each. For 25,000 chunks that is three kilobytes, over which an operation
takes about a microsecond, so there are no structures to keep beside them.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

Source = TypeVar("Source", bound=Hashable)

WINDOW: Final = 8
"""Requests on their way at once, shared out to all sources, those included that have nothing now; at least one each."""
FIRST: Final = 1
"""Requests on their way before the first chunk has arrived."""
TWICE: Final = 50
"""One chunk in so many may be asked for at a second source while the first still has to bring it."""
CLEARLY_SOONER: Final = 2.0
"""A late chunk is asked for at another source if that would bring it in this fraction (one in so many) of the time."""
_WEIGHT_OF_NEWS: Final = 0.3
"""How much the latest chunk counts in the pace of a source: the last few decide."""


@dataclass
class _Request:
    begun: float
    due: float
    """When the chunk is expected, by the pace of its source and by what it had to bring before."""


@dataclass(eq=False)
class _Source:
    """What is known of a source. `has` and `doubted` are sets of chunks; `doubted` are those it has sent damaged."""

    has: int = 0
    doubted: int = 0
    requests: dict[int, _Request] = field(default_factory=dict)
    pace: float | None = None
    """Seconds for a byte while it had something to bring. None before its first chunk."""
    last: float = 0.0
    """When its latest chunk arrived."""

    def note_arrival(self, request: _Request, length: int, now: float) -> None:
        pace = max(now - max(request.begun, self.last), 1e-9) / length
        self.pace = pace if self.pace is None else self.pace + _WEIGHT_OF_NEWS * (pace - self.pace)
        self.last = now


class Swarm(Generic[Source]):
    """The chunks of one load and the sources that bring them.

    Sources are whatever the caller tells them apart by. A chunk that was handed out (`next_for`) is on its way until it
    has arrived, or is given back because it was damaged, the source lacks it, or the source is gone. Times are seconds
    of any clock that does not go back.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        chance: random.Random,
        *,
        held: Iterable[int] = (),
        window: int = WINDOW,
    ) -> None:
        """`lengths` are those of all chunks, in bytes, and `held` the numbers of the chunks that are here already."""
        self._lengths = lengths
        self._chunk_of = list(range(len(lengths)))
        chance.shuffle(self._chunk_of)
        self._bit_of = [0] * len(lengths)
        for bit, chunk in enumerate(self._chunk_of):
            self._bit_of[chunk] = bit
        self._window = window
        self._arrived = 0
        """Chunks that were not held from the beginning."""

        self._all = (1 << len(lengths)) - 1
        self._missing = self._all ^ self._set_of(held)
        self._wanted = self._missing
        """Those that are missing and that no source has been asked for."""
        self._asked: dict[int, list[_Source]] = {}
        """The sources that are to bring a missing chunk."""
        self._sent = 0
        """Those that a source is known to have sent to somebody."""
        self._spread = _Counts()
        """How many have each chunk, as far as this client knows."""
        self._sources: dict[Source, _Source] = {}
        self.asked_twice = 0
        """Chunks that were asked for at a second source before the first had failed."""

    @property
    def is_complete(self) -> bool:
        """Whether every chunk has arrived."""
        return not self._missing

    @property
    def missing(self) -> int:
        """How many chunks have not arrived."""
        return self._missing.bit_count()

    @property
    def sources(self) -> tuple[Source, ...]:
        """Those that have joined and are not gone."""
        return tuple(self._sources)

    def __contains__(self, source: Source) -> bool:
        """Whether `source` has joined and is not gone."""
        return source in self._sources

    def joined(self, source: Source, chunks: Iterable[int] | None = None) -> None:
        """Notes that `source`, which is new, has `chunks`; None means all."""
        if source in self._sources:
            raise ValueError(f"{source} has joined already")
        has = self._all if chunks is None else self._set_of(chunks)
        self._sources[source] = _Source(has)
        self._spread.add(has)

    def has(self, source: Source, chunks: Iterable[int]) -> bool:
        """Notes that `source` has `chunks` since a moment ago. Whether any of them is wanted."""
        state = self._sources[source]
        new = self._set_of(chunks)
        new ^= new & state.has
        state.has |= new
        self._spread.add(new)
        return bool(new & self._wanted)

    def sent(self, chunks: Iterable[int]) -> None:
        """Notes that a source has sent `chunks` to somebody, where they will soon be."""
        new = self._set_of(chunks)
        new ^= new & self._sent
        self._sent |= new
        self._spread.add(new)

    def is_useful(self, source: Source) -> bool:
        """Whether `source` has anything that is missing here, asked for or not."""
        return bool(self._sources[source].has & self._missing)

    def is_asked(self, source: Source) -> bool:
        """Whether `source` has to bring anything that it was asked for."""
        return bool(self._sources[source].requests)

    def next_for(self, source: Source, now: float) -> int | None:
        """The chunk to ask `source` for now, which is on its way from then on; None where there is nothing to ask for.

        Ask again when the source has more, when any chunk has arrived or was given back, and, while chunks are missing,
        every now and then: that another source is late is told by nothing but time.
        """
        state = self._sources[source]
        window = min(self._window, FIRST + self._arrived)
        if len(state.requests) >= max(1, window // len(self._sources)):
            return None
        chunk = self._rarest(state)
        if chunk is None:
            chunk = self._late(state, now)
        if chunk is None:
            return None

        self._wanted &= ~(1 << self._bit_of[chunk])
        self._asked.setdefault(chunk, []).append(state)
        state.requests[chunk] = _Request(now, now + self._seconds(state, chunk))
        return chunk

    def arrived(self, source: Source, chunk: int, now: float) -> bool:
        """Notes that `chunk` has come from `source` and passed. Whether it is the first that did.

        It counts from a source that is gone, too.
        """
        state = self._sources.get(source)
        if state is not None and (request := state.requests.pop(chunk, None)) is not None:
            state.note_arrival(request, self._lengths[chunk], now)

        bit = 1 << self._bit_of[chunk]
        if not self._missing & bit:
            return False
        self._missing ^= bit
        self._arrived += 1
        self._wanted &= ~bit
        self._asked.pop(chunk, None)
        return True

    def damaged(self, source: Source, chunk: int) -> None:
        """Notes that `chunk` came from `source` and was damaged. It is asked for there again only if nobody else has
        it.
        """
        state = self._sources[source]
        state.doubted |= 1 << self._bit_of[chunk]
        self._give_back(state, chunk)

    def lacks(self, source: Source, chunk: int) -> None:
        """Notes that `source` does not have `chunk`, whatever it has said before."""
        state = self._sources[source]
        absent = state.has & 1 << self._bit_of[chunk]
        state.has ^= absent
        self._spread.subtract(absent)
        self._give_back(state, chunk)

    def gone(self, source: Source) -> tuple[int, ...]:
        """Forgets `source`. Returns the chunks that it was to bring and that are wanted again."""
        state = self._sources.pop(source)
        self._spread.subtract(state.has)
        return tuple(chunk for chunk in tuple(state.requests) if self._give_back(state, chunk))

    def _give_back(self, state: _Source, chunk: int) -> bool:
        """Ends the request to a source. Whether the chunk is wanted again."""
        if state.requests.pop(chunk, None) is None or chunk not in self._asked:
            return False
        others = self._asked[chunk]
        others.remove(state)
        if others:
            return False
        del self._asked[chunk]
        self._wanted |= 1 << self._bit_of[chunk]
        return True

    def _rarest(self, state: _Source) -> int | None:
        candidates = self._wanted & state.has
        if doubted := candidates & state.doubted:
            elsewhere = 0
            for other in self._sources.values():
                if other is not state:
                    elsewhere |= other.has & ~other.doubted
            candidates ^= doubted & elsewhere
            candidates = candidates & ~doubted or candidates  # whatever else there is comes first
        if not candidates:
            return None
        return self._chunk_of[_lowest(self._spread.least(candidates))]

    def _late(self, state: _Source, now: float) -> int | None:
        """A chunk that this source would bring clearly sooner than the one that was asked for it."""
        if self._wanted or state.requests or self.asked_twice >= max(1, len(self._lengths) // TWICE):
            return None
        pace = state.pace or max((each.pace for each in self._sources.values() if each.pace), default=None)
        if pace is None:
            return None

        latest, chosen = 0.0, None
        for chunk, asked in self._asked.items():
            bit = 1 << self._bit_of[chunk]
            if len(asked) > 1 or not state.has & bit or state.doubted & bit:
                continue
            left = asked[0].requests[chunk].due - now
            # Whoever is late is expected to be late by as much again.
            left = max(left, -left)
            if left > latest and left > CLEARLY_SOONER * pace * self._lengths[chunk]:
                latest, chosen = left, chunk
        self.asked_twice += chosen is not None
        return chosen

    def _seconds(self, state: _Source, chunk: int) -> float:
        """How long a source is expected to take for one more chunk; 0 where nothing is known."""
        return (state.pace or 0.0) * self._lengths[chunk] * (len(state.requests) + 1)

    def _set_of(self, chunks: Iterable[int]) -> int:
        numbers = tuple(chunks)
        if len(numbers) == 1:
            return 1 << self._bit_of[numbers[0]]
        data = bytearray(len(self._lengths) // 8 + 1)
        for chunk in numbers:
            bit = self._bit_of[chunk]
            data[bit >> 3] |= 1 << (bit & 7)
        return int.from_bytes(data, "little")


class _Counts:
    """Counts for all chunks at once: the bits of the counts lie in `_planes`, the lowest first, a bit per chunk."""

    def __init__(self) -> None:
        self._planes: list[int] = []

    def add(self, chunks: int) -> None:
        """Raises the count of each of `chunks` by one."""
        for number, plane in enumerate(self._planes):
            self._planes[number], chunks = plane ^ chunks, plane & chunks
            if not chunks:
                return
        if chunks:
            self._planes.append(chunks)

    def subtract(self, chunks: int) -> None:
        """Lowers the count of each of `chunks`, which was raised before, by one."""
        for number, plane in enumerate(self._planes):
            self._planes[number], chunks = plane ^ chunks, chunks ^ (plane & chunks)
            if not chunks:
                return

    def least(self, chunks: int) -> int:
        """Those of `chunks` whose count is the least."""
        for plane in reversed(self._planes):
            chunks = (chunks ^ (chunks & plane)) or chunks
        return chunks


def _lowest(chunks: int) -> int:
    return (chunks & -chunks).bit_length() - 1
