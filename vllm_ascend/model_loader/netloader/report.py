"""What happened in one load, for a person (one line) and for a program (JSON)."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import msgspec

Outcome = Literal["p2p", "disk", "failed"]


class Attempt(msgspec.Struct, frozen=True):
    """One source that did not deliver, or not all; `received` bytes came from it."""

    source: str
    transport: str | None
    reason: str
    seconds: float
    received: int = 0

    def __str__(self) -> str:
        by = f" by {self.transport}" if self.transport else ""
        return f"{self.source}{by}: {self.reason}"


class LoadReport(msgspec.Struct):
    """One load of one role by one rank. Sizes in bytes, times in seconds; what does not apply is None or 0.

    `received` maps sources to the bytes that came from them over the network; their sum is above `bytes` by what had to
    be fetched again. `verified` names the digest that every received byte was checked by, and `root` is the root digest
    of the contents in hexadecimal.

    `seconds` maps phases to their time, nested phases not counted twice: connect, join, allocate, transfer, verify,
    disk, serve. `listening` is where the weights are served now. `changed` names the tensors that post-processing has
    changed, where INT8_CACHE asks for it.
    """

    role: str
    rank: int
    outcome: Outcome
    source: str | None = None
    transport: str | None = None
    bytes: int = 0
    received: dict[str, int] = msgspec.field(default_factory=dict)
    verified: str | None = None
    root: str | None = None
    seconds: dict[str, float] = msgspec.field(default_factory=dict)
    attempts: list[Attempt] = msgspec.field(default_factory=list)
    listening: str | None = None
    not_served: str | None = None
    changed: list[str] | None = None

    def line(self) -> str:
        """One line for the log."""
        origin = f"from {self.source} by {self.transport}" if self.source else "from disk"
        phases = ", ".join(f"{phase} {seconds:.3f}" for phase, seconds in self.seconds.items() if seconds >= 0.0005)
        reason = f" ({self.not_served})" if self.not_served else ""
        serving = f"serving on {self.listening}" if self.listening else f"not serving{reason}"
        failed = f"; {len(self.attempts)} failed: {'; '.join(map(str, self.attempts))}" if self.attempts else ""
        if self.outcome == "failed":  # a model in use goes on with what it has, and may serve it
            took = f"after {self.load_seconds:.3f} s" + (f" ({phases})" if phases else "")
            return f"netloader loaded no {self.role} weights into rank {self.rank} {took}{failed}"
        return (
            f"netloader loaded the {self.role} weights of rank {self.rank} {origin}: {self.bytes / 1e6:.1f} MB in "
            f"{self.load_seconds:.3f} s ({phases}), {serving}{failed}"
        )

    @property
    def load_seconds(self) -> float:
        """The weight phase: everything but serving."""
        return sum(seconds for phase, seconds in self.seconds.items() if phase != "serve")

    def write(self, path: Path) -> None:
        """Replaces `path` by this report. Raises OSError."""
        write_whole(path, msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n")


class Phases:
    """Adds up the seconds of named phases; while an inner phase runs, the outer one stands still."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[str, float] = {}
        self._clock = clock
        self._running: list[str] = []
        self._since = 0.0

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._account()
        self._running.append(phase)
        try:
            yield
        finally:
            self._account()
            self._running.pop()

    def _account(self) -> None:
        now = self._clock()
        if self._running:
            phase = self._running[-1]
            self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._since
        self._since = now


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file that a reader sees either not at all or complete. Raises OSError."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.partial")
    scratch.unlink(missing_ok=True)
    try:
        # A new file, never one that somebody else has put there, and writable for nobody else.
        with open(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644), "wb") as file:
            file.write(content)
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
