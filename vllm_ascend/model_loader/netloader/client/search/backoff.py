"""How long to pause before the next try: longer each time, up to a bound, and at another moment than other clients."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Final

FIRST: Final = 0.5
"""Seconds that the first pause may take at most."""
LONGEST: Final = 8.0
"""Seconds that any pause may take at most."""


def pauses(generator: random.Random | None = None) -> Iterator[float]:
    """The seconds of one pause after another, without end: each between half and all of a bound, which doubles from
    FIRST to LONGEST.
    """
    generator = generator or random.Random()
    bound = FIRST
    while True:
        yield generator.uniform(bound / 2, bound)
        bound = min(bound * 2, LONGEST)
