"""What happened in one load: a line of the log for people, and JSON for programs."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, Literal

import msgspec

_GIVERS_NAMED: Final = 4
"""Those who brought most, as far as a line of the log names them."""

Outcome = Literal["p2p", "cache", "disk", "failed"]


class Attempt(msgspec.Struct, frozen=True):
    """One source that did not deliver all weights, why, and after how many `seconds`.

    `received` bytes came from it, and are not fetched again if they were verified. `transport` is None where none had
    been chosen yet.
    """

    source: str
    transport: str | None
    reason: str
    seconds: float
    received: int = 0

    def __str__(self) -> str:
        by = f" by {self.transport}" if self.transport else ""
        return f"{self.source}{by}: {self.reason}"


class LoadReport(msgspec.Struct):
    """One load of the weights of one role by one rank. What does not apply is None, 0 or empty.

    `bytes` is the size of the weights. `source` and `transport` are those that brought them in the end; the cache of
    this host is named by the path of its socket. `attempts` are the sources that failed before. `received` maps each
    source or relay to the bytes that came from it over the network; together they exceed `bytes` by what had to be
    fetched again. `shared` maps processes of this host to the bytes whose pages are theirs, or were copied from these.
    `verified` names the kind of digest by which every byte was checked, and `root` is the root digest of the
    contents in hexadecimal.

    `seconds` maps each phase to its time: connect, join, allocate, transfer, verify, disk, serve. While a phase
    runs within another one, only the inner one counts. `listening` is where the weights are served now; otherwise
    `not_served` says why they are not. `changed` names the tensors that post-processing has changed, where INT8_CACHE
    asks for it, and always on an accelerator.
    """

    role: str
    rank: int
    outcome: Outcome
    source: str | None = None
    transport: str | None = None
    bytes: int = 0
    received: dict[str, int] = msgspec.field(default_factory=dict)
    shared: dict[str, int] = msgspec.field(default_factory=dict)
    verified: str | None = None
    root: str | None = None
    seconds: dict[str, float] = msgspec.field(default_factory=dict)
    attempts: list[Attempt] = msgspec.field(default_factory=list)
    listening: str | None = None
    not_served: str | None = None
    changed: list[str] | None = None

    def line(self) -> str:
        """The report as one line of the log."""
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
            f"{self.load_seconds:.3f} s ({phases}), {serving}{self._givers()}{failed}"
        )

    def _givers(self) -> str:
        """Who brought how much, those first who brought most; nothing where `source` brought all."""
        if self.received.keys() | self.shared.keys() <= {self.source}:
            return ""
        given = [(count, f"{count / 1e6:.1f} MB came from {who}") for who, count in self.received.items()]
        given += [(count, f"{count / 1e6:.1f} MB are pages of {who}") for who, count in self.shared.items()]
        given.sort(reverse=True)
        named, others = given[:_GIVERS_NAMED], given[_GIVERS_NAMED:]
        rest = f", {sum(count for count, _ in others) / 1e6:.1f} MB from {len(others)} others" if others else ""
        return f"; {', '.join(text for _, text in named)}{rest}"

    @property
    def load_seconds(self) -> float:
        """Seconds of the weight phase, which is everything but serving."""
        return sum(seconds for phase, seconds in self.seconds.items() if phase != "serve")

    def write(self, path: Path) -> None:
        """Replaces the file at `path` by this report as JSON. Raises OSError."""
        write_whole(path, msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n")


class Phases:
    """Adds up, by name, the seconds that phases take. While an inner phase runs, the outer one stands still.

    `with phases("transfer"):` times what is within it. For one thread.
    """

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
    """Writes the file at `path` so that readers see all of it, or what was there before. Raises OSError."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.partial")
    scratch.unlink(missing_ok=True)
    try:
        # It must be a new file, never one that somebody else has put there, and nobody else may write to it.
        with open(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644), "wb") as file:
            file.write(content)
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
