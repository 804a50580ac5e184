"""Whether a checkpoint stayed as it was while it was read, and its fingerprint then.

Files may be replaced or overwritten at any time: while sources are asked, between the ranks of an instance, in the
middle of a load. A fingerprint is that of the bytes that were read only if it was taken between two looks at the files
that found the same, one before the first byte and one after the last. What cannot be shown to be one checkpoint's is
not served to others.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Final, NamedTuple

from vllm_ascend.model_loader.netloader.errors import CheckpointChanged
from vllm_ascend.model_loader.netloader.fingerprint import File, checkpoint_fingerprint, files_in, opened_regular

TIMESTAMP_GRAIN_NS: Final = 20_000_000
"""Two writes within this time may leave the same timestamp; kernels advance it every 1 to 10 ms."""
_SHOWN_FILES: Final = 3


class Reading:
    """What one load reads from files: call `begin` before, and `finish` after it.

    `folder` is that of the first files, and `real_folder` where it led then.
    """

    def __init__(self) -> None:
        self.folder = self.real_folder = ""
        self._stamps: dict[File, _Stamp] = {}
        self._unknown: OSError | None = None

    def begin(self, folder: str, paths: Sequence[str]) -> None:
        """For `paths` in `folder`; again for each further place in which a part of the checkpoint is.

        Never raises, so that the load goes on.
        """
        files = files_in(folder, paths)
        if not self.folder:
            self.folder, self.real_folder = folder, os.path.realpath(folder)
        try:
            for file, stamp in _settled_stamps(files).items():
                self._stamps.setdefault(file, stamp)
        except OSError as error:
            self._unknown = error

    def finish(self) -> str:
        """The fingerprint of what was read, empty if that were no files.

        Raises CheckpointChanged where one changed meanwhile, or where that cannot be told.
        """
        files = list(self._stamps)
        try:
            if self._unknown is not None:
                raise self._unknown
            fingerprint = checkpoint_fingerprint(files)
            now = _stamps(files)
        except OSError as error:
            raise CheckpointChanged(f"the checkpoint cannot be fingerprinted: {error}") from error
        if changed := [f"{file.name} {how}" for file in files if (how := self._stamps[file].change_to(now[file]))]:
            more = f" and {len(changed) - _SHOWN_FILES} more files" if len(changed) > _SHOWN_FILES else ""
            raise CheckpointChanged(
                f"the checkpoint changed while it was read: {', '.join(changed[:_SHOWN_FILES])}{more}"
            )
        return fingerprint


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
