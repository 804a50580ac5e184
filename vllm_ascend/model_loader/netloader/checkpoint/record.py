"""What one load has read from a checkpoint, and whether the files stayed the same while it read them.

Files may be replaced or overwritten at any time: while sources are asked, between the ranks of an instance, or in the
middle of a load. So the files are looked at before the first byte is read and again after the last one. Only if both
looks find the same is the fingerprint that of the bytes that were read. It also has to cover all weights, so files that
the loader of the checkpoint does not know of are looked for as well.

Weights that cannot be shown to come from one checkpoint are not served.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from vllm_ascend.model_loader.netloader.checkpoint.fingerprint import (
    File,
    checkpoint_fingerprint,
    files_in,
    opened_regular,
    where_they_are,
)
from vllm_ascend.model_loader.netloader.checkpoint.opened import Opened
from vllm_ascend.model_loader.netloader.errors import CheckpointChanged

TIMESTAMP_GRAIN_NS: Final = 20_000_000
"""Two writes within this time may leave the same timestamp, because kernels advance their clock every 1 to 10 ms."""
_SHOWN_FILES: Final = 3
"""Files that a message names; it counts the others."""


class ReadRecord:
    """The record of one load. Call `begin` before it reads, `note` with the files that were opened, then `finish`.

    `folder` is the one that holds the first part of the checkpoint, by the path under which the loader knows it.
    `real_folder` is where that path led when the load began. Both are empty before that.
    """

    def __init__(self) -> None:
        self.folder = self.real_folder = ""
        self._stamps: dict[File, _Stamp] = {}
        self._looks: list[_Look] = []
        self._unknown: OSError | None = None
        self._opened: set[Opened] = set()

    def begin(self, folder: str, paths: Sequence[str]) -> tuple[str, list[str]]:
        """Looks at the files at `paths` in `folder`. Call it for each folder that holds a part of the checkpoint.

        Returns the folder and the paths to read from instead: they have no links to the folder, which may lead
        elsewhere in a moment. Never raises, so that the load goes on; `finish` does.
        """
        real_folder, real_paths = where_they_are(folder, paths)
        files = files_in(real_folder, real_paths)
        if not self.folder:
            self.folder, self.real_folder = folder, real_folder

        # Stamps are taken before the samples here, and after them in `finish`, so that any change shows.
        try:
            for file, stamp in _settled_stamps(files).items():
                self._stamps.setdefault(file, stamp)
            self._looks.append(_Look(real_folder, files, checkpoint_fingerprint(files)))
        except OSError as error:
            self._unknown = error
        return real_folder, real_paths

    def note(self, opened: Iterable[Opened]) -> None:
        """Adds the files that anybody has opened in this process during the load."""
        self._opened.update(opened)

    def finish(self) -> str:
        """The fingerprint of what was read, empty if no files were.

        Raises CheckpointChanged, naming the files, if one has changed since `begin`, or if that cannot be found out.
        """
        files = list(self._stamps)
        try:
            if self._unknown is not None:
                raise self._unknown
            fingerprint = checkpoint_fingerprint(files)
            written = [look.folder for look in self._looks if checkpoint_fingerprint(look.files) != look.fingerprint]
            now = _stamps(files)
        except OSError as error:
            raise CheckpointChanged(f"the checkpoint cannot be fingerprinted: {error}") from error

        changed = [f"{file.name} {how}" for file in files if (how := self._stamps[file].change_to(now[file]))]
        if not changed:  # writing through a mapping of a file may leave its times as they were
            changed = [f"{folder} was written to" for folder in written]
        if changed:
            raise CheckpointChanged(f"the checkpoint changed while it was read: {_some(changed)}")
        return fingerprint

    def unknown_weights(self) -> str:
        """The reason why the fingerprint does not say which weights were loaded, empty if it does.

        It names files with weights that were opened during the load and are not among those of the checkpoint.
        """
        known = {stamp.path for stamp in self._stamps.values()}
        folders = {look.folder for look in self._looks}
        beside = {each for each in self._opened if each.real_path not in known and each.may_be_weights(folders)}
        if not beside:
            return ""
        names = sorted(_relative(each, self.real_folder) for each in beside)
        return (
            f"loading read {_some(names)}, not among the weight files of its loader: the fingerprint of these does not "
            f"tell which weights are served"
        )


class _Look(NamedTuple):
    """What the files of one folder held before they were read."""

    folder: str
    files: list[File]
    fingerprint: str


def _some(texts: Sequence[str]) -> str:
    more = f" and {len(texts) - _SHOWN_FILES} more files" if len(texts) > _SHOWN_FILES else ""
    return f"{', '.join(texts[:_SHOWN_FILES])}{more}"


def _relative(opened: Opened, folder: str) -> str:
    """The path of a file relative to `folder` if it is in there. Only links above the file are followed."""
    path = os.path.join(os.path.realpath(os.path.dirname(opened.path)), os.path.basename(opened.path))
    return path.removeprefix(os.path.join(folder, "")) if folder else path


class _Stamp(NamedTuple):
    """What the filesystem says of a file. Links to it are followed, and `path` is where they lead."""

    path: str
    device: int
    inode: int
    size: int
    modified: int
    changed: int

    def change_to(self, other: _Stamp) -> str:
        """What has happened to the file if it has the stamp `other` now, empty if nothing has."""
        if self == other:
            return ""
        if self[:3] != other[:3]:
            return "was replaced"
        return "was written to" if self.size == other.size else f"went from {self.size} to {other.size} bytes"


def _settled_stamps(files: Sequence[File]) -> dict[File, _Stamp]:
    """The stamps of files, taken long enough after the last change that one more change must alter them."""
    stamps = _stamps(files)
    newest = max((max(stamp.modified, stamp.changed) for stamp in stamps.values()), default=0)
    if time.time_ns() - newest < TIMESTAMP_GRAIN_NS:
        time.sleep(TIMESTAMP_GRAIN_NS / 1e9)
        stamps = _stamps(files)
    return stamps


def _stamps(files: Sequence[File]) -> dict[File, _Stamp]:
    """The stamps of files, which are opened for it, because network filesystems may otherwise answer from a cache.

    Raises OSError if a file cannot be read.
    """
    stamps = {}
    for file in files:
        with opened_regular(file) as descriptor:
            found = os.fstat(descriptor)
        times = (found.st_mtime_ns, found.st_ctime_ns)
        stamps[file] = _Stamp(os.path.realpath(file.path), found.st_dev, found.st_ino, found.st_size, *times)
    return stamps
