"""Fills a cache ahead of engines, from sources that hold what they will need, and follows these sources.

Without a model of its own, the cache asks for what sources say that they hold. It looks again ever so often: what a
source has replaced is fetched anew, and the earlier weights are given up. What the cache has given up for want of room
is not fetched again, and a source that is gone takes nothing away.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec

from vllm_ascend.model_loader.netloader.cache.contents import Contents, guards_of, verified
from vllm_ascend.model_loader.netloader.cache.outlet import Outlet, slot_of
from vllm_ascend.model_loader.netloader.cache.shelf import Item, Shelf
from vllm_ascend.model_loader.netloader.client.fetch import Client
from vllm_ascend.model_loader.netloader.client.fetched import Fetched
from vllm_ascend.model_loader.netloader.client.options import FetchOptions
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import (
    Damaged,
    NoRoom,
    SourcesExhausted,
    TransportError,
    UnsupportedModel,
)
from vllm_ascend.model_loader.netloader.holding.relaying import StoreRelay
from vllm_ascend.model_loader.netloader.holding.request import request_for
from vllm_ascend.model_loader.netloader.holding.survey import Offered, survey
from vllm_ascend.model_loader.netloader.transport.base import Timeouts
from vllm_ascend.model_loader.netloader.transport.registry import transports
from vllm_ascend.model_loader.netloader.transport.store import Request
from vllm_ascend.model_loader.netloader.weights.arena import Arena
from vllm_ascend.model_loader.netloader.wire.access import Access

logger = logging.getLogger(__name__)

LOOK_AGAIN_SECONDS: Final = 30.0
"""Between two looks at the sources: so soon a cache notices that one has other weights, or is there at last."""
_GIVEN_UP: Final = "the cache could not get these weights"


@dataclass(frozen=True)
class Chosen:
    """Which weights of the sources are wanted: those whose fields have one of the given values, as text.

    Fields are those of the coordinates, ``role`` and ``name``. Without any, all are wanted.
    """

    values: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def includes(self, offered: Offered) -> bool:
        """Whether these weights are wanted."""
        place = msgspec.structs.asdict(offered.coordinates)
        fields = {**place, "role": offered.role, "name": offered.identity.name}
        return all(str(fields[name]) in allowed for name, allowed in self.values.items())


class Puller:
    """Brings what `sources` hold onto `shelf`, in a thread of its own from `start` to `close`.

    `outlet` gives what serves other hosts, None for nobody: it relays what comes. `wait` pauses so many seconds, or
    less, and returns whether to end.
    """

    def __init__(
        self,
        shelf: Shelf,
        sources: Sequence[Endpoint],
        access: Access,
        chosen: Chosen | None = None,
        *,
        outlet: Callable[[], Outlet | None] = lambda: None,
        timeouts: Timeouts | None = None,
        wait: Callable[[float], bool] | None = None,
    ) -> None:
        self._shelf = shelf
        self._sources = tuple(sources)
        self._access = access
        self._chosen = chosen or Chosen()
        self._outlet = outlet
        self._timeouts = timeouts or Timeouts()
        self._ended = threading.Event()
        self._wait = wait or self._ended.wait
        self._had: set[tuple[object, ...]] = set()
        """What was fetched or cannot be, so that nobody tries it again."""
        self._unreached: set[Endpoint] = set()
        """Sources that did not answer at the last look, and of which that was said."""

    def start(self) -> None:
        """Begins. Raises RuntimeError if the system has no thread left."""
        threading.Thread(target=self._run, name="netloader-pull", daemon=True).start()

    def close(self) -> None:
        """Looks no more. What comes at this moment is given up with the process. Idempotent."""
        self._ended.set()

    def look(self) -> None:
        """Asks all sources what they hold, and fetches what is wanted and not there."""
        found = survey(self._sources, self._timeouts.connect, self._access)
        for endpoint in found.unreached.keys() - self._unreached:
            logger.warning("%s does not tell what it holds: %s", endpoint, found.unreached[endpoint])
        self._unreached = set(found.unreached)
        for offered in filter(self._chosen.includes, found.offered):
            if self._ended.is_set():
                return
            if not self._is_had(offered):
                self._pull(offered)

    def _run(self) -> None:
        while True:
            try:
                self.look()
            except Exception:  # nothing may end this thread
                logger.exception("could not fetch what sources hold: an error of the cache")
            if self._wait(LOOK_AGAIN_SECONDS):
                return

    def _is_had(self, offered: Offered) -> bool:
        """Whether these very weights were fetched once, or are here from elsewhere."""
        if _key(offered) in self._had:
            return True
        for item in self._shelf.items():
            request = item.contents.request
            is_it = request.identity == offered.identity and request.coordinates == offered.coordinates
            if is_it and offered.root and item.contents.root == offered.root:
                return True
        return False

    def _pull(self, offered: Offered) -> None:
        try:
            request = request_for(offered, self._timeouts.connect, self._access)
            item = self._shelf.reserve(Contents(request, guards=guards_of(self._access)), root=offered.root)
        except SourcesExhausted as error:
            logger.warning("%s cannot be fetched: %s", _name(offered), error)
            return
        except NoRoom as error:
            logger.error("%s are not fetched: %s", _name(offered), error)
            self._had.add(_key(offered))
            return

        kept = False
        try:
            kept = self._fill(item, request, offered)
        except (SourcesExhausted, UnsupportedModel, TransportError, Damaged, OSError) as error:
            logger.warning("%s cannot be fetched: %s", _name(offered), error)
        except NoRoom as error:
            logger.error("%s are not fetched: %s", _name(offered), error)
            self._had.add(_key(offered))
        finally:
            if not kept:
                self._shelf.give_up(item)

    def _fill(self, item: Item, request: Request, offered: Offered) -> bool:
        """Raises SourcesExhausted, UnsupportedModel, NoRoom, TransportError, Damaged or OSError."""
        outlet, come = self._outlet(), 0

        def progress(nbytes: int) -> None:
            nonlocal come
            come += nbytes
            self._shelf.note_progress(item, max(come, 0))

        relay = None
        if outlet is not None:
            relay = StoreRelay(request, lambda: outlet.server, slot=slot_of(item))
        options = FetchOptions(
            request,
            self._timeouts,
            self._access,
            disk_remains=False,
            progress=progress,
            relay=relay,
            root=offered.root,
        )
        fetched = Client(options, transports(("shared_memory", "tcp"))).fetch(offered.endpoints)
        try:
            contents, pages = self._sealed(fetched, item)
        except BaseException:
            fetched.memory.close()
            if relay is not None:
                relay.end(_GIVEN_UP)
            raise

        if relay is not None and outlet is not None and relay.publication is not None:
            relay.complete()
            outlet.promise(item, relay.publication)  # which has the memory from now on
        else:
            fetched.memory.close()
        kept = self._shelf.complete(item, contents, pages)
        if relay is not None and not kept:
            relay.end(_GIVEN_UP)
            fetched.memory.close()
        self._had.add(_key(offered))
        logger.info("fetched %s from %s, root %s", _name(offered), fetched.source, contents.root[:16])
        return True

    def _sealed(self, fetched: Fetched, item: Item) -> tuple[Contents, Arena]:
        """What has come, with all digests, and its pages apart from the memory that was fetched.

        Raises TransportError, Damaged or OSError.
        """
        memory, request = fetched.memory, item.contents.request
        if not memory.servable:
            memory.seal()
        assert memory.descriptor is not None, "it is host memory"
        pages = Arena.adopt(os.dup(memory.descriptor), memory.nbytes)
        identity = msgspec.structs.replace(request.identity, fingerprint=fetched.fingerprint)
        digests = None if fetched.evidence is None else fetched.evidence.digests
        told = Contents(
            dataclasses.replace(request, identity=identity), fetched.attributes, digests, item.contents.guards
        )
        if digests is not None:
            return told, pages
        try:
            contents = verified(told, pages, lambda held: self._shelf.note_progress(item, held) or True)
        except BaseException:
            pages.close()
            raise
        assert contents is not None
        return contents, pages


def _key(offered: Offered) -> tuple[object, ...]:
    coordinates = msgspec.structs.astuple(offered.coordinates)
    return (offered.role, offered.identity.name, offered.identity.fingerprint, coordinates, offered.root)


def _name(offered: Offered) -> str:
    place = offered.coordinates
    return (
        f"the {offered.role} weights of {offered.identity.name} for tp {place.tp_rank} of {place.tp_size}, "
        f"pp {place.pp_rank} of {place.pp_size}, ep {place.ep_rank} of {place.ep_size}"
    )
