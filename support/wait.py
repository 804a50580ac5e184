"""Waiting for what another thread or process brings about."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(condition: Callable[[], object], seconds: float = 40.0, *, interval: float = 0.01) -> None:
    """Asks every `interval` seconds whether `condition()` is true, and returns then.

    Raises AssertionError where that takes longer than `seconds`.
    """
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"the condition did not come true within {seconds:.0f} s"
        time.sleep(interval)
