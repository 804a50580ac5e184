"""Tensors that share memory: they travel once, and share it again wherever they are."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from torch import nn

from support.models import (
    Tied,
    bound_to,
    empty_arena,
    is_inside,
    loaded_from_disk,
    module,
    sharing,
)
from vllm_ascend.model_loader.netloader.errors import UnsupportedModel
from vllm_ascend.model_loader.netloader.model.device_memory import tensor_in
from vllm_ascend.model_loader.netloader.model.weights import ArenaWeights
from vllm_ascend.model_loader.netloader.weights.manifest import Alias


def test_one_parameter_under_two_names_travels_once_and_stays_one() -> None:
    source = Tied()
    store = loaded_from_disk(source)
    (spec,) = store.manifest.tensors
    assert spec.name == "embed.weight"
    assert store.manifest.aliases == (Alias("head.weight", 0, 0, spec.dtype, spec.shape, spec.strides),)
    client = Tied()
    bound_to(client, store)
    assert client.head.weight is client.embed.weight
    assert torch.equal(client.head.weight, source.embed.weight)


def test_a_buffer_under_two_names_is_shared() -> None:
    model = Tied()
    shared = torch.arange(4.0)
    model.embed.register_buffer("one", shared)
    model.embed.register_buffer("two", shared)
    manifest = ArenaWeights(model).manifest
    assert [alias.name for alias in manifest.aliases] == ["embed.two", "head.weight"]
    assert {spec.name for spec in manifest.tensors} | {"embed.two", "head.weight"} == set(model.state_dict())


def test_a_module_under_two_names_is_shared() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(2, 3))
    model[1] = model[0]
    manifest = ArenaWeights(model).manifest
    assert [spec.name for spec in manifest.tensors] == ["0.weight", "0.bias"]
    assert [(alias.name, alias.base) for alias in manifest.aliases] == [("1.bias", 1), ("1.weight", 0)]


def test_parameters_within_the_memory_of_another_travel_once() -> None:
    manifest = ArenaWeights(sharing()).manifest
    assert [spec.name for spec in manifest.tensors] == ["whole", "other"]
    assert manifest.aliases == (
        Alias("rows", 0, 24, "float32", (2, 6), (6, 1)),
        Alias("column", 0, 8, "float32", (4,), (6,)),
    )


def assert_shared(model: Any) -> None:
    model.whole.data.copy_(torch.arange(24.0).view(4, 6))
    assert torch.equal(model.rows, model.whole[1:3])
    assert torch.equal(model.column, model.whole[:, 2])
    model.rows.data.fill_(-1.0)
    assert set(model.whole[1:3].flatten().tolist()) == {-1.0}


def test_parameters_that_share_memory_share_it_in_the_arena_too() -> None:
    source = sharing()
    store = loaded_from_disk(source, lambda model: model.rows.data.fill_(5.0))
    client = sharing()
    bound_to(client, store)
    assert client.whole[:, 0].tolist() == [0.0, 5.0, 5.0, 0.0]
    assert client.column.tolist() == [0.0, 5.0, 5.0, 0.0]
    assert all(is_inside(parameter, store.memory) for parameter in client.parameters())
    assert_shared(source)
    assert_shared(client)


def test_a_loader_that_parts_shared_memory_makes_a_model_that_is_not_served() -> None:
    def load(model: Any) -> None:
        model.rows.data = torch.zeros(2, 6)

    with pytest.raises(UnsupportedModel, match="loading parted rows from the memory that it shared"):
        loaded_from_disk(sharing(), load)


def test_a_base_that_a_loader_puts_elsewhere_with_its_aliases_is_brought_in_as_one() -> None:
    def load(model: Any) -> None:
        storage = torch.arange(24.0).view(4, 6)
        model.whole.data, model.rows.data, model.column.data = storage, storage[1:3], storage[:, 2]

    model = sharing()
    store = loaded_from_disk(model, load)
    assert all(is_inside(parameter, store.memory) for parameter in model.parameters())
    assert_shared(model)


def test_a_parameter_within_a_buffer_follows_it() -> None:
    def make() -> Any:
        storage = torch.zeros(6)
        return module({"part": storage[2:4]}, whole=storage)

    store = loaded_from_disk(make(), lambda model: model.whole.copy_(torch.arange(6.0)))
    client = make()
    bound_to(client, store)
    assert client.part.tolist() == [2.0, 3.0]
    client.whole.fill_(9.0)
    assert client.part.tolist() == [9.0, 9.0]


def buffer_within_a_parameter() -> Any:
    storage = torch.zeros(6)
    return module({"whole": storage}, part=storage[2:4])


def test_a_buffer_within_a_parameter_follows_it_into_the_arena() -> None:
    model = buffer_within_a_parameter()
    weights = ArenaWeights(model)
    weights.move_into(empty_arena(weights))
    model.whole.data.fill_(5.0)
    assert model.part.tolist() == [5.0, 5.0]


def test_a_buffer_within_a_parameter_travels_with_it() -> None:
    client = buffer_within_a_parameter()
    weights = ArenaWeights(client)
    arena = empty_arena(weights)
    tensor_in(arena, weights.manifest.tensors[0]).fill_(5.0)
    weights.bind(arena)
    assert client.part.tolist() == [5.0, 5.0]


class Convolution(nn.Module):
    """Keeps a view of its weight in another shape beside it, as vLLM's Mamba 2 mixer does."""

    rows: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 1, 3), requires_grad=False)
        self.register_buffer("rows", self.weight.view(4, 3), persistent=False)


def test_a_view_that_does_not_travel_follows_its_parameter_when_it_is_moved_and_loaded() -> None:
    model = Convolution()
    store = loaded_from_disk(model, lambda model: model.weight.data.fill_(5.0))
    assert [spec.name for spec in store.manifest.tensors] == ["weight"]
    assert store.manifest.aliases == ()
    assert set(model.rows.flatten().tolist()) == {5.0}


def test_a_view_that_does_not_travel_follows_its_parameter_when_it_is_bound() -> None:
    model = Convolution()
    weights = ArenaWeights(model)
    arena = empty_arena(weights)
    tensor_in(arena, weights.manifest.tensors[0]).fill_(5.0)
    weights.bind(arena)
    assert set(model.rows.flatten().tolist()) == {5.0}


def test_parameters_that_share_memory_by_different_storages_are_recognised_or_refused() -> None:
    array = numpy.zeros(100, dtype=numpy.float32)
    model = module({"whole": torch.from_numpy(array), "part": torch.from_numpy(array[10:20])})
    try:
        manifest = ArenaWeights(model).manifest
    except UnsupportedModel:
        return
    assert [alias.name for alias in manifest.aliases] == ["part"]


def test_parameters_without_elements_are_described_and_bound() -> None:
    def make(value: float) -> Any:
        return module({"none": torch.empty(0, 8), "w": torch.full((3,), value), "bias": torch.empty(0)})

    store = loaded_from_disk(make(1.0))
    assert [(spec.name, spec.nbytes) for spec in store.manifest.tensors] == [("none", 0), ("w", 12), ("bias", 0)]
    client = make(2.0)
    bound_to(client, store)
    assert (client.none.shape, client.bias.shape, client.w.tolist()) == ((0, 8), (0,), [1.0, 1.0, 1.0])
