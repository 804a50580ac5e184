"""How long to pause before the next try: longer each time, bounded, and never at the same moment as others."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Final

FIRST: Final = 0.5
LONGEST: Final = 8.0


def pauses(generator: random.Random | None = None) -> Iterator[float]:
    """Seconds without end: each between half and all of a bound that doubles up to LONGEST."""
    generator = generator or random.Random()
    bound = FIRST
    while True:
        yield generator.uniform(bound / 2, bound)
        bound = min(bound * 2, LONGEST)
