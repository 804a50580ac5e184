"""vLLM's own configuration for small models, made in this process and without an engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vllm.config import ModelConfig, VllmConfig
from vllm.config.load import LoadConfig

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "torch_dtype": "bfloat16",
}


def write_config(folder: Path, **keys: Any) -> Path:
    """Writes the config.json of a small Llama with further `keys` into `folder`, which it returns."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA | keys))
    return folder


def load_config_of(extra: dict[str, Any]) -> LoadConfig:
    """The configuration of the loader, without a progress bar of vLLM's."""
    return LoadConfig(load_format="netloader", model_loader_extra_config=extra, use_tqdm_on_load=False)


def configuration_of(folder: Path, **extra: Any) -> VllmConfig:
    """The configuration for the model in `folder`, with `extra` as keys of Netloader's."""
    model_config = ModelConfig(model=str(folder), skip_tokenizer_init=True)
    return VllmConfig(model_config=model_config, load_config=load_config_of(extra))
