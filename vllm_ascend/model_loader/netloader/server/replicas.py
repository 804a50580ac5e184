"""Who else has the weights of a server: clients that took them, and announced afterwards that they serve them.

Without a token that can be anybody. So no host can push others out of what is remembered, and when clients are referred
to replicas, hosts are named in turn.
"""

from __future__ import annotations

import ipaddress
import random
import threading
from collections import Counter, OrderedDict
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
"""Clients that have announced it."""


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
            _remember(self._serving, endpoint, copy, _REMEMBERED_REPLICAS)
            return True

    def referrals(self, role: str, generation: int) -> tuple[str, ...]:
        """Addresses of some replicas of that generation, as the fields of messages have them.

        They are in random order, so that the clients that are told spread over them, except that a second one of a host
        is named only after one of every host. An address without a host means the host of this server.
        """
        with self._lock:
            endpoints = [each for each, copy in self._serving.items() if copy.holds(role, generation)]
        random.shuffle(endpoints)

        named: Counter[str] = Counter()
        places: list[tuple[int, Endpoint]] = []
        for endpoint in endpoints:
            places.append((named[network_of(endpoint.host)], endpoint))
            named[network_of(endpoint.host)] += 1

        chosen = [endpoint for _, endpoint in sorted(places, key=lambda place: place[0])[:REFERRALS]]
        return tuple(str(Endpoint("" if _is_loopback(each.host) else each.host, each.port)) for each in chosen)


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
