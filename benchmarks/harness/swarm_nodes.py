"""The processes of a measured swarm: they hold synthetic weights, or load them and relay them meanwhile.

Each is a `support.child.Child`, and does an order at a time. None has an engine or torch.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from benchmarks.harness.fetches import digested_publication, synthetic_arena
from benchmarks.harness.namespaces import become_host
from support.relay import ServerRelay
from support.synthetic import request_of
from vllm_ascend.model_loader.netloader.client.fetch import Client
from vllm_ascend.model_loader.netloader.client.fetched import Fetched
from vllm_ascend.model_loader.netloader.client.options import FetchOptions
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import SourcesExhausted
from vllm_ascend.model_loader.netloader.server.requests import Settings
from vllm_ascend.model_loader.netloader.server.server import WeightServer
from vllm_ascend.model_loader.netloader.transport.base import Timeouts
from vllm_ascend.model_loader.netloader.transport.tcp import TcpTransport

TIMEOUTS: Final = Timeouts(connect=10.0, stall=10.0)


@dataclass(frozen=True)
class Place:
    """Where a process is: a host of its own, or one that all share, and how fast it may send there.

    On a host of its own its cable limits it, so `rate` (bytes per second) is None.
    """

    has_host: bool
    rate: int | None = None

    def server(self, address: str) -> WeightServer:
        """A server at `address`, not started. Whoever asked starts and stops it."""
        return WeightServer(address, 0, Settings((TcpTransport(),), TIMEOUTS, max_bandwidth=self.rate))


@dataclass(frozen=True)
class Hold:
    """An order: to serve so many bytes of weights at `address`. The answer is the endpoint; what was served is not."""

    address: str
    nbytes: int


@dataclass(frozen=True)
class Load:
    """An order: to load `nbytes` of weights from `sources` at a time of the monotonic clock; answered by `Loaded`.

    What was loaded is served at `address` from the first chunk to the next order, unless `relays` is off.
    """

    address: str
    nbytes: int
    sources: Sequence[Endpoint]
    begins_at: float
    relays: bool = True


@dataclass(frozen=True)
class Loaded:
    """What came of a Load: when it ended, by the monotonic clock, and what came from where, in bytes."""

    ended_at: float
    received: dict[str, int] = field(default_factory=dict)
    failures: tuple[str, ...] = ()
    """Of every attempt that failed. The load itself succeeded."""


@dataclass(frozen=True)
class Release:
    """An order: to serve no more, and to give up all memory."""


class Holder:
    """Holds weights from the beginning."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._server: WeightServer | None = None
        if place.has_host:
            become_host()

    def __call__(self, order: Hold | Release) -> Endpoint | None:
        if self._server is not None:
            self._server.close()
            self._server = None
            gc.collect()
        if isinstance(order, Release):
            return None
        self._server = self._place.server(order.address)
        self._server.start()
        self._server.publish(digested_publication(synthetic_arena(order.nbytes)))
        return Endpoint(order.address, self._server.port)


class Loader:
    """Loads weights, and serves them to others."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._server: WeightServer | None = None
        self._fetched: Fetched | None = None
        if place.has_host:
            become_host()

    def __call__(self, order: Load | Release) -> Loaded | None:
        self._release()
        if isinstance(order, Release):
            return None
        request = request_of(order.nbytes)
        server = self._server = self._place.server(order.address)
        server.start()
        relay = ServerRelay(request, server) if order.relays else None
        client = Client(FetchOptions(request, TIMEOUTS, relay=relay), (TcpTransport(),))
        time.sleep(max(0.0, order.begins_at - time.monotonic()))
        try:
            self._fetched = client.fetch(order.sources)
        except SourcesExhausted as error:
            raise RuntimeError(f"nobody has delivered: {error}") from error
        ended_at = time.monotonic()
        if relay is not None:
            relay.complete()
        return Loaded(ended_at, dict(client.received), tuple(attempt.reason for attempt in client.attempts))

    def _release(self) -> None:
        if self._server is not None:
            self._server.close()
        if self._fetched is not None:
            self._fetched.memory.close()
        self._server = self._fetched = None
        gc.collect()
