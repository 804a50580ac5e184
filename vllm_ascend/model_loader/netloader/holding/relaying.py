"""Serves weights to others while they are still being loaded, on a server of this process.

Clients are told of this process by whoever it takes chunks from. What it has stays where it is: when the load is over,
the same store is published and becomes a source like any other, without an end to the sessions of its clients.

On an accelerator the weights lie in the parameters of the model, which post-processing changes. There relaying ends
before that, and what is published afterwards is a new store.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable

import msgspec

from vllm_ascend.model_loader.netloader.client.options import Filling, Relay
from vllm_ascend.model_loader.netloader.server.publications import Publication
from vllm_ascend.model_loader.netloader.server.server import WeightServer
from vllm_ascend.model_loader.netloader.transport.digests import StoreDigests
from vllm_ascend.model_loader.netloader.transport.store import Request, WeightStore

logger = logging.getLogger(__name__)


class StoreRelay(Relay):
    """Offers what a load of the weights that `request` asks for has so far.

    `listener` gives the server, which is started, by the time when there is something to offer; None for none. `slot`
    is that of the server in which the weights are offered, empty for that of their role.
    """

    def __init__(self, request: Request, listener: Callable[[], WeightServer | None], slot: str = "") -> None:
        self._request = request
        self._slot = slot
        self._listener = listener
        self._server: WeightServer | None = None
        self.publication: Publication | None = None
        """What is offered now, if anything is."""
        self._finalizer: weakref.finalize[..., StoreRelay] | None = None
        """Keeps what is offered from outliving this object, if nobody goes on with the load."""

    def begin(self, filling: Filling) -> int:
        server = self._listener()
        if server is None:
            return 0
        identity = msgspec.structs.replace(self._request.identity, fingerprint=filling.fingerprint)
        try:
            digests = StoreDigests(filling.memory.reader(), filling.digests)
        except OSError as error:
            logger.warning("the %s weights are not passed on while they are loaded: %s", identity.role, error)
            return 0
        store = WeightStore(
            self._request.manifest,
            filling.memory,
            server.next_generation(identity.role),
            filling.attributes,
            digests,
            filling.passed,
            filling.claim,
        )
        self._server = server
        self.publication = Publication(identity, self._request.coordinates, store, filling.joined, self._slot)
        self._finalizer = weakref.finalize(self, server.forget_filling, self.publication)
        self._finalizer.atexit = False
        server.fill(self.publication)
        if filling.claim is not None:
            filling.claim.tell(server.address)
        return server.port

    def complete(self) -> None:
        """Notes that the store is complete and confirmed, and that its memory is sealed."""
        if self.publication is not None and self.publication.store.held is not None:
            self.publication.store.held.close()

    def end(self, reason: str) -> None:
        publication, self.publication = self.publication, None
        if self._finalizer is not None:
            self._finalizer.detach()
        if publication is not None and self._server is not None:
            publication.store.give_up_claim()  # before clients look for somebody else who has these weights
            self._server.stop_filling(publication, reason)
