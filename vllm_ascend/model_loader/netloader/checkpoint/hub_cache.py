"""How the cache of the Hugging Face hub lays out what it has downloaded."""

from __future__ import annotations

import os
import re
from typing import Final, NamedTuple

_SNAPSHOT: Final = re.compile(r"models--(?P<name>[^/]+)/snapshots/(?P<revision>[^/]+)/?$")
_FILE: Final = re.compile(r"/models--[^/]+/(snapshots|blobs)/")


class Snapshot(NamedTuple):
    """A repository as it was at one commit: its name, such as ``org/model``, and the commit."""

    name: str
    revision: str


def snapshot_in(folder: str) -> Snapshot | None:
    """The snapshot that `folder` of the cache holds, None for any other folder."""
    found = _SNAPSHOT.search(os.path.abspath(folder))
    return Snapshot(found["name"].replace("--", "/"), found["revision"]) if found else None


def holds(path: str) -> bool:
    """Whether `path` is that of a file in the cache, by any of the names it has there."""
    return _FILE.search(path) is not None
