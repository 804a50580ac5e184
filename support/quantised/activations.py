"""The values that linear layers are given, which static quantisation must know before."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

TEXT = (
    "Paris is the capital of France, and about two million people live there. Water boils at a hundred degrees. "
    "def fibonacci(n): return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2). Once upon a time there was a king."
)


class Range(NamedTuple):
    """The least and the greatest value of each input of a layer."""

    low: torch.Tensor
    high: torch.Tensor


def observe_inputs(checkpoint: Path) -> dict[str, Range]:
    """For each linear layer by its name, seen while the model reads a text, or random tokens without a tokenizer."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    seen: dict[str, Range] = {}

    def observe(name: str) -> Any:
        def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            rows = inputs[0].detach().flatten(0, -2)
            low, high = rows.amin(0), rows.amax(0)
            before = seen.get(name, Range(low, high))
            seen[name] = Range(torch.minimum(before.low, low), torch.maximum(before.high, high))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(observe(name))
    with torch.inference_mode():
        model(_tokens(checkpoint, model.config.vocab_size))
    return seen


def _tokens(checkpoint: Path, vocabulary: int) -> torch.Tensor:
    if (checkpoint / "tokenizer.json").is_file():
        from transformers import AutoTokenizer

        tokens: torch.Tensor = AutoTokenizer.from_pretrained(checkpoint)(TEXT, return_tensors="pt").input_ids
        return tokens
    return torch.randint(vocabulary, (1, 256), generator=torch.Generator().manual_seed(0))
