"""The model loader that vLLM calls.

`load_weights` asks the sources first and vLLM's own loader second, into the same, untouched model: what arrives are the
raw weights of this rank, so vLLM's post-processing runs as after a load from disk. After it, `load_model` serves them.
A model that is in use takes new weights by the same two steps, through a scratch model (`reload`).
`__init__` only parses, because vLLM builds loaders more often than it loads.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import nn
from vllm.config import ModelConfig, VllmConfig, get_current_vllm_config
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from vllm_ascend.model_loader.netloader.checkpoint.reading import Reading
from vllm_ascend.model_loader.netloader.config import NetLoaderConfig
from vllm_ascend.model_loader.netloader.engine.adapters import remove_passing_head
from vllm_ascend.model_loader.netloader.engine.disk import DiskLoader
from vllm_ascend.model_loader.netloader.engine.rehearsal import rehearse
from vllm_ascend.model_loader.netloader.engine.reload import all_or_none, hand_over, scratch_model
from vllm_ascend.model_loader.netloader.engine.reloadable import require_reloadable
from vllm_ascend.model_loader.netloader.load import Load
from vllm_ascend.model_loader.netloader.model import attributes

_in_use: Final[weakref.WeakSet[nn.Module]] = weakref.WeakSet()
"""Models whose parameters are post-processed: they can only be reloaded."""


class NetLoader(BaseModelLoader):
    """``--load-format netloader``. Its configuration is `NetLoaderConfig`."""

    def __init__(self, load_config: LoadConfig) -> None:
        """Raises ConfigError."""
        super().__init__(load_config)
        self._config = NetLoaderConfig.parse(load_config.model_loader_extra_config)
        self._load: Load | None = None

    def download_model(self, model_config: ModelConfig) -> None:
        """Downloads nothing: weight files are needed only if every source fails, and then the disk load gets them."""

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        """Loads, post-processes, and serves. Raises ConfigError, SourcesExhausted, or what vLLM's loader raises."""
        load = self._load = Load(self._config, vllm_config, model_config)
        try:
            with load.failure_reported():
                model: nn.Module = super().load_model(vllm_config, model_config, prefix)
                load.serve(model)
                load.meet_ranks()
        finally:
            self._load = None
        load.report()
        _in_use.add(model)
        return model

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Fills `model` from a source or from disk.

        A model that this process already uses gets new weights in place; the caller drops what was computed with the
        old ones. Called from outside `load_model`, it needs vLLM's configuration to be set.
        """
        remove_passing_head(model, model_config)
        if self._load is not None:
            self._load.fill(model, self._load_from_disk)
        elif model in _in_use:
            weights = self.get_all_weights(model_config, model)
            load_weights: Any = model.load_weights
            initialize_layerwise_reload(model)
            load_weights(weights)
            finalize_layerwise_reload(model, model_config)
        else:
            load = Load(self._config, get_current_vllm_config(), model_config)
            with load.failure_reported():
                load.fill(model, self._load_from_disk)
                load.serve(model)
            load.report()

    def get_all_weights(self, model_config: ModelConfig, model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """For vLLM's `reload_weights`: gets the new weights, and returns what `model.load_weights` takes them over by.

        Until then `model` is as it was and is served as it was, also if another rank fails. Raises ReloadRefused,
        UnsupportedModel where loading does more than a model in use can be told, or what `load_model` raises.
        """
        vllm_config = get_current_vllm_config()
        load = Load(self._config, vllm_config, model_config, on_host=True)
        with load.failure_reported(), load.suspension_undone_on_failure(), all_or_none(lambda: load.fingerprint):
            require_reloadable(model)
            scratch = scratch_model(vllm_config, model_config)
            remove_passing_head(scratch, model_config)
            before = attributes.Snapshot.of(scratch)
            load.fill(scratch, self._load_from_disk)
            load.require_one_checkpoint()
            told = before.changes(scratch)
            weights = rehearse(scratch, model, model_config)
            load.suspend()  # here, where it may still fail

        def finish() -> None:
            attributes.apply(model, told)
            load.serve(model)
            load.report()

        return hand_over(weights, model, model_config.dtype, finish, load.undo_suspension)

    def _load_from_disk(self, model: nn.Module, model_config: ModelConfig) -> Reading:
        loader = DiskLoader(self.load_config)
        loader.load_weights(model, model_config)
        return loader.reading
