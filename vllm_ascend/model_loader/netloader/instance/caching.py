"""The cache of this host, as a load uses it: asked before all sources, and given what the load has brought.

What a cache holds was once what sources or files had, so two things could be different by now:

- **The files here.** The engine asks by their fingerprint, and takes only weights that are known to be from such files.
- **The weights that sources serve**, where this host has no files and names have to decide. Then the sources are asked
  whether they hold something else under that name. If none of them answers, nothing newer can be had, and what the
  cache has is taken, with a warning.

A reload asks for weights because there are others, so it asks no cache.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_ascend.model_loader.netloader.cache import asking, place
from vllm_ascend.model_loader.netloader.cache.asking import Given
from vllm_ascend.model_loader.netloader.cache.contents import Contents, guards_of
from vllm_ascend.model_loader.netloader.client.inquiry import inquire
from vllm_ascend.model_loader.netloader.config import NetLoaderConfig
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import SourceError, TransportError
from vllm_ascend.model_loader.netloader.instance.serving import LoadedWeights
from vllm_ascend.model_loader.netloader.transport.base import Timeouts
from vllm_ascend.model_loader.netloader.transport.store import Request
from vllm_ascend.model_loader.netloader.wire.access import Access
from vllm_ascend.model_loader.netloader.wire.messages import Holding

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cached:
    """Where weights came from that a cache has given: the path of its socket, and the root digest of the contents."""

    path: str
    root: str


@dataclass(frozen=True)
class HostCache:
    """The cache whose socket is at one of `paths`. `sources` are those of the load, which are asked under `access`."""

    paths: tuple[Path, ...]
    sources: tuple[Endpoint, ...]
    timeouts: Timeouts
    access: Access
    is_named: bool = False
    """Whether the configuration names this very cache, so that it is worth a warning if there is none."""

    @classmethod
    def of(cls, config: NetLoaderConfig, rank: int, access: Access) -> HostCache:
        """The one that `config` means for the rank of that number."""
        return cls(
            place.candidates(config.cache),
            config.sources_for(rank),
            Timeouts(config.connect_timeout, config.stall_timeout),
            access,
            config.cache not in ("auto", "off"),
        )

    @property
    def is_there(self) -> bool:
        """Whether there is something like a cache."""
        return isinstance(asking.find(self.paths, self.timeouts.connect), Path)

    def ask(self, request: Request) -> Given | None:
        """What the cache has of what is requested, None if it has nothing that can be taken. The caller closes it."""
        path = asking.find(self.paths, self.timeouts.connect)
        if isinstance(path, str):
            if self.is_named:
                logger.warning("there is no cache where CACHE says: %s", path)
            return None
        given = asking.ask(path, request, self.timeouts)
        if given is None:
            return None
        if reason := self._why_not(given, request):
            logger.warning("what the cache at %s has is not used: %s", path, reason)
            given.pages.close()
            return None
        return given

    def hand(self, weights: LoadedWeights) -> None:
        """Gives the cache the very pages of `weights`, if they are in host memory. Returns at once and never raises."""
        descriptor = weights.memory.descriptor
        if not self.paths or descriptor is None:
            return
        contents = Contents(weights.request, dict(weights.attributes), weights.digests, guards_of(self.access))
        try:
            own = os.dup(descriptor)
        except OSError as error:
            logger.warning("the cache does not get these weights: %s", error)
            return
        try:
            threading.Thread(target=self._hand, args=(contents, own), name="netloader-hand", daemon=True).start()
        except RuntimeError as error:
            os.close(own)
            logger.warning("the cache does not get these weights: %s", error)

    def _hand(self, contents: Contents, descriptor: int) -> None:
        try:
            path = asking.find(self.paths, self.timeouts.connect)
            if isinstance(path, Path):
                asking.hand(path, contents, descriptor, self.timeouts)
        except Exception:  # of a thread of its own, so nobody else would hear of it
            logger.exception("the cache does not get these weights: an error of this process")
        finally:
            os.close(descriptor)

    def _why_not(self, given: Given, request: Request) -> str:
        """Why the engine must not use what it was given; empty if it may."""
        if request.identity.fingerprint:
            return "" if given.fingerprint else "nobody knows whether it is from such files as there are here"

        heard = [holding for source in self.sources for holding in self._held_by(source)]
        for holding in heard:
            if _is_other(holding, given, request):
                return "sources have other weights under that name by now"
        if self.sources and not heard:
            logger.warning("no source tells whether the weights in the cache at %s are the latest", given.path)
        return ""

    def _held_by(self, source: Endpoint) -> Sequence[Holding]:
        try:
            return inquire(source, self.timeouts.connect, self.access).holdings
        except (SourceError, TransportError) as error:
            logger.debug("%s does not tell what it holds: %s", source, error)
            return ()


def _is_other(holding: Holding, given: Given, request: Request) -> bool:
    """Whether a source holds other weights than those that were given, under the name that is requested."""
    if request.identity.mismatch(holding.identity):
        return False
    fingerprints = {given.fingerprint, holding.identity.fingerprint} - {""}
    roots = {given.evidence.root, holding.root} - {""}
    is_same_part = not request.coordinates.mismatch(holding.coordinates)
    return len(fingerprints) > 1 or (is_same_part and len(roots) > 1)
