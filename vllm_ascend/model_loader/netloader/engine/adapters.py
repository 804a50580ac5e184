"""Classifiers that vLLM makes from causal models while it loads them, such as Qwen3-Reranker.

Their checkpoints hold no classifier. vLLM loads the head of the causal model, computes the classifier's weight from the
rows of a few tokens, and deletes the head. What a client gets is that weight, and there is no head for it to load. So
the head that such a model is built with, which holds nothing yet, goes before anything is loaded, at servers and
clients alike: a load from disk makes one of its own for as long as it takes, and all models are the same in the end.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from vllm.config import ModelConfig
from vllm.model_executor.models import adapters
from vllm.tokenizers import get_tokenizer

_HEAD = "lm_head"


def remove_passing_head(model: nn.Module, model_config: ModelConfig) -> None:
    """Deletes the head of `model`, before it is loaded, if loading would delete it. Idempotent."""
    adapted = any(base.__module__ == adapters.__name__ for base in type(model).__mro__)
    if adapted and _setting(model_config, "method") in adapters.SEQ_CLS_LOAD_METHODS:
        language_model = adapters._get_language_model_for_seq_cls(model)
        if _HEAD in language_model._modules:
            delattr(language_model, _HEAD)


def classifier_tokens(model_config: ModelConfig) -> str:
    """By which rows of the head the classifier is made, empty for other models.

    The configuration has texts, and it is the tokenizer of this instance that makes numbers of them.
    """
    if _setting(model_config, "method") not in adapters.SEQ_CLS_LOAD_METHODS:
        return ""
    try:
        tokenizer = get_tokenizer(
            model_config.tokenizer,
            revision=model_config.tokenizer_revision,
            tokenizer_mode=model_config.tokenizer_mode,
            trust_remote_code=model_config.trust_remote_code,
        )
    except (OSError, ValueError):
        return "tokens unknown without a tokenizer"
    tokens = _setting(model_config, "classifier_from_token") or []
    return f"the tokens {[int(tokenizer.convert_tokens_to_ids(token)) for token in tokens]}"


def _setting(model_config: ModelConfig, name: str) -> Any:
    """As vLLM looks for it."""
    config = model_config.hf_config
    return getattr(config, name, getattr(config.get_text_config(), name, None))
