"""Which files with weights are opened while a checkpoint is loaded.

While it loads, a model may read files that the loader of the checkpoint does not know of: adapters that it merges, or
an embedding in another file. Python reports every file that it opens to audit hooks, which stay for the life of the
process. safetensors opens files in Rust and reports nothing, so for the time of a load its function is replaced by one
that does.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys
import sysconfig
from collections.abc import Collection, Iterator
from types import ModuleType
from typing import Any, Final, NamedTuple

import safetensors

from vllm_ascend.model_loader.netloader.checkpoint import hub_cache

_WEIGHTS: Final = re.compile(
    r"\.(safetensors|bin|pt|pth|ckpt|npz|npy|h5|msgpack|gguf|pkl|pickle|onnx|pdparams|tensors)", re.IGNORECASE
)
"""Suffixes of files with weights, in whatever folder."""
_NO_WEIGHTS: Final = re.compile(
    r"\.(json|jsonl|yaml|yml|toml|py|pyc|so|txt|md|jinja|model|vocab|tiktoken|lock|metadata)", re.IGNORECASE
)
"""Suffixes of configuration, code, texts and tokenizers. Any other file of a checkpoint may hold weights."""
_PACKAGES: Final = tuple(sysconfig.get_path(name) + os.sep for name in ("purelib", "platlib", "stdlib"))
"""Folders of Python itself and of its packages, whose files belong to no model."""


class Opened(NamedTuple):
    """A file that was opened for reading: the path that was used, and where it led at the time."""

    path: str
    real_path: str

    def may_be_weights(self, folders: Collection[str]) -> bool:
        """Whether the file may hold weights. `folders` are those of the checkpoint, as real paths."""
        in_a_checkpoint = any(self.real_path.startswith(os.path.join(folder, "")) for folder in folders)
        if in_a_checkpoint or hub_cache.holds(self.path) or hub_cache.holds(self.real_path):
            return not _NO_WEIGHTS.fullmatch(_suffix(self.path))
        return _WEIGHTS.fullmatch(_suffix(self.path)) is not None and not self.path.startswith(_PACKAGES)


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1]


@contextlib.contextmanager
def files_opened() -> Iterator[set[Opened]]:
    """Collects the files that any thread opens for reading within, apart from those that cannot hold weights."""
    opened: set[Opened] = set()
    _install_hook()
    _watches.append(opened)
    _replace(_original, _telling_safe_open)
    try:
        yield opened
    finally:
        _watches.remove(opened)
        if not _watches:
            _replace(_telling_safe_open, _original)


_watches: Final[list[set[Opened]]] = []


@functools.cache
def _install_hook() -> None:
    sys.addaudithook(_hook)


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    """Never raises, because that would make opening the file fail."""
    if event == "open" and _watches:
        with contextlib.suppress(OSError, ValueError, TypeError):
            _note(*arguments)


def _note(path: Any, mode: object, flags: int) -> None:
    if not isinstance(path, str | bytes) or flags & os.O_ACCMODE == os.O_WRONLY or flags & (os.O_CREAT | os.O_TRUNC):
        return
    name = os.fsdecode(path)
    if not _NO_WEIGHTS.fullmatch(_suffix(name)) and os.path.isfile(name):
        found = Opened(os.path.abspath(name), os.path.realpath(name))
        for opened in list(_watches):
            opened.add(found)


_original: Final[Any] = safetensors.safe_open


@functools.wraps(_original)
def _telling_safe_open(filename: Any, *arguments: Any, **keywords: Any) -> Any:
    sys.audit("open", os.fspath(filename), "rb", os.O_RDONLY)
    return _original(filename, *arguments, **keywords)


def _replace(old: Any, new: Any) -> None:
    """Replaces a function of safetensors in all modules, because most have imported it by its name."""
    for module in list(sys.modules.values()):
        if isinstance(module, ModuleType) and vars(module).get("safe_open") is old:
            vars(module)["safe_open"] = new
