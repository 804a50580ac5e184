"""A relay without an engine, which needs no torch."""

from __future__ import annotations

from vllm_ascend.model_loader.netloader.client.options import Filling, Relay
from vllm_ascend.model_loader.netloader.server.publications import Publication
from vllm_ascend.model_loader.netloader.server.server import WeightServer
from vllm_ascend.model_loader.netloader.transport.digests import StoreDigests
from vllm_ascend.model_loader.netloader.transport.store import Request, WeightStore


class ServerRelay(Relay):
    """Offers what a fetch of `request` has so far on `server`, and publishes it when it is complete."""

    def __init__(self, request: Request, server: WeightServer) -> None:
        self.publication: Publication | None = None
        self.ended: list[str] = []
        """Why it was ended, each time."""
        self._request = request
        self._server = server

    def begin(self, filling: Filling) -> int:
        store = WeightStore(
            self._request.manifest,
            filling.memory,
            self._server.next_generation("target"),
            filling.attributes,
            StoreDigests(filling.memory.reader(), filling.digests),
            filling.passed,
        )
        self.publication = Publication(self._request.identity, self._request.coordinates, store, filling.joined)
        self._server.fill(self.publication)
        return self._server.port

    def end(self, reason: str) -> None:
        publication, self.publication = self.publication, None
        if publication is not None:
            self.ended.append(reason)
            self._server.stop_filling(publication, reason)

    def complete(self) -> None:
        publication = self.publication
        assert publication is not None
        assert publication.store.held is not None
        publication.store.memory.seal()
        publication.store.held.close()
        self._server.publish(publication)
