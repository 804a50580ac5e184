"""The directory that is written: one command at a time, whole files only, and nothing that is not of a pull.

Every file gets its name when it is complete and on the disk. A note says what the directory belongs to; it is there
from the beginning, so that a pull that was interrupted can go on.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final

import msgspec

from vllm_ascend.model_loader.netloader.checkpoint import note
from vllm_ascend.model_loader.netloader.checkpoint.note import Note
from vllm_ascend.model_loader.netloader.errors import DirectoryFailed

_WEIGHTS: Final = re.compile(r"model-(rank-\d+|pp-\d+-tp-\d+)-part-0\.safetensors(\.part)?")
"""The names that a pull gives to weights."""


class Directory:
    """A directory of a pull. Use it with `open_directory`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def weights(self) -> tuple[str, ...]:
        """The names of the files with weights of a pull, complete or not. Raises DirectoryFailed."""
        with _translated(self.path):
            return tuple(sorted(each.name for each in self.path.iterdir() if _WEIGHTS.fullmatch(each.name)))

    def contents(self, name: str) -> bytes | None:
        """What is in the file `name`, None where there is none. Raises DirectoryFailed."""
        with _translated(self.path):
            try:
                return (self.path / name).read_bytes()
            except FileNotFoundError:
                return None

    def write(self, name: str, contents: bytes) -> None:
        """Puts `contents` into the file `name` in place of what is there, as a whole. Raises DirectoryFailed."""
        path = self.path / name
        with _translated(path):
            if path.parent != self.path:
                path.parent.mkdir(exist_ok=True)
                if path.parent.is_symlink():
                    raise DirectoryFailed(f"{path.parent} is a link to another directory")
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
                try:
                    file.write(contents)
                    file.flush()
                    os.fchmod(file.fileno(), 0o644)
                    os.fsync(file.fileno())
                    os.replace(file.name, path)
                except BaseException:
                    os.unlink(file.name)
                    raise

    def write_note(self, written: Note) -> None:
        """Says what the directory belongs to. Raises DirectoryFailed."""
        self.write(note.NAME, msgspec.json.format(msgspec.json.encode(written)) + b"\n")

    def remove_weights(self, unless: Collection[str]) -> None:
        """Removes weights of an earlier pull, but for the files in `unless`. Raises DirectoryFailed."""
        with _translated(self.path):
            for name in self.weights:
                if name not in unless:
                    (self.path / name).unlink()

    def settle(self) -> None:
        """Brings the names of the files to the disk. Raises DirectoryFailed."""
        with _translated(self.path):
            descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


@contextlib.contextmanager
def open_directory(path: Path) -> Iterator[Directory]:
    """The directory `path`, which is made if it is not there, for this process alone.

    Raises DirectoryFailed where it cannot be had, or has files that are not of a pull.
    """
    with _translated(path):
        path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DirectoryFailed(f"another process writes to {path}") from error
        with _translated(path):
            if any(path.iterdir()) and not (path / note.NAME).is_file():
                raise DirectoryFailed(f"{path} has files that are not of a pull: name an empty or a new directory")
        yield Directory(path)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DirectoryFailed(f"{path} cannot be written: {error.strerror or error}") from error
