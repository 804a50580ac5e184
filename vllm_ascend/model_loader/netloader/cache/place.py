"""Where the socket of the cache is, so that engines find it without configuration and nobody else can take its place.

It is a file in a directory of mode 0700 that belongs to the user of both. Nobody else can put a file there, and unlike
an abstract name a file works between network namespaces: pods share it by a hostPath.

A cache takes the first of the usual directories that it can have. An engine looks into all of them, because the
environment of a service is not that of a shell.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from vllm_ascend.model_loader.netloader.errors import ConfigError

SOCKET_NAME: Final = "cache.sock"
LOCK_NAME: Final = "cache.lock"


def usual_directories() -> tuple[Path, ...]:
    """Where a cache of this user may be, the best first."""
    user = os.geteuid()
    session = os.environ.get("XDG_RUNTIME_DIR", "")
    parents = (Path(session),) if session.startswith("/") else ()
    usual = (Path("/run/netloader"), Path(f"/run/user/{user}/netloader"), Path(f"/tmp/netloader-{user}"))
    return tuple(dict.fromkeys((*(parent / "netloader" for parent in parents), *usual)))


def prepare(socket_path: str | None) -> Path:
    """The path for the socket of a cache that starts, in a directory that is there and private.

    `socket_path` is the configured one, None for the first usual one that can be had. Raises ConfigError.
    """
    if socket_path is not None:
        path = Path(socket_path)
        if not path.is_absolute():
            raise ConfigError(f"the socket of the cache is {socket_path!r}: expected an absolute path")
        _make_private(path.parent)
        return path

    reasons = []
    for directory in usual_directories():
        try:
            _make_private(directory)
        except ConfigError as error:
            reasons.append(str(error))
        else:
            return directory / SOCKET_NAME
    raise ConfigError(f"there is no place for the socket of the cache; name one by --socket: {'; '.join(reasons)}")


def candidates(setting: str) -> tuple[Path, ...]:
    """The paths at which an engine with the configured value `setting` of CACHE looks for a cache, in this order."""
    if setting == "off":
        return ()
    return tuple(each / SOCKET_NAME for each in usual_directories()) if setting == "auto" else (Path(setting),)


@contextlib.contextmanager
def private_directory(directory: Path) -> Iterator[Path]:
    """A path to `directory` that leads to this very directory whatever happens to its name, and is always short.

    Raises FileNotFoundError if there is none, and ConfigError unless it belongs to this user alone.
    """
    descriptor = _open(directory)
    try:
        _require_private(directory, os.fstat(descriptor))
        yield Path(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


def _make_private(directory: Path) -> None:
    try:
        os.mkdir(directory, 0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise ConfigError(f"{directory} cannot be made: {error.strerror}") from error

    descriptor = _open(directory)
    try:
        found = os.fstat(descriptor)
        if found.st_uid == os.geteuid() and not os.listdir(descriptor):
            os.fchmod(descriptor, 0o700)  # a new hostPath is open to all; as long as it is empty, nobody minds
        _require_private(directory, os.fstat(descriptor))
    except OSError as error:
        raise ConfigError(f"{directory} cannot be made private: {error.strerror}") from error
    finally:
        os.close(descriptor)


def _open(directory: Path) -> int:
    try:
        return os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ConfigError(f"{directory} is no directory that this user can open: {error.strerror}") from error


def _require_private(directory: Path, found: os.stat_result) -> None:
    if found.st_uid != os.geteuid():
        raise ConfigError(f"{directory} belongs to user id {found.st_uid}: expected {os.geteuid()}")
    if stat.S_IMODE(found.st_mode) & 0o077:
        raise ConfigError(
            f"{directory} has the mode {stat.S_IMODE(found.st_mode):04o}, so that others reach the cache: "
            f"chmod 700 {directory}"
        )
