"""Makes a checkpoint with random weights from a transformers configuration, for tests and benchmarks.

Answers of a random model are gibberish but deterministic at temperature 0, which is all that an equality test needs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

SMALL: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
}
LARGE: dict[str, Any] = {
    **SMALL,
    "vocab_size": 32768,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 22,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
"""The configuration of a model with 3.0 GB of weights in bf16."""


def make_random_model(
    directory: Path, configuration: dict[str, Any], *, architecture: str = "llama", seed: int = 0
) -> Path:
    """Writes config.json and safetensors, but no tokenizer, into `directory` unless they are there. Returns it."""
    if (directory / "config.json").is_file():
        return directory
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(architecture, **configuration)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory)
    return directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--architecture", default="llama")
    parser.add_argument("--configuration", type=json.loads, default=SMALL, help="JSON; default: a small dense model")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(make_random_model(options.directory, options.configuration, architecture=options.architecture))


if __name__ == "__main__":
    main()
