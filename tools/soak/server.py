"""A server process of a soak."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Sequence
from typing import Final

from support.synthetic import IDENTITY, publication_of, sealed_arena, shared
from tools.soak.setting import HOST, LISTENERS, TIMEOUTS, Setting, prepare_process
from vllm_ascend.model_loader.netloader.server.requests import Settings
from vllm_ascend.model_loader.netloader.server.server import WeightServer
from vllm_ascend.model_loader.netloader.transport.tcp import TcpTransport

MAX_CLIENTS: Final = 1
"""Of each listener: few, so that workers wait for their turn."""


class Server:
    """Serves an edition of the weights on all listeners, until it is called with the number of another one."""

    def __init__(self, setting: Setting, ports: Sequence[int], edition: int) -> None:
        prepare_process()
        self._setting = setting
        self._servers: list[WeightServer] = []
        for port, listener in zip(ports, LISTENERS, strict=True):
            settings = Settings((TcpTransport(),), TIMEOUTS, setting.access(listener), max_clients=MAX_CLIENTS)
            server = WeightServer(HOST, port, settings)
            server.start()
            self._servers.append(server)
        self(edition)

    def __call__(self, edition: int) -> None:
        """Publishes the same pages behind all listeners. Serving is suspended before every other edition."""
        if edition % 2:
            for server in self._servers:
                server.suspend("its weights are being replaced")
        block = self._setting.contents(edition)
        with contextlib.closing(sealed_arena(len(block), block)) as arena:
            for server in self._servers:
                generation = server.next_generation(IDENTITY.role)
                publication = publication_of(shared(arena), generation, {"edition": edition})
                assert publication.store.digests is not None
                publication.store.digests.make_ahead()
                server.publish(publication)
        gc.collect()
