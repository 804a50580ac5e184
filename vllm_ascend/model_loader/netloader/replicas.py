"""Who else has the weights of a server: clients that took them and said that they serve them now."""

from __future__ import annotations

import ipaddress
import random
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final, TypeVar

from vllm_ascend.model_loader.netloader.endpoint import Endpoint

_Key = TypeVar("_Key")

REFERRALS: Final = 8
_REMEMBERED_SESSIONS: Final = 256
_REMEMBERED_REPLICAS: Final = 64


@dataclass(frozen=True)
class Copy:
    """What a client on `host` has got."""

    host: str
    role: str
    generation: int

    def holds(self, role: str, generation: int) -> bool:
        return (self.role, self.generation) == (role, generation)


class Replicas:
    """Remembers the latest. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken: OrderedDict[bytes, Copy] = OrderedDict()
        self._serving: OrderedDict[Endpoint, Copy] = OrderedDict()

    def note_taken(self, session: bytes, copy: Copy) -> None:
        """The client of `session` has everything."""
        with self._lock:
            _remember(self._taken, session, copy, _REMEMBERED_SESSIONS)

    def note_serving(self, session: bytes, endpoint: Endpoint) -> bool:
        """Whether `endpoint` can be believed: only the address that took something can announce that, and once."""
        with self._lock:
            copy = self._taken.pop(session, None)
            if copy is None or copy.host != endpoint.host:
                return False
            _remember(self._serving, endpoint, copy, _REMEMBERED_REPLICAS)
            return True

    def referrals(self, role: str, generation: int) -> tuple[str, ...]:
        """Some that have it, in random order, so that those who are told spread; see `protocol.Refuse`."""
        with self._lock:
            endpoints = [each for each, copy in self._serving.items() if copy.holds(role, generation)]
        chosen = random.sample(endpoints, min(REFERRALS, len(endpoints)))
        return tuple(str(Endpoint("" if _is_loopback(each.host) else each.host, each.port)) for each in chosen)


def _remember(copies: OrderedDict[_Key, Copy], key: _Key, copy: Copy, limit: int) -> None:
    copies.pop(key, None)
    copies[key] = copy
    if len(copies) > limit:
        copies.popitem(last=False)


def _is_loopback(host: str) -> bool:
    """Whether others mean another host by it."""
    return ipaddress.ip_address(host).is_loopback
