from __future__ import annotations

import random
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ascend.model_loader.netloader.client.search.backoff import FIRST, LONGEST, pauses

BOUNDS = [0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0]


def first(count: int, seed: int | None = None) -> list[float]:
    return list(islice(pauses(random.Random(seed) if seed is not None else None), count))


def test_the_bounds_are_those_of_the_documentation() -> None:
    assert (BOUNDS[0], BOUNDS[-1]) == (FIRST, LONGEST)


@given(seed=st.integers())
def test_each_pause_is_between_half_and_all_of_a_bound_that_doubles(seed: int) -> None:
    for pause, bound in zip(first(len(BOUNDS), seed), BOUNDS, strict=True):
        assert bound / 2 <= pause <= bound


def test_pauses_never_end_and_never_grow_beyond_the_longest() -> None:
    assert all(LONGEST / 2 <= pause <= LONGEST for pause in first(2000, seed=1)[len(BOUNDS) :])


@pytest.mark.parametrize("place", range(len(BOUNDS)))
def test_pauses_use_all_of_their_range(place: int) -> None:
    bound = BOUNDS[place]
    drawn = [first(place + 1, seed)[place] for seed in range(200)]
    assert min(drawn) < 0.55 * bound
    assert max(drawn) > 0.95 * bound


def test_the_same_seed_gives_the_same_pauses() -> None:
    assert first(10, seed=7) == first(10, seed=7) != first(10, seed=8)


def test_without_a_seed_nobody_pauses_like_another() -> None:
    assert len({tuple(first(3)) for _ in range(20)}) == 20
