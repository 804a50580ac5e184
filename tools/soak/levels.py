"""What the processes of a soak take from their host, and what has happened so far."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tools.soak.setting import SHARES, Kind, Result


class Level(NamedTuple):
    """What a process takes from its host; `private` are bytes of memory that no other process shares."""

    descriptors: int = 0
    threads: int = 0
    private: int = 0

    @classmethod
    def of(cls, pid: int) -> Level:
        """Raises OSError for a process that is gone."""
        process = Path("/proc") / str(pid)
        lines = (process / "smaps_rollup").read_text().splitlines()
        (anonymous,) = (int(line.split()[1]) << 10 for line in lines if line.startswith("Anonymous:"))
        return cls(len(os.listdir(process / "fd")), len(os.listdir(process / "task")), anonymous)

    def highest(self, other: Level) -> Level:
        """The higher one of each figure."""
        return Level(*map(max, self, other))

    def above(self, base: Level) -> bool:
        """Whether a figure has grown since `base` by more than its tolerance."""
        return any(now > before + more for now, before, more in zip(self, base, TOLERANCE, strict=True))

    def __str__(self) -> str:
        return f"{self.descriptors} fds, {self.threads} threads, {self.private / 1e6:.0f} MB"


NOTHING = Level()
TOLERANCE = Level(descriptors=4, threads=2, private=48 << 20)
"""How much more a process may have than in the first minute. malloc may keep memory of threads that have ended."""


@dataclass
class Counts:
    """What has happened so far. `peak` and `quiet` are levels of the lasting server: the highest, and when quiet."""

    begun: Counter[Kind] = field(default_factory=Counter)
    succeeded: Counter[Kind] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    damaged_chunks: int = 0
    reloads: int = 0
    servers_killed: int = 0
    peak: Level = NOTHING
    quiet: Level = NOTHING

    def add(self, result: Result) -> None:
        self.succeeded[result.kind] += result.succeeded
        self.failures.update(f"{result.kind}: {failure}" for failure in result.failures)
        self.damaged_chunks += result.damaged

    def show(self, seconds: float) -> None:
        """Prints the counts after `seconds`."""
        tasks = ", ".join(f"{kind} {self.succeeded[kind]} of {self.begun[kind]}" for kind in SHARES if kind != "killed")
        killed = f"{self.begun['killed']} clients, {self.servers_killed} servers"
        say(f"\n{seconds:5.0f} s  succeeded: {tasks}")
        say(f"         killed: {killed}; reloads: {self.reloads}; damaged chunks: {self.damaged_chunks}")
        say(f"         the lasting server when quiet: {self.quiet}; at most: {self.peak}")
        for failure, times in self.failures.most_common(12):
            say(f"         {times:7} x {failure}")


def say(text: str) -> None:
    print(text, flush=True)
