"""Classifiers that vLLM makes from causal models while it loads them, such as Qwen3-Reranker.

Their checkpoints hold no classifier. vLLM loads the head of the causal model, computes the weight of the classifier
from the rows of a few tokens, and deletes the head. A client gets that weight, and no head.

So the head with which such a model is built, and which holds nothing yet, is removed before anything is loaded, by
servers and clients alike. A load from disk makes a head of its own for as long as it needs one. In the end all models
have the same modules.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from vllm.config import ModelConfig
from vllm.model_executor.models import adapters
from vllm.tokenizers import get_tokenizer

_HEAD = "lm_head"


def remove_passing_head(model: nn.Module, model_config: ModelConfig) -> None:
    """Deletes the head of `model`, which is not loaded yet, if loading would delete it anyway. Idempotent."""
    adapted = any(base.__module__ == adapters.__name__ for base in type(model).__mro__)
    if adapted and _setting(model_config, "method") in adapters.SEQ_CLS_LOAD_METHODS:
        language_model = adapters._get_language_model_for_seq_cls(model)
        if _HEAD in language_model._modules:
            delattr(language_model, _HEAD)


def classifier_tokens(model_config: ModelConfig) -> str:
    """The rows of the head from which the classifier is made, as text; empty for other models.

    The configuration has the tokens as texts, and the tokenizer of this instance makes numbers of them.
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
    """A setting of the model, looked for in the places where vLLM looks for it."""
    config = model_config.hf_config
    return getattr(config, name, getattr(config.get_text_config(), name, None))
