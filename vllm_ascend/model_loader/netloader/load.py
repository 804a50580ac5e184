"""One load of one model into one process, from the question where from to the report.

Sources come first, then the disk; both fill the same untouched model, in memory that can be served afterwards:
an arena in host memory, or on an accelerator the parameters themselves. What came is served under its own fingerprint,
the source's or that of the files that were read, whatever this host's files were when sources were asked.
Serving is a by-product: whatever stands in its way is logged, reported and told to clients, and the load goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import msgspec
import torch
from torch import nn
from tqdm import tqdm
from vllm.config import ModelConfig, VllmConfig
from vllm.utils.network_utils import get_ip

from vllm_ascend.distributed.gather import gather
from vllm_ascend.model_loader.netloader.checkpoint.reading import Reading
from vllm_ascend.model_loader.netloader.client.fetch import Client
from vllm_ascend.model_loader.netloader.client.inquiry import announce
from vllm_ascend.model_loader.netloader.client.options import FetchOptions
from vllm_ascend.model_loader.netloader.client.session import Fetched
from vllm_ascend.model_loader.netloader.config import NetLoaderConfig
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.engine import serving
from vllm_ascend.model_loader.netloader.engine.disk import fingerprint_here
from vllm_ascend.model_loader.netloader.engine.vllm_identity import (
    as_read,
    global_rank,
    model_identity,
    rank_coordinates,
    require_checkpoint,
    role_of,
)
from vllm_ascend.model_loader.netloader.engine.weight_changes import watch_workers
from vllm_ascend.model_loader.netloader.errors import (
    CheckpointChanged,
    ConfigError,
    ReloadRefused,
    SourceError,
    SourcesExhausted,
    TransportError,
    UnsupportedModel,
)
from vllm_ascend.model_loader.netloader.files import require_writable
from vllm_ascend.model_loader.netloader.model import attributes
from vllm_ascend.model_loader.netloader.model.live import Int8Cache
from vllm_ascend.model_loader.netloader.model.weights import ModelWeights, weights_of
from vllm_ascend.model_loader.netloader.report import LoadReport, Phases, write_whole
from vllm_ascend.model_loader.netloader.server.answers import Peer
from vllm_ascend.model_loader.netloader.server.server import WeightServer
from vllm_ascend.model_loader.netloader.transport.base import Timeouts
from vllm_ascend.model_loader.netloader.transport.digests import BLAKE3
from vllm_ascend.model_loader.netloader.transport.registry import transports
from vllm_ascend.model_loader.netloader.transport.store import Request
from vllm_ascend.model_loader.netloader.weights.identity import RankCoordinates
from vllm_ascend.model_loader.netloader.weights.memory import Memory
from vllm_ascend.model_loader.netloader.wire.access import Access
from vllm_ascend.model_loader.netloader.wire.messages import AttributeValue

logger = logging.getLogger(__name__)


class Load:
    """Call `fill`, post-process the model, then `serve` and `report`."""

    def __init__(
        self, config: NetLoaderConfig, vllm_config: VllmConfig, model_config: ModelConfig, *, on_host: bool = False
    ) -> None:
        """`on_host` is for a model that is filled in host memory, wherever the instance computes."""
        self._config = config
        self._computes_on = _device(vllm_config)
        self._device = torch.device("cpu") if on_host else self._computes_on
        self._vllm_config = vllm_config
        self._model_config = model_config
        self._rank = global_rank(vllm_config)
        self._phases = Phases()
        self._asked: Request | None = None
        self._contents: Request | None = None
        self._memory: Memory | None = None
        self._attributes: Mapping[str, AttributeValue] = {}
        self._weights: ModelWeights | None = None
        self._cache = Int8Cache(config.int8_cache, config.int8_cache_name)
        self._mixture = ""
        self.fingerprint = ""
        self._server: WeightServer | None = None
        self._undo_suspension: Callable[[], None] = lambda: None
        self._fetched: Fetched | None = None
        self._access = Access.configured(config)
        self._transports = transports(config.transports_for(self._computes_on.type), str(self._computes_on))
        # Layers of target and draft register in one compilation_config, so all configurations of an engine share it.
        self._engine = vllm_config.compilation_config
        self._terms = serving.ServeOptions(config, self._access, self._transports, self._rank, self._engine)
        self._report = LoadReport(
            role_of(model_config),
            self._rank,
            "failed",
            seconds=self._phases.seconds,
            not_served=None if config.serve else "SERVE is false",
        )
        # What cannot be as it is configured must stop the start before anything is loaded.
        require_checkpoint(model_config)
        self._require_writable_files()
        self._serves = config.serve and self._has_listener()

    def fill(self, model: nn.Module, load_from_disk: Callable[[nn.Module, ModelConfig], Reading]) -> None:
        """Fills `model` from the first source that delivers, else from disk unless FALLBACK forbids it."""
        weights: ModelWeights | None = None
        try:
            weights = weights_of(model, self._device)
            self._fill_from_sources(model, weights)
            return
        except UnsupportedModel as error:
            weights, reason = None, str(error)
            self._report.not_served = self._report.not_served or reason
            if self._config.fallback == "error":
                raise
        except SourcesExhausted as error:
            reason = str(error)
            if self._config.fallback == "error":
                raise
        if self._config.source:
            logger.warning("no source delivered the weights, loading from disk: %s", reason)
        with self._phases("disk"):
            self._fill_from_disk(model, weights, load_from_disk)
        self._report.outcome = "disk"

    def serve(self, model: nn.Module) -> None:
        """Publishes for as long as `model` lives what was loaded. Inference does not depend on its success.

        `model` may be another one than was filled.
        """
        try:
            with self._phases("serve"):
                self._publish(model)
                serving.resume(self._engine)
        except OSError as error:
            self._cannot_serve(str(error), self._memory)

    def require_one_checkpoint(self) -> None:
        """After `fill`. Raises ReloadRefused where the model may have got weights of two checkpoints."""
        if self._mixture:
            raise ReloadRefused(f"{self._mixture}: nothing was changed, reload again when nobody writes to it")

    def suspend(self) -> None:
        """Before a model in use changes: what is served from its own parameters is not served meanwhile.

        Raises TimeoutError where they are still being read; nothing has changed then.
        """
        if self._computes_on.type != "cpu":
            self._undo_suspension = serving.suspend(self._engine, "its weights are being replaced")

    def undo_suspension(self) -> None:
        """For a model in use that does not change after all: it is served as before."""
        self._undo_suspension()

    @contextlib.contextmanager
    def suspension_undone_on_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.undo_suspension()
            raise

    def _has_listener(self) -> bool:
        try:
            serving.open_listener(self._report.role, self._terms)
        except OSError as error:
            self._cannot_serve(error.strerror or str(error))
            return False
        return True

    def _require_writable_files(self) -> None:
        for key, prefix, path in (
            ("OUTPUT_PREFIX", self._config.output_prefix, self._address_path),
            ("REPORT_PREFIX", self._config.report_prefix, self._report_path),
        ):
            if prefix is not None:
                require_writable(key, prefix, path(prefix))

    def _publish(self, model: nn.Module) -> None:
        if not self._serves:
            serving.withdraw(self._report.role, self._engine)
            return
        self._note_changes(model)
        if self._contents is None or self._memory is None:
            reason = str(self._report.not_served)
            self._server = serving.decline(model, self._report.role, reason, self._terms)
            return
        evidence = self._fetched.evidence if self._fetched is not None else None
        digests = None if evidence is None else evidence.digests
        weights = serving.LoadedWeights(self._contents, self._memory, self._attributes, digests)
        self._server = serving.serve(model, weights, self._terms)
        self._report.listening = str(Endpoint(self._advertised_host(), self._server.port))
        self._write_address(self._report.listening)
        if self._fetched is not None and self._config.verify:  # what was not verified is not passed on as a replica
            timeout = self._config.connect_timeout
            _tell_source(self._fetched.address, self._fetched.session, self._server.port, timeout, self._access)

    def _note_changes(self, model: nn.Module) -> None:
        """Which weights post-processing has changed: on an accelerator that decides what can be served."""
        if self._memory is None or self._weights is None:
            return
        try:
            self._report.changed = changed = self._weights.find_changes(model, self._memory, self._cache)
        except UnsupportedModel as error:
            self._cannot_serve(str(error), self._memory)
            return
        if changed is not None and self._weights.keeps_originals:
            logger.info(
                "post-processing changed %d tensors of the %s weights; in host memory the originals of all are kept, "
                "so INT8_CACHE %r keeps nothing beside them",
                len(changed),
                self._report.role,
                self._cache.place,
            )

    def _write_address(self, address: str) -> None:
        if self._config.output_prefix is None:
            return
        try:
            write_whole(self._address_path(self._config.output_prefix), f"{address}\n".encode())
        except OSError as error:
            logger.error("the address %s cannot be written to OUTPUT_PREFIX: %s", address, error)

    def _address_path(self, prefix: str) -> Path:
        return Path(f"{prefix}{self._rank}.txt")

    def meet_ranks(self) -> None:
        """Tells the other ranks of this instance where this one listens, so that each can refer clients to the others.

        They compare their checkpoints too: files or sources may have changed between two ranks. Every rank comes here
        once, for its target model: a draft model may be on some ranks only.
        """
        if self._report.role != "target":
            return
        host, port = self._advertised_host(), self._server.port if self._server is not None else None
        ours = _Rank(rank_coordinates(self._vllm_config), host, port, self.fingerprint)
        ranks = [msgspec.msgpack.decode(payload, type=_Rank) for payload in gather(msgspec.msgpack.encode(ours))]
        if len({rank.fingerprint for rank in ranks if rank.fingerprint}) > 1:
            logger.error(
                "the ranks of this instance have weights of different checkpoints, this one of %s: its answers will be "
                "wrong. Start it again when nobody changes them",
                self.fingerprint or "an unknown one",
            )
        if self._server is not None:
            self._server.refer_to(
                Peer(rank.coordinates, "" if rank.host == host else rank.host, rank.port)
                for rank in ranks
                if rank.port is not None
            )

    def _advertised_host(self) -> str:
        if self._config.listen_host in (None, "0.0.0.0", "::"):
            return _own_address()
        return str(self._config.listen_host)

    @contextlib.contextmanager
    def failure_reported(self) -> Iterator[None]:
        """Reports a load that ends within by an exception."""
        try:
            yield
        except BaseException:
            if self._server is None:
                self._memory = None  # not published, so nobody needs the memory any more
                serving.abandon(self._terms)
            self._report.outcome = "failed"
            self.report()
            raise

    def report(self) -> None:
        """Writes the line in the log, and the file where one is wanted."""
        logger.info("%s", self._report.line())
        if self._config.report_prefix is not None:
            self._write_report(self._config.report_prefix)

    def _report_path(self, prefix: str) -> Path:
        suffix = "" if self._report.role == "target" else f"-{self._report.role}"
        return Path(f"{prefix}{self._rank}{suffix}.json")

    def _write_report(self, prefix: str) -> None:
        path = self._report_path(prefix)
        try:
            self._report.write(path)
        except OSError as error:
            logger.error("the load report %s cannot be written: %s", path, error)

    def _fill_from_sources(self, model: nn.Module, weights: ModelWeights) -> None:
        sources = self._config.sources_for(self._rank)
        with self._phases("join"):
            identity = model_identity(self._vllm_config, self._model_config, self._config.model)
            if sources:
                here = fingerprint_here(model, self._model_config, self._vllm_config.load_config)
                identity = msgspec.structs.replace(identity, fingerprint=here)
            request = self._asked = Request(identity, rank_coordinates(self._vllm_config), weights.manifest)
        show_progress = self._vllm_config.load_config.use_tqdm_on_load and self._rank == 0
        with _progress_bar(weights.manifest.nbytes, show_progress) as progress:
            terms = FetchOptions(
                request,
                Timeouts(self._config.connect_timeout, self._config.stall_timeout),
                self._access,
                self._config.verify,
                self._config.wait_timeout,
                self._config.min_bandwidth,
                self._config.fallback == "disk",
                allocate=lambda _: weights.allocate(),
                check_attributes=lambda received: attributes.require_settable(model, received),
                progress=progress,
            )
            client = Client(terms, self._transports, self._phases, self._report.attempts)
            fetched = client.fetch(sources)
        with self._phases("transfer"):
            weights.bind(fetched.memory)
            attributes.apply(model, fetched.attributes)
            self._attributes = fetched.attributes
            identity = msgspec.structs.replace(identity, fingerprint=fetched.fingerprint)
            self._contents = dataclasses.replace(request, identity=identity)
            self.fingerprint = fetched.fingerprint
            self._keep(weights, fetched.memory)
        self._fetched = fetched
        self._note_fetched(fetched, weights.manifest.nbytes, client.received)

    def _note_fetched(self, fetched: Fetched, nbytes: int, received: Mapping[str, int]) -> None:
        self._report.outcome = "p2p"
        self._report.received = {source: count for source, count in received.items() if count}
        self._report.verified = BLAKE3 if fetched.evidence is not None else None
        self._report.root = fetched.evidence.root if fetched.evidence is not None else None
        self._report.source = str(fetched.source)
        self._report.transport = fetched.transport
        self._report.bytes = nbytes

    def _fill_from_disk(
        self,
        model: nn.Module,
        weights: ModelWeights | None,
        load_from_disk: Callable[[nn.Module, ModelConfig], Reading],
    ) -> None:
        if weights is None or not self._serves:
            self._warn_of_mixture(load_from_disk(model, self._model_config))
            return
        self._report.bytes = weights.manifest.nbytes
        try:
            memory = weights.allocate()
        except UnsupportedModel as error:
            self._cannot_serve(str(error))
            self._warn_of_mixture(load_from_disk(model, self._model_config))
            return
        weights.move_into(memory)
        before = attributes.Snapshot.of(model)
        reading = load_from_disk(model, self._model_config)
        try:
            weights.collect_into(model, memory)
            self._attributes = before.changes(model)
        except UnsupportedModel as error:
            self._warn_of_mixture(reading)
            self._cannot_serve(str(error), memory)
            return
        self._note_fingerprint(reading)
        if reason := self._mixture or reading.unknown_weights():
            self._cannot_serve(reason, memory)
            return
        assert self._asked is not None
        identity = as_read(self._asked.identity, reading, self.fingerprint)
        self._contents = dataclasses.replace(self._asked, identity=identity)
        self._keep(weights, memory)

    def _note_fingerprint(self, reading: Reading) -> None:
        try:
            self.fingerprint = reading.finish()
        except CheckpointChanged as error:
            self._mixture = str(error)

    def _warn_of_mixture(self, reading: Reading) -> None:
        """Where nothing is served that could be declined."""
        self._note_fingerprint(reading)
        if self._mixture:
            logger.error("the %s weights of rank %d may be a mixture: %s", self._report.role, self._rank, self._mixture)

    def _keep(self, weights: ModelWeights, memory: Memory) -> None:
        """Keeps the raw bytes for serving, or only as long as the model needs them."""
        if not self._serves:
            memory.free_with_tensors()
            memory.close()
            return
        try:
            if not memory.servable:
                memory.seal()
        except OSError as error:
            self._cannot_serve(f"the arena cannot be sealed: {error}", memory)
            return
        weights.note_originals(memory, self._cache)
        if not weights.keeps_originals:
            watch_workers()
        self._weights = weights
        self._memory = memory

    def _cannot_serve(self, reason: str, memory: Memory | None = None) -> None:
        if memory is not None:
            memory.free_with_tensors()
            memory.close()
        self._memory = None
        self._report.not_served = reason
        logger.error("the %s weights of rank %d cannot be served: %s", self._report.role, self._rank, reason)


class _Rank(msgspec.Struct, frozen=True):
    """What ranks tell each other: where they listen, if they do, and of which checkpoint their weights are."""

    coordinates: RankCoordinates
    host: str
    port: int | None
    fingerprint: str


@contextlib.contextmanager
def _progress_bar(nbytes: int, enabled: bool) -> Iterator[Callable[[int], None]]:
    """A bar that appears when bytes move for more than a second; may be advanced from any thread."""
    lock = threading.Lock()
    with tqdm(
        total=nbytes,
        desc="Loading weights from a running instance",
        unit="B",
        unit_scale=True,
        disable=not enabled,
        delay=1,
        bar_format="{desc}: {percentage:3.0f}% Completed | {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]\n",
    ) as bar:

        def advance(moved: int) -> None:
            with lock:
                bar.update(moved)

        yield advance


def _device(vllm_config: VllmConfig) -> torch.device:
    """Where the model computes: this rank's, for which vLLM's configuration has only a type."""
    kind = vllm_config.device_config.device_type
    if vllm_config.device_config.device is None or not hasattr(torch, kind):
        raise ConfigError(
            f"torch has no module for {kind} devices, so Netloader cannot use them: --load-format auto can"
        )
    return torch.device(kind) if kind == "cpu" else torch.device(kind, torch.accelerator.current_device_index())


def _own_address() -> str:
    address: str = get_ip()
    return "127.0.0.1" if address == "0.0.0.0" else address


def _tell_source(source: Endpoint, session: bytes, port: int, timeout: float, access: Access) -> None:
    """Lets the source refer others to this process, in a thread: whether it is still there does not matter here."""

    def tell() -> None:
        try:
            announce(source, session, port, timeout, access)
        except (SourceError, TransportError) as error:
            logger.debug("%s does not hear that its weights are served here too: %s", source, error)

    try:
        threading.Thread(target=tell, name="netloader-announce", daemon=True).start()
    except RuntimeError as error:
        logger.debug("no thread can be had to tell %s that its weights are served here too: %s", source, error)
