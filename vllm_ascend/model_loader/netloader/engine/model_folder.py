"""The directory of a model on this host, and what lies in it beside the weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import huggingface_hub
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from vllm import envs
from vllm.config import ModelConfig
from vllm.config.load import LoadConfig

from vllm_ascend.model_loader.netloader.checkpoint.note import Note, note_in
from vllm_ascend.model_loader.netloader.checkpoint.small_files import SmallFiles

_WEIGHTS: Final = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


class NotHere(Exception):
    """The loader would have to download."""


def folder_here(model: str, revision: str | None, download_dir: str | None) -> str:
    """The directory of `model`, a path or the name of a repository in the cache of the hub. Raises NotHere."""
    if os.path.isdir(model):
        return model
    if envs.VLLM_USE_MODELSCOPE:  # its cache has another layout
        raise NotHere
    try:
        folder: str = huggingface_hub.snapshot_download(
            model, revision=revision, cache_dir=download_dir, allow_patterns=[], local_files_only=True
        )
    except (LocalEntryNotFoundError, HFValidationError) as error:  # the latter for an address in object storage
        raise NotHere from error
    return folder


def noted(model_config: ModelConfig) -> Note | None:
    """What the model's directory says of the weights that are not in it, if it has a note and no weights."""
    folder = Path(model_config.model)
    if not folder.is_dir() or any(each.suffix in _WEIGHTS for each in folder.iterdir()):
        return None
    return note_in(folder)


def small_files_of(model_config: ModelConfig, load_config: LoadConfig) -> SmallFiles | None:
    """The small files of a model, None if it is nowhere on this host as a directory.

    vLLM looks into the weight files for two things that a host without them cannot know: whether there is a head beside
    tied embeddings, and the type where the configuration names none.
    """
    try:
        folder = folder_here(model_config.model, model_config.revision, load_config.download_dir)
    except NotHere:
        return None
    resolved: dict[str, bool | str] = {"dtype": str(model_config.dtype).removeprefix("torch.")}
    if getattr(model_config, "word_embeddings_untied_by_checkpoint", False):
        resolved["tie_word_embeddings"] = False
    return SmallFiles(folder, resolved)
