"""Whether a checkpoint stayed as it was while it was read, and its fingerprint then.

Files may be replaced or overwritten at any time: while sources are asked, between the ranks of an instance, in the
middle of a load. A fingerprint is that of the bytes that were read only if it was taken between two looks at the files
that found the same, one before the first byte and one after the last. And it tells weights apart only if none
were loaded from other files. What cannot be shown to be one checkpoint's is not served to others.
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
"""Two writes within this time may leave the same timestamp; kernels advance it every 1 to 10 ms."""
_SHOWN_FILES: Final = 3


class ReadRecord:
    """What one load reads from files: call `begin` before, and `finish` after it.

    `folder` is that of the first files, and `real_folder` where it led then.
    """

    def __init__(self) -> None:
        self.folder = self.real_folder = ""
        self._stamps: dict[File, _Stamp] = {}
        self._looks: list[_Look] = []
        self._unknown: OSError | None = None
        self._opened: set[Opened] = set()

    def begin(self, folder: str, paths: Sequence[str]) -> tuple[str, list[str]]:
        """For `paths` in `folder`; again for each further place in which a part of the checkpoint is.

        Returns the folder and the paths by which to read: links to the folder may lead elsewhere by then. Never raises,
        so that the load goes on.
        """
        real_folder, real_paths = where_they_are(folder, paths)
        files = files_in(real_folder, real_paths)
        if not self.folder:
            self.folder, self.real_folder = folder, real_folder
        try:
            for file, stamp in _settled_stamps(files).items():
                self._stamps.setdefault(file, stamp)
            self._looks.append(_Look(real_folder, files, checkpoint_fingerprint(files)))
        except OSError as error:
            self._unknown = error
        return real_folder, real_paths

    def note(self, opened: Iterable[Opened]) -> None:
        """`opened` were opened while it was read, by whomever."""
        self._opened.update(opened)

    def finish(self) -> str:
        """The fingerprint of what was read, empty if that were no files.

        Raises CheckpointChanged where one changed meanwhile, or where that cannot be told.
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
        if not changed:  # what is written through a mapping of a file may leave its times as they were
            changed = [f"{folder} was written to" for folder in written]
        if changed:
            raise CheckpointChanged(f"the checkpoint changed while it was read: {_some(changed)}")
        return fingerprint

    def unknown_weights(self) -> str:
        """Why the fingerprint does not tell which weights were loaded, empty where it does."""
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
    """What the files of one place held before they were read."""

    folder: str
    files: list[File]
    fingerprint: str


def _some(texts: Sequence[str]) -> str:
    more = f" and {len(texts) - _SHOWN_FILES} more files" if len(texts) > _SHOWN_FILES else ""
    return f"{', '.join(texts[:_SHOWN_FILES])}{more}"


def _relative(opened: Opened, folder: str) -> str:
    """To `folder` where it is in there; a link to it is followed, and those in it are not."""
    path = os.path.join(os.path.realpath(os.path.dirname(opened.path)), os.path.basename(opened.path))
    return path.removeprefix(os.path.join(folder, "")) if folder else path


class _Stamp(NamedTuple):
    """What a filesystem tells of a file; links to it are followed, and `path` is where they led."""

    path: str
    device: int
    inode: int
    size: int
    modified: int
    changed: int

    def change_to(self, other: _Stamp) -> str:
        """How the file became `other`, empty where it did not change."""
        if self == other:
            return ""
        if self[:3] != other[:3]:
            return "was replaced"
        return "was written to" if self.size == other.size else f"went from {self.size} to {other.size} bytes"


def _settled_stamps(files: Sequence[File]) -> dict[File, _Stamp]:
    """Stamps so much later than the last change that one more change must alter them."""
    stamps = _stamps(files)
    newest = max((max(stamp.modified, stamp.changed) for stamp in stamps.values()), default=0)
    if time.time_ns() - newest < TIMESTAMP_GRAIN_NS:
        time.sleep(TIMESTAMP_GRAIN_NS / 1e9)
        stamps = _stamps(files)
    return stamps


def _stamps(files: Sequence[File]) -> dict[File, _Stamp]:
    """Of opened files: network filesystems may answer from a cache of attributes otherwise. Raises OSError."""
    stamps = {}
    for file in files:
        with opened_regular(file) as descriptor:
            found = os.fstat(descriptor)
        times = (found.st_mtime_ns, found.st_ctime_ns)
        stamps[file] = _Stamp(os.path.realpath(file.path), found.st_dev, found.st_ino, found.st_size, *times)
    return stamps
