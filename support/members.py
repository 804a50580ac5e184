"""Members of a swarm without an engine: each fetches, and serves what it has so far on a server of its own."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from support.relay import ServerRelay
from support.sources import SHORT, Tensors, client_for
from vllm_ascend.model_loader.netloader.client.fetch import Client
from vllm_ascend.model_loader.netloader.client.fetched import Fetched
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.server.requests import Settings
from vllm_ascend.model_loader.netloader.server.server import WeightServer
from vllm_ascend.model_loader.netloader.transport.base import Timeouts, Transport
from vllm_ascend.model_loader.netloader.wire.access import Access

CHUNK = 16 << 10


class Member:
    """Fetches `tensors`, and relays them meanwhile. Its server goes on until the scope of `members` ends."""

    def __init__(self, tensors: Tensors, server: WeightServer, client: Client, relay: ServerRelay) -> None:
        self.tensors = tensors
        self.server = server
        self.client = client
        self.relay = relay
        self.fetched: Fetched | None = None
        self.failure: Exception | None = None
        self._thread: threading.Thread | None = None

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint("127.0.0.1", self.server.port)

    def start(self, *sources: Endpoint) -> None:
        self._thread = threading.Thread(target=self._run, args=(sources,), daemon=True)
        self._thread.start()

    def join(self) -> Fetched:
        """What was fetched, compared with the originals. Fails the test if nothing was."""
        assert self._thread is not None
        self._thread.join()
        assert self.failure is None, self.failure
        assert self.fetched is not None
        self.tensors.assert_in(self.fetched.memory)
        return self.fetched

    def _run(self, sources: Sequence[Endpoint]) -> None:
        try:
            self.fetched = self.client.fetch(sources)
            if self.relay.publication is not None:  # not where the pages of another process were mapped
                self.relay.complete()
        except Exception as error:
            self.failure = error


@contextlib.contextmanager
def members(
    count: int,
    tensors: Tensors,
    kinds: Sequence[Transport],
    *,
    timeouts: Timeouts = SHORT,
    access: Access | None = None,
    **options: Any,
) -> Iterator[list[Member]]:
    """So many members, none of which has begun. `options` are fields of `FetchOptions`."""
    with contextlib.ExitStack() as servers:
        access = access or Access()
        made = []
        for _ in range(count):
            server = servers.enter_context(WeightServer("127.0.0.1", 0, Settings(kinds, timeouts, access)))
            relay = ServerRelay(tensors.request(), server)
            client = client_for(tensors, kinds, timeouts=timeouts, access=access, relay=relay, **options)
            made.append(Member(tensors, server, client, relay))
        yield made
