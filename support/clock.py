"""A clock to be handed to whatever takes one as a parameter."""

from __future__ import annotations


class Clock:
    """A clock that stands still until `passes` moves it. Times are in seconds."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def passes(self, seconds: float) -> None:
        self.now += seconds
