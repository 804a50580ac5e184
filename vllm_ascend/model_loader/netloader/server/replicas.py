"""Who else has the weights of a server: clients that take or took them, and serve what they have.

Some relay while they load, and say so when they begin to follow; others announce afterwards that they serve. Without a
token either can be anybody. So no host can push others out of what is remembered, and when clients are referred to
replicas, hosts are named in turn.
"""

from __future__ import annotations

import ipaddress
import random
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.server.admission.hosts import network_of

_Key = TypeVar("_Key")

REFERRALS: Final = 8
"""Addresses that a client is told at most."""
_REMEMBERED_SESSIONS: Final = 256
"""Clients that took everything and may announce that they serve it."""
_REMEMBERED_REPLICAS: Final = 64
"""Clients that serve what they have."""


@dataclass(frozen=True)
class Copy:
    """The weights that a client on `host` took: of which role, and which generation of them."""

    host: str
    role: str
    generation: int

    def holds(self, role: str, generation: int) -> bool:
        return (self.role, self.generation) == (role, generation)


class Replicas:
    """Remembers the latest copies. If there are too many, the host that has most of them loses one. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken: OrderedDict[bytes, Copy] = OrderedDict()
        self._serving: OrderedDict[Endpoint, Copy] = OrderedDict()
        self._listeners: set[Callable[[], None]] = set()

    @property
    def copies(self) -> int:
        """How many clients took everything and have not announced yet that they serve it."""
        return len(self._taken)

    def note_taken(self, session: bytes, copy: Copy) -> None:
        """Notes that the client of `session` has everything."""
        with self._lock:
            _remember(self._taken, session, copy, _REMEMBERED_SESSIONS)

    def note_serving(self, session: bytes, endpoint: Endpoint) -> bool:
        """Notes that the client of `session` serves its copy at `endpoint`, if that can be believed. Whether it can.

        Only the host that took the weights can announce that, and only once.
        """
        with self._lock:
            copy = self._taken.pop(session, None)
            if copy is None or copy.host != endpoint.host:
                return False
            self._add(endpoint, copy)
            return True

    def note_relaying(self, endpoint: Endpoint, copy: Copy) -> None:
        """Notes that a client which takes `copy` now serves at `endpoint` what it has of it."""
        with self._lock:
            self._add(endpoint, copy)

    def drop(self, endpoint: Endpoint) -> None:
        """Names `endpoint` to nobody any more."""
        with self._lock:
            self._serving.pop(endpoint, None)

    def listen(self, listener: Callable[[], None]) -> None:
        """Calls `listener`, which may neither block nor use this object, whenever there is another replica."""
        with self._lock:
            self._listeners.add(listener)

    def forget_listener(self, listener: Callable[[], None]) -> None:
        """Does not call `listener` any more. Idempotent."""
        with self._lock:
            self._listeners.discard(listener)

    def known(self, role: str, generation: int) -> tuple[Endpoint, ...]:
        """All replicas of that generation."""
        with self._lock:
            return tuple(each for each, copy in self._serving.items() if copy.holds(role, generation))

    def referrals(self, role: str, generation: int) -> tuple[str, ...]:
        """Addresses of some replicas of that generation, as the fields of messages have them.

        They are in random order, so that the clients that are told spread over them, except that a second one of a host
        is named only after one of every host. An address without a host means the host of this server.
        """
        endpoints = list(self.known(role, generation))
        random.shuffle(endpoints)

        named: Counter[str] = Counter()
        places: list[tuple[int, Endpoint]] = []
        for endpoint in endpoints:
            places.append((named[network_of(endpoint.host)], endpoint))
            named[network_of(endpoint.host)] += 1

        chosen = [endpoint for _, endpoint in sorted(places, key=lambda place: place[0])[:REFERRALS]]
        return tuple(map(self.written, chosen))

    @staticmethod
    def written(endpoint: Endpoint) -> str:
        """`endpoint` as the fields of messages have it: without a host it is on that of this server."""
        return str(Endpoint("" if _is_loopback(endpoint.host) else endpoint.host, endpoint.port))

    def _add(self, endpoint: Endpoint, copy: Copy) -> None:
        _remember(self._serving, endpoint, copy, _REMEMBERED_REPLICAS)
        for listener in self._listeners:
            listener()


def _remember(copies: OrderedDict[_Key, Copy], key: _Key, copy: Copy, limit: int) -> None:
    copies.pop(key, None)
    copies[key] = copy
    if len(copies) > limit:
        counts = Counter(network_of(each.host) for each in copies.values())
        most = max(counts.values())
        del copies[next(key for key, each in copies.items() if counts[network_of(each.host)] == most)]


def _is_loopback(host: str) -> bool:
    """Whether `host` means, on every machine, that machine itself."""
    return ipaddress.ip_address(host).is_loopback
