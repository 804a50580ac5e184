"""Stands in for ModelScope in the processes that run upstream's tests: all models are in the cache of the other hub."""

from __future__ import annotations

from typing import Any

import huggingface_hub

__version__ = "1.18.1"


def snapshot_download(model_id: str | None = None, *, repo_id: str | None = None, **_: Any) -> str:
    """The directory of a model. Raises LocalEntryNotFoundError if it is not in the cache."""
    name = model_id or repo_id
    assert name is not None
    directory: str = huggingface_hub.snapshot_download(name, local_files_only=True)
    return directory
