"""Layout TND: the tokens of all requests follow one another, and running totals say where each request ends."""

from __future__ import annotations

import itertools

from cann_sim_operators.registry import require


def check_totals(operator: str, argument: str, ends: list[int], tokens: int) -> None:
    """Raises RuntimeError unless `ends` are the running totals of the lengths of requests, `tokens` in all."""
    fits = ends == sorted(ends) and min(ends, default=0) >= 0 and (ends[-1] if ends else 0) == tokens
    require(fits, operator, argument, ends, f"the running totals of lengths, up to {tokens}")


def parts(ends: list[int]) -> list[slice]:
    """The rows of each request among those of all."""
    return [slice(start, end) for start, end in itertools.pairwise([0, *ends])]
