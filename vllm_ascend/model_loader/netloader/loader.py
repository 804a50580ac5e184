"""The model loader that vLLM calls.

`load_weights` asks the sources first and vLLM's own loader second, into the same, untouched model: what arrives are the
raw weights of this rank, so vLLM's post-processing runs as after a load from disk. After it, `load_model` serves them.
`__init__` only parses, because vLLM builds loaders more often than it loads.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import nn
from tqdm import tqdm
from vllm.config import ModelConfig, VllmConfig, get_current_vllm_config
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.utils.network_utils import get_ip

from vllm_ascend.model_loader.netloader import serving
from vllm_ascend.model_loader.netloader.arena import Arena, allocate
from vllm_ascend.model_loader.netloader.client import Client, Fetched, Request
from vllm_ascend.model_loader.netloader.config import NetLoaderConfig
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import SourcesExhausted, UnsupportedModel
from vllm_ascend.model_loader.netloader.report import LoadReport, Phases
from vllm_ascend.model_loader.netloader.transport import Timeouts, transports
from vllm_ascend.model_loader.netloader.vllm_identity import global_rank, model_identity, rank_coordinates, role_of
from vllm_ascend.model_loader.netloader.weights import ModelWeights

logger = logging.getLogger(__name__)


class NetLoader(BaseModelLoader):
    """``--load-format netloader``. Its configuration is `NetLoaderConfig`."""

    def __init__(self, load_config: LoadConfig) -> None:
        """Raises ConfigError."""
        super().__init__(load_config)
        self._config = NetLoaderConfig.parse(load_config.model_loader_extra_config)
        self._load: _Load | None = None

    def download_model(self, model_config: ModelConfig) -> None:
        """Downloads nothing: weight files are needed only if every source fails, and then the disk load gets them."""

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        """Loads, post-processes, and serves. Raises ConfigError, SourcesExhausted, or what vLLM's loader raises."""
        load = self._load = _Load(self._config, vllm_config, model_config)
        try:
            with load.reported():
                model: nn.Module = super().load_model(vllm_config, model_config, prefix)
                load.serve(model)
        finally:
            self._load = None
        return model

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Fills `model` from a source or from disk."""
        load = self._load or _Load(self._config, get_current_vllm_config(), model_config)
        load.fill(model, self._load_from_disk)

    def _load_from_disk(self, model: nn.Module, model_config: ModelConfig) -> None:
        load_config = copy.copy(self.load_config)
        load_config.load_format = "auto"
        load_config.model_loader_extra_config = {}
        DefaultModelLoader(load_config).load_weights(model, model_config)


class _Load:
    """One load of one model into one process, from the question where from to the report."""

    def __init__(self, config: NetLoaderConfig, vllm_config: VllmConfig, model_config: ModelConfig) -> None:
        self._config = config
        self._vllm_config = vllm_config
        self._model_config = model_config
        self._rank = global_rank(vllm_config)
        self._phases = Phases()
        self._request: Request | None = None
        self._arena: Arena | None = None
        self._report = LoadReport(
            role_of(model_config),
            self._rank,
            "failed",
            seconds=self._phases.seconds,
            not_served=None if config.serve else "SERVE is false",
        )
        config.listen_port_for(self._rank)  # a port out of range must stop the start before anything is loaded

    def fill(self, model: nn.Module, load_from_disk: Callable[[nn.Module, ModelConfig], None]) -> None:
        """Fills `model` from the first source that delivers, else from disk unless FALLBACK forbids it."""
        try:
            weights = ModelWeights(model)
        except UnsupportedModel as error:
            weights, unsupported = None, str(error)
        try:
            if weights is None:
                self._report.not_served = unsupported
                raise SourcesExhausted([unsupported] if self._config.source else [])
            self._fill_from_sources(weights)
        except SourcesExhausted as error:
            if self._config.fallback == "error":
                raise
            if self._config.source:
                logger.warning("no source delivered the weights, loading from disk: %s", error)
            with self._phases("disk"):
                self._fill_from_disk(model, weights, load_from_disk)
            self._report.outcome = "disk"

    def serve(self, model: nn.Module) -> None:
        """Publishes what was loaded; call it after post-processing. Inference does not depend on its success."""
        if self._request is None or self._arena is None:
            return
        try:
            with self._phases("serve"):
                server = serving.serve(model, self._request, self._arena, self._config, self._rank)
                address = str(Endpoint(self._config.listen_host or _own_address(), server.port))
                if self._config.output_prefix is not None:
                    serving.announce(self._config.output_prefix, self._rank, address)
        except OSError as error:
            self._report.not_served = f"{error.strerror or error}"
            logger.error("the weights of rank %d cannot be served: %s", self._rank, error)
        else:
            self._report.listening = address

    @contextlib.contextmanager
    def reported(self) -> Iterator[None]:
        """Reports at the end, also of a load that fails."""
        try:
            yield
        finally:
            logger.info("%s", self._report.line())
            if self._config.report_prefix is not None:
                self._write_report(Path(f"{self._config.report_prefix}{self._rank}.json"))

    def _write_report(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._report.write(path)
        except OSError as error:
            logger.error("the load report %s cannot be written: %s", path, error)

    def _fill_from_sources(self, weights: ModelWeights) -> None:
        request = self._describe(weights)
        with _progress_bar(weights.manifest.nbytes, self._vllm_config.load_config.use_tqdm_on_load) as progress:
            client = Client(
                request,
                transports(self._config.transport),
                Timeouts(self._config.connect_timeout, self._config.stall_timeout),
                phases=self._phases,
                progress=progress,
                attempts=self._report.attempts,
            )
            fetched = client.fetch(self._config.sources_for(self._rank))
        weights.bind(fetched.arena)
        self._keep(fetched.arena)
        self._note_fetched(fetched, weights.manifest.nbytes)

    def _note_fetched(self, fetched: Fetched, nbytes: int) -> None:
        self._report.outcome = "p2p"
        self._report.source = str(fetched.source)
        self._report.transport = fetched.transport
        self._report.bytes = nbytes

    def _fill_from_disk(
        self,
        model: nn.Module,
        weights: ModelWeights | None,
        load_from_disk: Callable[[nn.Module, ModelConfig], None],
    ) -> None:
        if weights is None or not self._config.serve:
            load_from_disk(model, self._model_config)
            return
        self._report.bytes = weights.manifest.nbytes
        arena = allocate(weights.manifest, mapped=True)
        weights.move_into(arena)
        load_from_disk(model, self._model_config)
        try:
            weights.collect_into(model, arena)
        except UnsupportedModel as error:
            self._report.not_served = str(error)
            arena.close()
            return
        self._describe(weights)
        self._keep(arena)

    def _describe(self, weights: ModelWeights) -> Request:
        if self._request is None:
            identity = model_identity(self._vllm_config, self._model_config, self._config.model)
            self._request = Request(identity, rank_coordinates(self._vllm_config), weights.manifest)
        return self._request

    def _keep(self, arena: Arena) -> None:
        """Keeps the raw bytes for serving, or only as long as the model needs them."""
        if not self._config.serve:
            arena.free_with_tensors()
            arena.close()
            return
        if not arena.servable:
            arena.seal()
        self._arena = arena


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


def _own_address() -> str:
    address: str = get_ip()
    return "127.0.0.1" if address == "0.0.0.0" else address
