"""The small files of a model directory: everything that a start needs beside the weights, and nothing that is run.

They are a fixed list of data files by name. Code is never among them, whatever a configuration refers to. A peer that
asks for one gets it only from the directory of the model itself: links are followed within that directory, or within
the cache of the hub, whose directories consist of links to its blobs.

What counts is what the model was loaded with, so the files are noted when it was. One that has changed since is not
told to anybody.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final, NamedTuple

from vllm_ascend.model_loader.netloader.checkpoint.hub_cache import snapshot_in
from vllm_ascend.model_loader.netloader.errors import FileRefused

NAMES: Final = frozenset(
    {
        "config.json",
        "params.json",
        "generation_config.json",
        "quantize_config.json",
        "quant_config.json",
        "hf_quant_config.json",
        "quant_model_description.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "tokenizer.model",
        "spiece.model",
        "sentencepiece.bpe.model",
        "tekken.json",
        "chat_template.jinja",
        "chat_template.json",
        "preprocessor_config.json",
        "processor_config.json",
        "video_preprocessor_config.json",
        "modules.json",
        "sentence_bert_config.json",
        "config_sentence_transformers.json",
        "1_Pooling/config.json",
    }
)
"""Configuration, tokenizers, chat templates, and what prepares and generates. vLLM and its libraries read them."""
FILE_LIMIT: Final = 128 << 20
"""Bytes of one file. The largest tokenizers have about 40 MB."""
TOTAL_LIMIT: Final = 256 << 20
"""Bytes of all of them."""


_STEP: Final = 1 << 20
_NOTHING: Final[Mapping[str, bool | str]] = MappingProxyType({})


class _Stamp(NamedTuple):
    device: int
    inode: int
    size: int
    modified: int


class SmallFiles:
    """The small files in `folder`, as they are when this is made. Thread-safe.

    `resolved` is what the engine has found out from the weight files, and what a host without them cannot know.
    """

    def __init__(self, folder: str | os.PathLike[str], resolved: Mapping[str, bool | str] = _NOTHING) -> None:
        """Never raises: a directory that is not there has no files."""
        self.resolved = resolved
        self._digests: dict[str, bytes] = {}
        self._roots = _roots(os.fspath(folder))
        self._folder = Path(self._roots[0])
        self._noted: dict[str, _Stamp] = {}
        for name in sorted(NAMES):
            with contextlib.suppress(OSError, FileRefused), self._opened(name) as descriptor:
                self._noted[name] = _stamp(descriptor)

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of the files by name, in bytes."""
        return {name: stamp.size for name, stamp in self._noted.items()}

    def digest(self, name: str) -> bytes:
        """The SHA-256 of the file `name`, which is read once. Raises FileRefused as `read`."""
        if name not in self._digests:
            digest, size = hashlib.sha256(), self._noted[name].size
            for offset in range(0, size, _STEP):
                digest.update(self.read(name, offset, _STEP))
            self._digests[name] = digest.digest()
        return self._digests[name]

    def read(self, name: str, offset: int, length: int) -> bytes:
        """At most `length` bytes of the file `name` from `offset` on.

        Raises FileRefused for a file that is not there, is not one that may be told, or is another one by now.
        """
        noted = self._noted.get(name)
        if noted is None:
            raise FileRefused("there is no such file among those that are told")
        try:
            with self._opened(name) as descriptor:
                if _stamp(descriptor) != noted:
                    raise FileRefused(f"{name} has changed since the model was loaded")
                data = os.pread(descriptor, length, offset)
                if _stamp(descriptor) != noted:
                    raise FileRefused(f"{name} has changed since the model was loaded")
        except OSError as error:
            raise FileRefused(f"{name} cannot be read: {error.strerror or error}") from error
        return data

    @contextlib.contextmanager
    def _opened(self, name: str) -> Iterator[int]:
        """Raises OSError, or FileRefused for what lies elsewhere or is no file of an allowed size."""
        path = os.path.realpath(self._folder / name)
        if not any(path.startswith(os.path.join(root, "")) for root in self._roots):
            raise FileRefused(f"{name} is a link to another directory")
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise OSError(errno.EINVAL, "no regular file", path)
            if found.st_size > FILE_LIMIT:
                raise FileRefused(f"{name} has {found.st_size} bytes: at most {FILE_LIMIT}")
            yield descriptor
        finally:
            os.close(descriptor)


def _roots(folder: str) -> tuple[str, ...]:
    """The real directories in which the files of `folder` may lie; the first is its own."""
    real = os.path.realpath(folder)
    if snapshot_in(folder) is None and snapshot_in(real) is None:
        return (real,)
    return real, os.path.join(os.path.dirname(os.path.dirname(real)), "blobs")


def _stamp(descriptor: int) -> _Stamp:
    found = os.fstat(descriptor)
    return _Stamp(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
