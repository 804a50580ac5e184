"""The disk: vLLM's own loader, and which files it reads.

The loader chooses files by the formats that it finds, by patterns of the model, and by an index beside the files. A
model may name further repositories. So the loader itself is asked for its choice: before a load, among the files that
are on this host, and during a load, when it may have downloaded others. Files that a model reads by itself while it
loads are noticed too.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any

from torch import nn
from vllm.config import ModelConfig
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from vllm_ascend.model_loader.netloader.checkpoint.fingerprint import (
    File,
    checkpoint_fingerprint,
    files_in,
    require_complete,
    where_they_are,
)
from vllm_ascend.model_loader.netloader.checkpoint.opened import files_opened
from vllm_ascend.model_loader.netloader.checkpoint.record import ReadRecord
from vllm_ascend.model_loader.netloader.engine.model_folder import NotHere, folder_here, noted
from vllm_ascend.model_loader.netloader.errors import one_line

logger = logging.getLogger(__name__)


class _Loader(DefaultModelLoader):
    """vLLM's loader of checkpoints, whatever the load format of the instance."""

    def __init__(self, load_config: LoadConfig) -> None:
        load_config = copy.copy(load_config)
        load_config.load_format = "auto"
        load_config.model_loader_extra_config = {}
        super().__init__(load_config)


class DiskLoader(_Loader):
    """Loads, and keeps a record of what it has read."""

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(load_config)
        self.record = ReadRecord()

    def _prepare_weights(self, *args: Any, **kwargs: Any) -> Any:
        folder, paths, *others = super()._prepare_weights(*args, **kwargs)
        return *self.record.begin(folder, paths), *others

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Fills `model` from the checkpoint. Raises whatever vLLM's loader raises."""
        with files_opened() as opened:
            super().load_weights(model, model_config)
        self.record.note(opened)


def load_from_disk(model: nn.Module, model_config: ModelConfig, load_config: LoadConfig) -> ReadRecord:
    """Fills `model` from the checkpoint. Returns what was read; raises whatever vLLM's loader raises."""
    loader = DiskLoader(load_config)
    loader.load_weights(model, model_config)
    return loader.record


def fingerprint_here(model: nn.Module, model_config: ModelConfig, load_config: LoadConfig) -> str:
    """The fingerprint of the files that a load of `model` would read, empty unless all are on this host. Asks no hub.

    A directory without weights may have a note that says which they are.

    Never raises. If the files cannot be fingerprinted, it logs what that means, and the fingerprint is empty.
    """
    preview = _Preview(load_config)
    try:
        for _ in preview.get_all_weights(model_config, model):
            raise AssertionError("a preview reads nothing")
        return checkpoint_fingerprint(preview.files)
    except NotHere:
        note = noted(model_config)
        return "" if note is None else note.fingerprint
    except Exception as error:  # vLLM's code may raise anything on files of any kind; a source may have the weights
        logger.warning(
            "the checkpoint of %s cannot be fingerprinted, so names decide: weights of other contents would be taken "
            "from a source that knows them by the same name, and the same weights by another name are refused: %s",
            model_config.model,
            one_line(f"{type(error).__name__}: {error}"),
        )
        return ""


class _Preview(_Loader):
    """Finds the files that a load would read, and reads no weights."""

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(load_config)
        self.files: list[File] = []

    def _get_weights_iterator(self, source: Any) -> Iterator[Any]:
        folder = folder_here(source.model_or_path, source.revision, self.load_config.download_dir)
        patterns = source.allow_patterns_overrides
        try:
            prepared = self._prepare_weights(folder, source.subfolder, None, source.fall_back_to_pt, patterns)
        except RuntimeError as error:
            raise NotHere from error

        folder, paths = where_they_are(*prepared[:2])
        files = files_in(folder, paths)
        require_complete(folder, files)
        self.files += (file for file in files if file not in self.files)
        return iter(())
