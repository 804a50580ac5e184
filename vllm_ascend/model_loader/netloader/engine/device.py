"""The device on which this rank computes."""

from __future__ import annotations

import torch
from vllm.config import VllmConfig

from vllm_ascend.model_loader.netloader.errors import ConfigError


def device_of(vllm_config: VllmConfig) -> torch.device:
    """The device of this rank, with its index; vLLM's configuration knows only the type.

    Raises ConfigError, naming the type, if torch cannot use devices of it.
    """
    kind = vllm_config.device_config.device_type
    if vllm_config.device_config.device is None or not hasattr(torch, kind):
        raise ConfigError(
            f"torch has no module for {kind} devices, so Netloader cannot use them: --load-format auto can"
        )
    return torch.device(kind) if kind == "cpu" else torch.device(kind, torch.accelerator.current_device_index())
