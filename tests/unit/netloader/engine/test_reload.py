"""How new weights are handed to a model in use, and how the ranks of an instance agree on them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from vllm_ascend.model_loader.netloader.engine.reload import all_or_none, hand_over, require_ranks_alike
from vllm_ascend.model_loader.netloader.engine.takeover import NewWeights
from vllm_ascend.model_loader.netloader.errors import ReloadRefused


class Called:
    """Counts how often something is called."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> None:
        self.times += 1

    @contextlib.contextmanager
    def within(self) -> Iterator[None]:
        yield
        self()


class OwnLoader(nn.Module):
    """A model that loads checkpoints by itself."""

    def load_weights(self, weights: Iterator[Any]) -> set[str]:
        return {name for name, _ in weights}


def test_new_weights_are_given_up_where_the_model_loads_something_else() -> None:
    model, then, otherwise = OwnLoader(), Called(), Called()
    hand_over(NewWeights({}), model, torch.float32, then.within, otherwise)
    assert model.load_weights(iter([("w", None)])) == {"w"}
    assert (then.times, otherwise.times) == (0, 0)
    assert "load_weights" not in vars(model)


def test_whoever_reads_new_weights_as_tensors_is_refused_and_the_model_stays() -> None:
    model, then, otherwise = OwnLoader(), Called(), Called()
    weights = hand_over(NewWeights({}), model, torch.float32, then.within, otherwise)
    with pytest.raises(ReloadRefused, match="set is_checkpoint_format to true"):
        next(weights)
    assert (then.times, otherwise.times) == (0, 1)
    assert "load_weights" not in vars(model)


def test_new_weights_are_taken_over_once() -> None:
    model, then, otherwise = OwnLoader(), Called(), Called()
    weights = hand_over(NewWeights({}), model, torch.float32, then.within, otherwise)
    assert model.load_weights(weights) == set()
    assert (then.times, otherwise.times) == (1, 0)
    assert "load_weights" not in vars(model)


@pytest.mark.usefixtures("groups")
def test_a_rank_alone_agrees_with_itself() -> None:
    with all_or_none():
        pass
    require_ranks_alike("c0ffee")
    require_ranks_alike("")


@pytest.mark.usefixtures("groups")
def test_what_fails_on_this_rank_is_raised_here() -> None:
    with pytest.raises(ValueError, match="of its own"), all_or_none():
        raise ValueError("of its own")
