"""A relay without an engine, which needs no torch."""

from __future__ import annotations

from vllm_ascend.model_loader.netloader.holding.relaying import StoreRelay
from vllm_ascend.model_loader.netloader.server.server import WeightServer
from vllm_ascend.model_loader.netloader.transport.store import Request


class ServerRelay(StoreRelay):
    """Offers what a fetch of `request` has so far on `server`, and publishes it when it is complete."""

    def __init__(self, request: Request, server: WeightServer) -> None:
        super().__init__(request, lambda: server)
        self._on = server
        self.ended: list[str] = []
        """Why it was ended, each time."""

    def end(self, reason: str) -> None:
        if self.publication is not None:
            self.ended.append(reason)
        super().end(reason)

    def complete(self) -> None:
        assert self.publication is not None
        self.publication.store.memory.seal()
        super().complete()
        self._on.publish(self.publication)
