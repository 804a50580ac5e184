"""What counts as one host, and the hosts that are not listened to for a while.

Whoever has an IPv6 address has 2^64 of them, so limits by host count networks.
"""

from __future__ import annotations

import functools
import ipaddress
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

_FREE_FAILURES: Final = 3
"""Failures of a host before it has to wait: whoever corrects a wrong file tries again."""
_LONGEST_BLOCK: Final = 60.0
"""Seconds for which a host is not listened to, at most."""
_MOST_DOUBLINGS: Final = 6
"""Of one second: enough for the longest block, and no overflow however often a host fails."""
_REMEMBERED: Final = 1024
"""Hosts; the one that failed least recently is forgotten first."""
_IPV6_NETWORK_BITS: Final = 64


@functools.lru_cache(maxsize=4096)
def network_of(address: str) -> str:
    """What counts as one host: an IPv4 address, even if it is written as IPv6, or the /64 of an IPv6 address."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return str(parsed)
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    host_bits = 128 - _IPV6_NETWORK_BITS
    return str(ipaddress.IPv6Network((int(parsed) >> host_bits << host_bits, _IPV6_NETWORK_BITS)))


@dataclass
class _Record:
    failures: int = 0
    blocked_until: float = 0.0


class Guard:
    """Slows down hosts that fail to authenticate: each failure doubles the time for which they are not listened to.

    Hosts are given by an address. Thread-safe.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._records: OrderedDict[str, _Record] = OrderedDict()

    def admits(self, address: str) -> bool:
        """Whether the host is listened to now."""
        with self._lock:
            record = self._records.get(network_of(address))
            return record is None or self._clock() >= record.blocked_until

    def failed(self, address: str) -> None:
        """Notes that the host failed to authenticate."""
        host = network_of(address)
        with self._lock:
            record = self._records.pop(host, None) or _Record()
            self._records[host] = record
            if len(self._records) > _REMEMBERED:
                self._records.popitem(last=False)

            record.failures += 1
            if record.failures > _FREE_FAILURES:
                doublings = min(record.failures - _FREE_FAILURES - 1, _MOST_DOUBLINGS)
                record.blocked_until = self._clock() + min(2.0**doublings, _LONGEST_BLOCK)

    def succeeded(self, address: str) -> None:
        """Forgives the host all earlier failures."""
        with self._lock:
            self._records.pop(network_of(address), None)
