"""Serves what is on a shelf to other hosts, by the same server as that of engines.

It serves weights only behind at least what has guarded them where they come from: those of an engine with a token are
not served without one. What comes from engines whose guards are not there is held for engines of this host only, where
the socket of the cache is the guard.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field

from vllm_ascend.model_loader.netloader.cache.contents import guards_of
from vllm_ascend.model_loader.netloader.cache.shelf import Item
from vllm_ascend.model_loader.netloader.errors import TransportError
from vllm_ascend.model_loader.netloader.server.publications import Publication
from vllm_ascend.model_loader.netloader.server.server import WeightServer
from vllm_ascend.model_loader.netloader.transport.digests import StoreDigests
from vllm_ascend.model_loader.netloader.transport.store import WeightStore
from vllm_ascend.model_loader.netloader.weights.arena import Arena

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outlet:
    """A watcher of a shelf that publishes on `server` what is kept there. Whoever makes it closes the server."""

    server: WeightServer
    promised: dict[int, Publication] = field(default_factory=dict)
    """What was relayed while it came, by the number of the item: its sessions go on when it is kept."""

    def kept(self, item: Item) -> None:
        """Serves `item` if it may be served."""
        contents, pages = item.contents, item.pages
        lacking = contents.guards - guards_of(self.server.settings.access)
        if lacking:
            logger.warning(
                "the %s weights of %s are not served to other hosts: they come from an engine with %s, and this cache "
                "is started without",
                contents.request.identity.role,
                contents.request.identity.name,
                " and ".join(sorted(lacking)),
            )
            return
        if (relayed := self.promised.pop(item.number, None)) is not None:
            self.server.publish(relayed)
            return
        assert pages is not None
        assert contents.digests is not None
        try:
            own_pages = Arena.adopt(os.dup(pages.descriptor), contents.nbytes)
            digests = StoreDigests(own_pages.reader(), contents.digests)
        except (OSError, TransportError) as error:
            logger.warning("weights of %s are not served to other hosts: %s", contents.request.identity.name, error)
            return
        identity, coordinates, manifest = (
            contents.request.identity,
            contents.request.coordinates,
            contents.request.manifest,
        )
        generation = self.server.next_generation(identity.role)
        store = WeightStore(manifest, own_pages, generation, contents.attributes, digests)
        self.server.publish(Publication(identity, coordinates, store, own_slot=slot_of(item)))

    def promise(self, item: Item, relayed: Publication) -> None:
        """Has `item` served as `relayed`, as which it is relayed, once it is kept. The server owns its memory then."""
        self.promised[item.number] = relayed

    def gone(self, item: Item) -> None:
        """Serves `item` no more."""
        self.promised.pop(item.number, None)
        self.server.withdraw(slot_of(item))


def slot_of(item: Item) -> str:
    """The slot of the server in which `item` is served."""
    return f"{item.contents.request.identity.role} {item.number}"
