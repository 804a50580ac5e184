"""Files that the configuration names. What is wrong with one shows before anything is loaded, not minutes later."""

from __future__ import annotations

import logging
import os
import stat
import tempfile
from pathlib import Path

from vllm_ascend.model_loader.netloader.errors import ConfigError

logger = logging.getLogger(__name__)


def require_writable(key: str, prefix: str, path: Path) -> None:
    """Makes the directory of `path`, to which the value `prefix` of the configuration's `key` leads.

    Raises ConfigError where no file could be written there later.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            is_directory = _is_directory(path)
    except (OSError, ValueError) as error:  # the latter for what cannot be a path
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{key} {prefix!r}: no file can be made in {str(path.parent)!r}: {reason}") from error
    if is_directory:
        raise ConfigError(f"{key} {prefix!r}: {str(path)!r} is to be a file, and is a directory")


def _is_directory(path: Path) -> bool:
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)  # unlike pathlib, this says what cannot be a path
    except FileNotFoundError:
        return False


def warn_of_others(key: str, path: str, *, secret: bool) -> None:
    """Warns of everybody but its owner who can write to the file at `path`, or if it is `secret`, who can read it.

    `key` is the one of the configuration that names the file. Raises OSError.
    """
    mode = os.stat(path).st_mode
    if mode & stat.S_IWOTH:
        logger.warning(
            "%s %s can be written by every user of this host, who can so let anybody in: chmod o= it, and make it anew",
            key,
            path,
        )
    elif secret and mode & stat.S_IRWXO:
        logger.warning("%s %s can be read by every user of this host: chmod o= it", key, path)
    if mode & stat.S_IWGRP:
        logger.warning("%s %s can be written by every user of its group: chmod g-w it", key, path)
