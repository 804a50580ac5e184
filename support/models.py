"""Small torch models, and what a load from disk or from a source leaves of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vllm_ascend.model_loader.netloader.model.weights import ArenaWeights, ModelWeights
from vllm_ascend.model_loader.netloader.transport.store import WeightStore
from vllm_ascend.model_loader.netloader.weights.arena import Arena
from vllm_ascend.model_loader.netloader.weights.memory import Memory


def module(parameters: dict[str, torch.Tensor], **buffers: torch.Tensor) -> Any:
    """A module of these parameters and persistent buffers, over exactly the given memory."""
    made = nn.Module()
    for name, tensor in parameters.items():
        made.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    for name, tensor in buffers.items():
        made.register_buffer(name, tensor)
    return made


NAMES = [
    "embed",
    "layers.0.weight",
    "layers.0.bias",
    "layers.1.weight",
    "layers.1.bias",
    "scale",
    "layers.1.running_mean",
    "layers.1.running_var",
    "layers.1.num_batches_tracked",
]
"""Weights of `Layers`, in the order in which a model names them."""


class Layers(nn.Module):
    """Two layers with a buffer each and one table that is no weight."""

    scale: torch.Tensor
    table: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.arange(12.0).view(3, 4))
        self.layers: Any = nn.ModuleList([nn.Linear(4, 2), nn.BatchNorm1d(3)])
        self.register_buffer("scale", torch.tensor([2.0, 4.0]))
        self.register_buffer("table", torch.full((5,), 7.0), persistent=False)


def seeded_layers(seed: int) -> Layers:
    """Layers whose contents depend on `seed`."""
    torch.manual_seed(seed)
    model = Layers()
    for tensor in (*model.parameters(), model.get_buffer("scale"), model.get_buffer("layers.1.running_mean")):
        tensor.data.normal_()
    return model


def contents_of(model: Any) -> dict[str, torch.Tensor]:
    """Copies of all weights of `model`, by name."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Fails the test unless both have the same tensors."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def empty_arena(weights: ModelWeights) -> Arena:
    """An arena for `weights`, which nobody makes pages for ahead of its use."""
    return Arena.create(weights.manifest.nbytes)


def is_inside(tensor: torch.Tensor, arena: Memory) -> bool:
    assert isinstance(arena, Arena)
    """Whether all of `tensor` lies in the memory of `arena`."""
    begin = torch.frombuffer(arena.writable(), dtype=torch.uint8).data_ptr()
    return begin <= tensor.data_ptr() and tensor.data_ptr() + tensor.nbytes <= begin + arena.nbytes


def loaded_from_disk(model: Any, load: Callable[[Any], object] = lambda _: None) -> WeightStore:
    """What a load from disk leaves: `model` bound to a sealed arena that holds what `load` brought."""
    weights = ArenaWeights(model)
    arena = empty_arena(weights)
    weights.move_into(arena)
    load(model)
    weights.collect_into(model, arena)
    arena.seal()
    return WeightStore(weights.manifest, arena, 1)


def bound_to(model: Any, store: WeightStore) -> ModelWeights:
    """`model` after a fetch of `store`, as a peer that shares its memory has it."""
    weights = ArenaWeights(model)
    assert weights.manifest.mismatch(store.manifest) == ()
    weights.bind(store.memory)
    return weights


class Tied(nn.Module):
    """One parameter under two names, as embeddings and head of small language models are."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight


def sharing() -> Any:
    """Three parameters over one memory: all of it, two of its rows, and a column."""
    storage = torch.zeros(4, 6)
    return module({"rows": storage[1:3], "whole": storage, "column": storage[:, 2], "other": torch.zeros(2)})
