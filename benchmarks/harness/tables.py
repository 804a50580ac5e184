"""Medians, ratios and tables."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Final

GIGABYTE: Final = 1e9
MEGABYTE: Final = 10**6


def ratios_to(reference: Sequence[float], values: Sequence[float]) -> list[float]:
    """How many times the reference each value is, round by round."""
    return [ours / theirs for ours, theirs in zip(values, reference, strict=True)]


def ratio_to(reference: Sequence[float], values: Sequence[float]) -> float:
    """The median of `ratios_to`."""
    return statistics.median(ratios_to(reference, values))


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints columns that are as wide as they must be, with the first to the left and the others to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *others in lines:
        cells = [text.rjust(width) for text, width in zip(others, widths[1:], strict=True)]
        print("   ".join([first.ljust(widths[0]), *cells]).rstrip())
