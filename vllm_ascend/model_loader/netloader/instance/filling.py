"""Where the weights of a model come from: sources first, then the disk, into the same untouched model.

Either way the model ends up with its weights in memory that can be served: an arena in host memory, or on an
accelerator the parameters themselves. What came is known by its own fingerprint, that of the source or of the files
that were read, whatever the files on this host were when sources were asked.

Serving is a by-product. Whatever stands in its way is logged and becomes the reason in `Loaded.not_served`; the load
goes on. Only what leaves no way to the weights is raised.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import msgspec
from torch import nn

from vllm_ascend.model_loader.netloader.checkpoint.hub_cache import snapshot_in
from vllm_ascend.model_loader.netloader.checkpoint.record import ReadRecord
from vllm_ascend.model_loader.netloader.client.fetch import Client
from vllm_ascend.model_loader.netloader.client.fetched import Fetched
from vllm_ascend.model_loader.netloader.client.options import FetchOptions, Relay
from vllm_ascend.model_loader.netloader.config import NetLoaderConfig
from vllm_ascend.model_loader.netloader.errors import (
    CheckpointChanged,
    SourceRefused,
    SourcesExhausted,
    UnsupportedModel,
)
from vllm_ascend.model_loader.netloader.holding.relaying import StoreRelay
from vllm_ascend.model_loader.netloader.instance import serving
from vllm_ascend.model_loader.netloader.instance.caching import Cached, HostCache
from vllm_ascend.model_loader.netloader.instance.rank import Progress, Rank
from vllm_ascend.model_loader.netloader.instance.serving import LoadedWeights, ServeOptions
from vllm_ascend.model_loader.netloader.model import attributes
from vllm_ascend.model_loader.netloader.model.originals import Int8Cache
from vllm_ascend.model_loader.netloader.model.weights import ModelWeights, weights_of
from vllm_ascend.model_loader.netloader.report import Attempt, Phases
from vllm_ascend.model_loader.netloader.transport.base import Timeouts, Transport
from vllm_ascend.model_loader.netloader.transport.store import Request
from vllm_ascend.model_loader.netloader.weights.identity import ModelIdentity
from vllm_ascend.model_loader.netloader.weights.memory import Memory
from vllm_ascend.model_loader.netloader.wire.access import Access

logger = logging.getLogger(__name__)

_NOT_LOADED: Final = "it could not load these weights"


@dataclass(frozen=True)
class Kept:
    """Weights of a model that can be served, and the tensors of the model that they are for.

    Whoever publishes `contents` hands its memory to a store; until then the holder calls `release`.
    """

    weights: ModelWeights
    contents: LoadedWeights
    relay: StoreRelay | None = None

    def release(self) -> None:
        """Gives up the memory, which stays with the tensors of the model that need it. Idempotent."""
        if self.relay is not None:
            self.relay.end(_NOT_LOADED)
        release(self.contents.memory)


@dataclass(frozen=True)
class Loaded:
    """What a load has brought into a model.

    `fingerprint` is that of the checkpoint which the weights are from, empty if there is none or it is unknown.
    `cached` tells of the cache from which they came, None if they did not.
    `kept` is what can be served, None if nothing is; then `not_served` may say why. `fetched`, `received` and `shared`,
    the bytes by source, are those of the transfer; `fetched` is None after a load from disk. `nbytes` is the size of
    the weights, 0 if it was never needed. `mixture` says why the model may have weights of two checkpoints, and is
    empty otherwise.
    """

    nbytes: int = 0
    fingerprint: str = ""
    cached: Cached | None = None
    kept: Kept | None = None
    not_served: str = ""
    fetched: Fetched | None = None
    received: Mapping[str, int] = field(default_factory=dict)
    shared: Mapping[str, int] = field(default_factory=dict)
    mixture: str = ""

    @property
    def came_from_several(self) -> bool:
        """Whether any byte came from another one than the source that has confirmed them."""
        givers = self.received.keys() | self.shared.keys()
        return self.fetched is not None and any(giver != str(self.fetched.source) for giver in givers)


@dataclass(frozen=True, eq=False)
class Filler:
    """Fills models of one rank as the configuration says.

    `cache` is the one of this host, None if it is not to be asked. `keep` says whether the weights are to be served, so
    that memory is kept for it; `relays` are the options by which
    they are served already while they come from a source, None if they are not. `phases` and `attempts` grow as it
    goes, and `note_not_served` is told a reason as soon as there is one, so that a report of a failure has them too.
    """

    config: NetLoaderConfig
    rank: Rank
    access: Access
    transports: tuple[Transport, ...]
    keep: bool
    cache: HostCache | None = None
    relays: ServeOptions | None = None
    phases: Phases = field(default_factory=Phases)
    attempts: list[Attempt] = field(default_factory=list)
    note_not_served: Callable[[str], None] = lambda _: None

    def fill(self, model: nn.Module) -> Loaded:
        """Fills `model`, which nobody has loaded yet, from the first source that delivers, else from disk.

        Raises SourcesExhausted or UnsupportedModel if FALLBACK forbids the disk, NoRoom if this process would be killed
        for the memory that it takes, or whatever the engine's loader raises.
        """
        order: _Order | None = None
        not_served = ""
        try:
            order = self._order_for(model)
            return self._fill_from_cache(order) or self._fill_from_sources(order)
        except (SourcesExhausted, UnsupportedModel) as error:
            if isinstance(error, UnsupportedModel):  # what no source can fill cannot be served after the disk either
                order, not_served = None, str(error)
                self.note_not_served(not_served)
            if self.config.fallback == "error":
                raise
            if self.config.source:
                logger.warning("no source delivered the weights, loading from disk: %s", error)

        # No source writes into the model's memory any more, and the disk overwrites whatever they have left there.
        with self.phases("disk"):
            if order is None or not self.keep:
                return self._fill_alone(model, not_served)
            return self._fill_from_disk(order)

    def _order_for(self, model: nn.Module) -> _Order:
        """Raises UnsupportedModel."""
        cache = Int8Cache(self.config.int8_cache, self.config.int8_cache_name)
        weights = weights_of(model, self.rank.loads_on, cache)
        with self.phases("join"):
            identity = self.rank.identify()
            if self.config.sources_for(self.rank.number) or (self.cache is not None and self.cache.is_there):
                identity = msgspec.structs.replace(identity, fingerprint=self.rank.fingerprint(model))
        return _Order(model, weights, Request(identity, self.rank.coordinates, weights.manifest))

    def _fill_from_cache(self, order: _Order) -> Loaded | None:
        """Takes what the cache of this host has. None if that is nothing: the model has nothing then that matters."""
        if self.cache is None:
            return None
        with self.phases("join"):
            given = self.cache.ask(order.request)
        if given is None:
            return None
        try:
            attributes.require_settable(order.model, given.evidence.attributes)
        except SourceRefused as error:
            logger.warning("what the cache at %s has is not used: %s", given.path, error)
            given.pages.close()
            return None

        with self.phases("transfer"):
            try:
                memory = order.weights.memory_from(given.pages)
            except UnsupportedModel as error:
                logger.warning("what the cache at %s has is not used: %s", given.path, error)
                return None
            with _released_on_failure(memory):
                order.weights.bind(memory)
                attributes.apply(order.model, given.evidence.attributes)
                digests, told = given.evidence.digests, given.evidence.attributes
                contents = LoadedWeights(order.request_for(given.fingerprint), memory, told, digests)
                kept, not_served = self._kept(order, contents)
        cached = Cached(str(given.path), given.evidence.root)
        return Loaded(order.nbytes, given.fingerprint, cached, kept, not_served)

    def _fill_from_sources(self, order: _Order) -> Loaded:
        """Raises SourcesExhausted, UnsupportedModel or NoRoom. The model has nothing then that the disk has to keep."""
        relay = self._relay(order)
        with self.rank.progress_bar(order.nbytes) as progress:
            client = Client(self._fetch_options(order, progress, relay), self.transports, self.phases, self.attempts)
            fetched = client.fetch(self.config.sources_for(self.rank.number))

        # Only now does the model change: all bytes are there, verified, and confirmed by their source.
        with self.phases("transfer"), _released_on_failure(fetched.memory, relay):
            order.weights.bind(fetched.memory)
            attributes.apply(order.model, fetched.attributes)
            digests = None if fetched.evidence is None else fetched.evidence.digests
            request = order.request_for(fetched.fingerprint)
            if relay is not None and not order.weights.keeps_originals:
                relay.end("its weights are being processed for its kernels")
            relayed = None if relay is None else relay.publication
            contents = LoadedWeights(request, fetched.memory, fetched.attributes, digests, relayed)
            kept, not_served = self._kept(order, contents, relay)

        received = {source: count for source, count in client.received.items() if count}
        return Loaded(order.nbytes, fetched.fingerprint, None, kept, not_served, fetched, received, client.shared)

    def _relay(self, order: _Order) -> StoreRelay | None:
        if self.relays is None:
            return None
        return StoreRelay(order.request, functools.partial(serving.listener_of, self.relays))

    def _fetch_options(self, order: _Order, progress: Progress, relay: Relay | None) -> FetchOptions:
        return FetchOptions(
            order.request,
            Timeouts(self.config.connect_timeout, self.config.stall_timeout),
            self.access,
            self.config.verify,
            self.config.wait_timeout,
            self.config.min_bandwidth,
            self.config.fallback == "disk",
            allocate=lambda _: order.weights.allocate(),
            check_attributes=lambda received: attributes.require_settable(order.model, received),
            progress=progress,
            relay=relay,
        )

    def _fill_alone(self, model: nn.Module, not_served: str) -> Loaded:
        """Loads from disk as without Netloader."""
        fingerprint, mixture = self._finish(self.rank.load_from_disk(model))
        return Loaded(fingerprint=fingerprint, not_served=not_served, mixture=mixture)

    def _fill_from_disk(self, order: _Order) -> Loaded:
        """Loads from disk into memory that can be served."""
        try:
            memory = order.weights.allocate()
        except UnsupportedModel as error:
            self.rank.log_not_served(str(error))
            self.note_not_served(str(error))
            return dataclasses.replace(self._fill_alone(order.model, str(error)), nbytes=order.nbytes)

        with _released_on_failure(memory):
            # Before loading, so that it writes into the memory, and so that a comparison shows what else it sets.
            order.weights.move_into(memory)
            before = attributes.Snapshot.of(order.model)
            record = self.rank.load_from_disk(order.model)
            return self._collect(order, memory, before, record)

    def _collect(self, order: _Order, memory: Memory, before: attributes.Snapshot, record: ReadRecord) -> Loaded:
        """What a load from disk has left in `memory` and elsewhere in the model."""
        try:
            order.weights.collect_into(order.model, memory)
            changes = before.changes(order.model)
        except UnsupportedModel as error:
            fingerprint, mixture = self._finish(record)
            reason = str(error)
        else:
            fingerprint, mixture = _fingerprint_of(record)
            reason = mixture or record.unknown_weights()

        kept: Kept | None = None
        if reason:
            self.rank.log_not_served(reason)
            release(memory)
        else:
            request = order.request_as_read(record, fingerprint)
            kept, reason = self._kept(order, LoadedWeights(request, memory, changes))
        return Loaded(order.nbytes, fingerprint, None, kept, reason, mixture=mixture)

    def _kept(self, order: _Order, contents: LoadedWeights, relay: StoreRelay | None = None) -> tuple[Kept | None, str]:
        """Makes the memory servable. What can be served, or None with the reason; none is needed if nobody wants it."""
        memory, kept = contents.memory, Kept(order.weights, contents, relay)
        if not self.keep:
            kept.release()
            return None, ""
        try:
            if not memory.servable:
                memory.seal()
        except OSError as error:
            return None, self._not_kept(kept, f"the arena cannot be sealed: {error}")
        if relay is not None:
            relay.complete()

        # Post-processing comes next, and on an accelerator it changes what is to be served.
        if not order.weights.keeps_originals:
            self.rank.watch_changes()
        try:
            order.weights.note_originals(memory)
        except UnsupportedModel as error:
            return None, self._not_kept(kept, str(error))
        return kept, ""

    def _not_kept(self, kept: Kept, reason: str) -> str:
        """Gives up `kept`, which cannot be served for `reason`, and returns that."""
        self.rank.log_not_served(reason)
        kept.release()
        return reason

    def _finish(self, record: ReadRecord) -> tuple[str, str]:
        """As `_fingerprint_of`, for weights that are not served: a mixture shows in the log only."""
        fingerprint, mixture = _fingerprint_of(record)
        if mixture:
            logger.error("%s may be a mixture: %s", self.rank.weights_name, mixture)
        return fingerprint, mixture


@dataclass(frozen=True)
class _Order:
    """A model to fill, its weights, and the request by which sources are asked for them."""

    model: nn.Module
    weights: ModelWeights
    request: Request

    @property
    def nbytes(self) -> int:
        return self.weights.manifest.nbytes

    def request_for(self, fingerprint: str) -> Request:
        """The request that what has come from a source answers."""
        identity = msgspec.structs.replace(self.request.identity, fingerprint=fingerprint)
        return dataclasses.replace(self.request, identity=identity)

    def request_as_read(self, record: ReadRecord, fingerprint: str) -> Request:
        """The request that what was read from disk answers."""
        return dataclasses.replace(self.request, identity=as_read(self.request.identity, record, fingerprint))


def as_read(identity: ModelIdentity, record: ReadRecord, fingerprint: str) -> ModelIdentity:
    """The identity of what was read: a link or a branch of the hub may have led elsewhere when `identity` was taken."""
    if identity.name_is_path:
        return msgspec.structs.replace(identity, name=record.real_folder or identity.name, fingerprint=fingerprint)
    snapshot = snapshot_in(record.folder)
    revision = snapshot.revision if snapshot else identity.revision
    return msgspec.structs.replace(identity, revision=revision, fingerprint=fingerprint)


def release(memory: Memory) -> None:
    """Gives up memory that will not be served: the tensors of the model keep what they need of it. Idempotent."""
    memory.free_with_tensors()
    memory.close()


@contextlib.contextmanager
def _released_on_failure(memory: Memory, relay: StoreRelay | None = None) -> Iterator[None]:
    try:
        yield
    except BaseException:
        if relay is not None:
            relay.end(_NOT_LOADED)
        release(memory)
        raise


def _fingerprint_of(record: ReadRecord) -> tuple[str, str]:
    """The fingerprint of what was read, or why that may be a mixture of two checkpoints; one of them is empty."""
    try:
        return record.finish(), ""
    except CheckpointChanged as error:
        return "", str(error)
