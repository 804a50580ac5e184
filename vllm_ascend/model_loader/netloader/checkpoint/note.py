"""What a directory without weights says of the model that it belongs to.

`netloader pull --files-only` leaves it beside the small files. An instance that starts from there asks its sources for
the checkpoint that the note names, as if it had the weight files and had seen by their fingerprint which they are.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Final

import msgspec

from vllm_ascend.model_loader.netloader.errors import one_line

logger = logging.getLogger(__name__)

NAME: Final = "netloader-pull.json"
_SIZE_LIMIT: Final = 1 << 20


class Note(msgspec.Struct, frozen=True):
    """The checkpoint that a directory belongs to, as the source knows it.

    `fingerprint` is empty where the source has none; then `name` and `revision` say which it is. They are empty where
    the source knows it by a path. `roots` are the root digests of the weights that are in the directory, by file; there
    are none after ``--files-only``.
    """

    fingerprint: str
    name: str = ""
    revision: str = ""
    roots: dict[str, str] = {}
    format: int = 1


def note_in(folder: str | os.PathLike[str]) -> Note | None:
    """The note in `folder`, None where there is none. One that cannot be read is logged and counts as none."""
    path = Path(folder, NAME)
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            return msgspec.json.decode(file.read(_SIZE_LIMIT), type=Note)
    except (OSError, ValueError) as error:
        logger.warning("%s is no note of netloader pull, and does not count: %s", path, one_line(str(error)))
        return None
