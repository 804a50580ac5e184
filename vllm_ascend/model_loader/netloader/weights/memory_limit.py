"""How much memory the control groups of this process leave it. Beyond that, the kernel does not refuse: it kills.

Memory that is only reserved costs nothing, so making an arena that is too large does not fail. The process is killed
while it fills the arena, and nobody says why. That can be known beforehand: the limits of a group also hold for all
groups below it, and the memory that a group uses includes files that the kernel can drop at any time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

_UNLIMITED = 1 << 60
"""Bytes. The first version of control groups writes a huge number if there is no limit."""


class Room(NamedTuple):
    """The number of bytes that a group leaves, and the file that holds its limit."""

    nbytes: int
    limit: Path


def room(proc: Path = Path("/proc")) -> Room | None:
    """The least that any group of this process leaves, with swap; None if no group has a limit that is known."""
    found = [each for group in _groups(proc) if (each := group.room(_free_swap(proc))) is not None]
    return min(found, default=None)


@dataclass(frozen=True)
class _Group:
    """A control group, which is a directory, of the first or second version."""

    path: Path
    second_version: bool

    def room(self, free_swap: int) -> Room | None:
        names = (
            ("memory.max", "memory.current")
            if self.second_version
            else (
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
            )
        )
        limit, used = self._number(names[0]), self._number(names[1])
        if limit is None or used is None:
            return None
        without_swap = max(0, limit - used + self._droppable())
        return Room(without_swap + min(free_swap, self._swap(without_swap)), self.path / names[0])

    def _droppable(self) -> int:
        """The bytes that the kernel can drop: caches of its own, and of files, among which shared memory is counted."""
        statistics = dict(line.split() for line in self._lines("memory.stat"))
        files, shared = ("file", "shmem") if self.second_version else ("total_cache", "total_shmem")
        kernels = int(statistics.get("slab_reclaimable", 0))
        return max(0, int(statistics.get(files, 0)) - int(statistics.get(shared, 0))) + kernels

    def _swap(self, without_swap: int) -> int:
        if self.second_version:
            limit, used = self._number("memory.swap.max"), self._number("memory.swap.current")
            return _UNLIMITED if limit is None else max(0, limit - (used or 0))
        limit, used = self._number("memory.memsw.limit_in_bytes"), self._number("memory.memsw.usage_in_bytes")
        return _UNLIMITED if limit is None else max(0, limit - (used or 0) + self._droppable() - without_swap)

    def _number(self, name: str) -> int | None:
        """The number in the file `name`, None if there is no such file, or no limit in it."""
        text = next(iter(self._lines(name)), "max").strip()
        return int(text) if text.isdecimal() and int(text) < _UNLIMITED else None

    def _lines(self, name: str) -> list[str]:
        with contextlib.suppress(OSError):
            return (self.path / name).read_text().splitlines()
        return []


def _groups(proc: Path) -> Iterator[_Group]:
    """The groups of this process and all above them, in all hierarchies that are mounted; see cgroups(7), proc(5)."""
    for line in _lines_of(proc / "self" / "mountinfo"):
        mount, _, filesystem = line.partition(" - ")
        kind, _, options = filesystem.split(" ", 2)
        root, point = mount.split(" ")[3:5]
        if kind == "cgroup2" or (kind == "cgroup" and "memory" in options.rpartition(" ")[2].split(",")):
            second_version = kind == "cgroup2"
            path = _path_within(proc, second_version, root)
            top = Path(point)
            yield from (_Group(each, second_version) for each in (top / path, *(top / path).parents) if _is(each, top))


def _is(path: Path, top: Path) -> bool:
    return path == top or top in path.parents


def _path_within(proc: Path, second_version: bool, root: str) -> str:
    """The path of this process's group from the `root` of the hierarchy that is mounted."""
    for line in _lines_of(proc / "self" / "cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers if second_version else "memory" in controllers.split(","):
            prefix = root.rstrip("/")
            return path.removeprefix(prefix).lstrip("/") if path.startswith(prefix) else ""
    return ""


def _free_swap(proc: Path) -> int:
    for line in _lines_of(proc / "meminfo"):
        name, value, *_ = line.split()
        if name == "SwapFree:":
            return int(value) * 1024
    return 0


def _lines_of(path: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return path.read_text().splitlines()
    return []
