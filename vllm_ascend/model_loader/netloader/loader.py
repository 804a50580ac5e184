"""The model loader that vLLM calls.

vLLM creates a model, has `load_weights` fill it, post-processes it, and has it ready. Netloader takes the place of the
second step: sources are asked first and vLLM's own loader second, for the same, untouched model. What arrives are the
raw weights of this rank, so post-processing does what it does after a load from disk. When it is over, `load_model`
serves the weights. A model that is in use takes new weights by the same two steps, through a scratch model (`reload`).

`__init__` only parses the configuration, because vLLM builds loaders more often than it loads.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import nn
from vllm.config import ModelConfig, VllmConfig, get_current_vllm_config
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from vllm_ascend.model_loader.netloader.config import NetLoaderConfig
from vllm_ascend.model_loader.netloader.engine.adapters import remove_passing_head
from vllm_ascend.model_loader.netloader.engine.rank import rank_of
from vllm_ascend.model_loader.netloader.engine.rehearsal import rehearse
from vllm_ascend.model_loader.netloader.engine.reload import (
    all_or_none,
    hand_over,
    require_ranks_alike,
    scratch_model,
)
from vllm_ascend.model_loader.netloader.engine.reloadable import require_reloadable
from vllm_ascend.model_loader.netloader.instance.filling import Loaded
from vllm_ascend.model_loader.netloader.instance.load import ModelLoad, require_one_checkpoint
from vllm_ascend.model_loader.netloader.model import attributes
from vllm_ascend.model_loader.netloader.transport.registry import transports

_in_use: Final[weakref.WeakSet[nn.Module]] = weakref.WeakSet()
"""Models whose parameters are post-processed. They can only be reloaded."""


class NetLoader(BaseModelLoader):
    """``--load-format netloader``, configured by ``--model-loader-extra-config`` (see `NetLoaderConfig`)."""

    def __init__(self, load_config: LoadConfig) -> None:
        """Raises ConfigError for a configuration that is wrong."""
        super().__init__(load_config)
        self._config = NetLoaderConfig.parse(load_config.model_loader_extra_config)
        self._load: ModelLoad | None = None
        self._loaded: Loaded | None = None

    def download_model(self, model_config: ModelConfig) -> None:
        """Downloads nothing. Files are needed only if every source fails, and then the load from disk gets them."""

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        """Creates a model, loads and post-processes its weights, and serves them.

        Raises ConfigError for what cannot be as it is configured, SourcesExhausted if FALLBACK forbids the disk, or
        whatever vLLM's own loader raises.
        """
        load = self._load = self._begin(vllm_config, model_config)
        try:
            with load.failure_reported():
                model: nn.Module = super().load_model(vllm_config, model_config, prefix)
                assert self._loaded is not None, "vLLM has loaded a model without load_weights"
                load.publish(model, self._loaded)
                load.meet_ranks(self._loaded)
        finally:
            self._load = self._loaded = None
        load.report()
        _in_use.add(model)
        return model

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Fills `model` from a source or from disk. Raises as `load_model`.

        A model that this process already uses gets new weights in place, and the caller drops what was computed with
        the old ones. Called from outside `load_model`, it needs vLLM's current configuration to be set.
        """
        remove_passing_head(model, model_config)
        if self._load is not None:
            self._loaded = self._load.fill(model)
        elif model in _in_use:
            self._reload(model, model_config)
        else:
            load = self._begin(get_current_vllm_config(), model_config)
            with load.failure_reported():
                load.publish(model, load.fill(model))
            load.report()

    def get_all_weights(self, model_config: ModelConfig, model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """Gets new weights for `model`, which is in use. vLLM passes the result to the model's own `load_weights`.

        Until then the model stays as it was and is served as before, also if another rank fails. Raises ReloadRefused
        if the model cannot take new weights in place, UnsupportedModel if loading sets what a model in use cannot be
        told, or what `load_model` raises.
        """
        vllm_config = get_current_vllm_config()
        load = self._begin(vllm_config, model_config, reloads=True)
        with load.failure_reported():
            with all_or_none():
                require_reloadable(model)
                scratch = scratch_model(vllm_config, model_config)
                remove_passing_head(scratch, model_config)
                before = attributes.Snapshot.of(scratch)
                loaded = load.fill(scratch)
                require_one_checkpoint(loaded)
                told = before.changes(scratch)
                weights = rehearse(scratch, model, model_config)
                load.suspend()  # the last step that may fail, and the first that clients notice
            require_ranks_alike(loaded.fingerprint)

        @contextlib.contextmanager
        def replacing() -> Iterator[None]:
            with load.failure_reported(), load.replacing():
                yield
                attributes.apply(model, told)
                load.publish(model, loaded)
            load.report()

        return hand_over(weights, model, model_config.dtype, replacing, load.abandon)

    def _begin(self, vllm_config: VllmConfig, model_config: ModelConfig, *, reloads: bool = False) -> ModelLoad:
        """Raises ConfigError."""
        rank = rank_of(vllm_config, model_config, self.load_config, self._config.model, on_host=reloads)
        names = self._config.transports_for(rank.computes_on.type)
        return ModelLoad(self._config, rank, transports(names, str(rank.computes_on)), reloads=reloads)

    def _reload(self, model: nn.Module, model_config: ModelConfig) -> None:
        weights = self.get_all_weights(model_config, model)
        load_weights: Any = model.load_weights
        initialize_layerwise_reload(model)
        load_weights(weights)
        finalize_layerwise_reload(model, model_config)
