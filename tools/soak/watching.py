"""What a soak watches: what processes take from their host, their errors, and what has happened so far."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from support.child import Child


class SoakFailed(Exception):
    """A client got wrong bytes, a stranger got any, a process has grown, or nothing ever succeeded."""


class Level(NamedTuple):
    """What a process takes from its host; `private` are bytes of memory that no other process shares."""

    descriptors: int = 0
    threads: int = 0
    private: int = 0

    @classmethod
    def of(cls, child: Child) -> Level:
        """Raises OSError for a process that is gone."""
        process = f"/proc/{child.pid}"
        return cls(len(os.listdir(f"{process}/fd")), len(os.listdir(f"{process}/task")), child.anonymous_bytes)

    def above(self, base: Level) -> bool:
        """Whether a figure has grown since `base` by more than its tolerance."""
        return any(now > before + more for now, before, more in zip(self, base, TOLERANCE, strict=True))

    def __str__(self) -> str:
        return f"{self.descriptors} fds, {self.threads} threads, {self.private / 1e6:.0f} MB"


TOLERANCE: Final = Level(descriptors=4, threads=2, private=48 << 20)
"""How much more a process may have than in the first rounds. malloc may keep memory of threads that have ended."""


class NetloaderLog(logging.Handler):
    """Takes Netloader's log in a server or a worker, so that warnings about faults do not fill the output.

    It counts damaged chunks. An error, or an exception that ends a thread, is printed and ends the process.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.damaged_chunks = 0
        log = logging.getLogger("vllm_ascend")
        log.propagate = False
        log.addHandler(self)
        threading.excepthook = lambda failure: log.error("a thread has failed", exc_info=failure.exc_value)

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR:
            print(self.format(record), file=sys.stderr, flush=True)
            os._exit(70)
        self.damaged_chunks += "arrived damaged: its digest differs" in str(record.msg)


@dataclass
class Counts:
    """What has happened so far: tasks by kind, failed attempts by kind of task and reason, and SIGKILLs by victim.

    `quiet` is the latest level of the lasting server while nothing ran.
    """

    begun: Counter[str] = field(default_factory=Counter)
    succeeded: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    killed: Counter[str] = field(default_factory=Counter)
    damaged_chunks: int = 0
    reloads: int = 0
    quiet: Level = field(default_factory=Level)

    def __str__(self) -> str:
        tasks = ", ".join(f"{kind} {self.succeeded[kind]} of {begun}" for kind, begun in sorted(self.begun.items()))
        killed = ", ".join(f"{name} {times}" for name, times in sorted(self.killed.items()))
        lines = [
            f"succeeded: {tasks}",
            f"killed: {killed}; reloads: {self.reloads}; damaged chunks: {self.damaged_chunks}",
            f"the lasting server when quiet: {self.quiet}",
            *(f"{times:7} x {failure}" for failure, times in self.failures.most_common(12)),
        ]
        return "\n".join(f"    {line}" for line in lines)
