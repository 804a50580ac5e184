"""What vLLM's configuration says about the model and about the part of it that this rank holds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import vllm_ascend
from vllm_ascend.model_loader.netloader.checkpoint.hub_cache import snapshot_in
from vllm_ascend.model_loader.netloader.engine.model_folder import noted
from vllm_ascend.model_loader.netloader.errors import ConfigError
from vllm_ascend.model_loader.netloader.weights.identity import ModelIdentity, RankCoordinates, canonical_digest

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

_INCIDENTAL_CONFIG_KEYS = {"_name_or_path", "_commit_hash", "transformers_version", "torch_dtype", "dtype"}
"""Keys that may differ between copies of one model. The type in use is a field of its own in the identity."""


def role_of(model_config: ModelConfig) -> str:
    """The role of a model: ``draft`` for the draft model of speculative decoding, ``target`` for any other."""
    return "draft" if model_config.runner_type == "draft" else "target"


def require_checkpoint(model_config: ModelConfig) -> None:
    """Raises ConfigError if vLLM's loader of checkpoints cannot read the model, as it cannot read GGUF."""
    if model_config.quantization == "gguf":
        raise ConfigError(
            f"{model_config.model_weights or model_config.model} is a GGUF model, which only the load format of its "
            f"own plugin reads: use --load-format gguf; Netloader neither takes nor serves such weights"
        )


def model_identity(vllm_config: VllmConfig, model_config: ModelConfig, configured_name: str | None) -> ModelIdentity:
    """The identity of a model, without a fingerprint. `configured_name` is MODEL, which names the target model only."""
    import torch
    import vllm

    hub_name, revision = _hub_name(model_config)
    role = role_of(model_config)
    name = (configured_name if role == "target" else None) or hub_name
    return ModelIdentity(
        name=name or os.path.realpath(model_config.model),
        name_is_path=not name,
        revision=revision,
        architecture=", ".join(model_config.architectures),
        config_digest=canonical_digest(_essential(model_config.hf_config.to_dict())),
        dtype=str(model_config.dtype).removeprefix("torch."),
        quantization=str(model_config.quantization or ""),
        role=role,
        load_options=_load_options(vllm_config, model_config),
        versions={package.__name__: package.__version__.partition("+")[0] for package in (vllm, torch, vllm_ascend)},
    )


def rank_coordinates(vllm_config: VllmConfig) -> RankCoordinates:
    """The place of this process in the partition of the model. vLLM's parallel groups must exist."""
    from vllm.distributed import parallel_state

    groups = {
        "tp": parallel_state.get_tp_group(),
        "pp": parallel_state.get_pp_group(),
        "pcp": parallel_state.get_pcp_group(),
    }
    placement = ""
    if vllm_config.parallel_config.enable_expert_parallel:
        groups["ep"] = parallel_state.get_ep_group()
        placement = str(vllm_config.parallel_config.expert_placement_strategy)
    coordinates: dict[str, int] = {}
    for name, group in groups.items():
        coordinates |= {f"{name}_rank": group.rank_in_group, f"{name}_size": group.world_size}
    return RankCoordinates(**coordinates, expert_placement=placement)


def global_rank(vllm_config: VllmConfig) -> int:
    """The number of this worker among all workers of the deployment. torch.distributed must be initialized.

    Each data-parallel replica of a dense model has a world of its own, whose ranks begin at 0.
    """
    import torch

    parallel = vllm_config.parallel_config
    rank_in_replica = torch.distributed.get_rank() % parallel.world_size
    return int(parallel.data_parallel_index * parallel.world_size + rank_in_replica)


def _hub_name(model_config: ModelConfig) -> tuple[str, str]:
    """Repository and revision, both empty for a plain directory. An offline vLLM has a path in the cache instead."""
    if (note := noted(model_config)) is not None and note.name:
        return note.name, note.revision
    if not Path(model_config.model).is_dir():
        # vLLM resolves a branch name to the commit where it can ask the hub.
        revision = getattr(model_config.revision, "resolved", None) or model_config.revision
        return model_config.model, str(revision or "")
    snapshot = snapshot_in(model_config.model)
    return (snapshot.name, snapshot.revision) if snapshot else ("", "")


def _load_options(vllm_config: VllmConfig, model_config: ModelConfig) -> str:
    """The settings that change the bytes of a rank, beside the model and the partition, as text."""
    from vllm_ascend.model_loader.netloader.engine.adapters import classifier_tokens

    parallel, options = vllm_config.parallel_config, []
    if parallel.enable_eplb:
        redundant = parallel.eplb_config.num_redundant_experts
        options.append(f"expert load balancing with {redundant} redundant experts")
    if tokens := classifier_tokens(model_config):
        options.append(f"a classifier made from {tokens}")
    return ", ".join(options)


def _essential(config: Any) -> Any:
    """`config` without what may differ between copies of one model. The part on quantization counts as a whole."""
    if isinstance(config, dict):
        kept = {str(key): value for key, value in config.items() if key not in _INCIDENTAL_CONFIG_KEYS}
        return {key: value if key == "quantization_config" else _essential(value) for key, value in kept.items()}
    if isinstance(config, list | tuple):
        return [_essential(item) for item in config]
    return config
