"""A clock for what takes one as a parameter."""

from __future__ import annotations


class Clock:
    """Stands still until somebody passes time, in seconds."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def passes(self, seconds: float) -> None:
        self.now += seconds
