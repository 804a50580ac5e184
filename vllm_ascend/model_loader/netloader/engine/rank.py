"""What a load needs of vLLM, read from vLLM's configuration in one place."""

from __future__ import annotations

import functools

import torch
import vllm
from vllm.config import ModelConfig, VllmConfig
from vllm.config.load import LoadConfig
from vllm.utils.network_utils import get_ip

from vllm_ascend import versions
from vllm_ascend.distributed.gather import gather
from vllm_ascend.model_loader.netloader.engine.device import device_of
from vllm_ascend.model_loader.netloader.engine.disk import fingerprint_here, load_from_disk
from vllm_ascend.model_loader.netloader.engine.model_folder import small_files_of
from vllm_ascend.model_loader.netloader.engine.progress import progress_bar
from vllm_ascend.model_loader.netloader.engine.vllm_identity import (
    global_rank,
    model_identity,
    rank_coordinates,
    require_checkpoint,
    role_of,
)
from vllm_ascend.model_loader.netloader.engine.weight_changes import watch_workers
from vllm_ascend.model_loader.netloader.instance.rank import Rank


def rank_of(
    vllm_config: VllmConfig,
    model_config: ModelConfig,
    load_config: LoadConfig,
    configured_name: str | None,
    *,
    on_host: bool = False,
) -> Rank:
    """This rank, for a load of the model that `model_config` describes. vLLM's parallel groups must exist.

    `load_config` is that of the loader. `configured_name` is MODEL. With `on_host`, the model is filled in host memory,
    wherever the engine computes. Raises ConfigError for a device or a checkpoint that Netloader cannot use.
    """
    computes_on = device_of(vllm_config)
    number = global_rank(vllm_config)
    require_checkpoint(model_config)
    if number == 0:
        versions.warn_if_untried("Netloader", vllm.__version__, versions.NETLOADER)

    shows_progress = vllm_config.load_config.use_tqdm_on_load and number == 0
    return Rank(
        number=number,
        role=role_of(model_config),
        coordinates=rank_coordinates(vllm_config),
        # Layers of target and draft register in one compilation_config, so all configurations of an engine share it.
        engine=vllm_config.compilation_config,
        computes_on=computes_on,
        loads_on=torch.device("cpu") if on_host else computes_on,
        identify=lambda: model_identity(vllm_config, model_config, configured_name),
        fingerprint=lambda model: fingerprint_here(model, model_config, vllm_config.load_config),
        load_from_disk=lambda model: load_from_disk(model, model_config, load_config),
        gather=gather,
        own_address=_own_address,
        progress_bar=functools.partial(progress_bar, enabled=shows_progress),
        watch_changes=watch_workers,
        small_files=lambda: small_files_of(model_config, vllm_config.load_config),
    )


def _own_address() -> str:
    address: str = get_ip()
    return "127.0.0.1" if address == "0.0.0.0" else address
