"""The dry run of a reload, by vLLM's own functions on layers of kinds that nobody has thought of.

Models are small and made here; that real ones pass is for test_reload.py and the slow tests of test_models.py.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)

from vllm_ascend.model_loader.netloader.engine.rehearsal import rehearse
from vllm_ascend.model_loader.netloader.engine.reloadable import require_reloadable
from vllm_ascend.model_loader.netloader.engine.takeover import take_over
from vllm_ascend.model_loader.netloader.errors import ReloadRefused

SIZE = 8
CONFIG: Any = types.SimpleNamespace(dtype=torch.float32)
Process = Callable[[nn.Module], None]


class Method(QuantizeMethodBase):
    def __init__(self, process: Process) -> None:
        self._process = process

    def create_weights(self, layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        layer.weight = nn.Parameter(torch.zeros(SIZE, SIZE), requires_grad=False)

    def apply(self, layer: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise NotImplementedError

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self._process(layer)


class Layer(nn.Module):
    def __init__(self, process: Process) -> None:
        super().__init__()
        self.quant_method = Method(process)
        self.quant_method.create_weights(self)
        self.norm = nn.LayerNorm(SIZE)
        self.none = nn.Parameter(torch.empty(0, SIZE))
        self.nothing_but_that = nn.Embedding(0, SIZE)


class Model(nn.Module):
    """Two layers of a kind, and an embedding with a head that may be tied to it."""

    def __init__(self, process: Process, *, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SIZE, SIZE)
        self.layers: Any = nn.ModuleList(Layer(process) for _ in range(2))
        self.head = self.embedding if tied else nn.Linear(SIZE, SIZE, bias=False)
        self.requires_grad_(False)
        record_metadata_for_reloading(self)

    @torch.no_grad()
    def filled(self, seed: int) -> Model:
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        return self

    def processed(self) -> Model:
        for layer in self.layers:
            layer.quant_method.process_weights_after_loading(layer)
        return self


def set_weight(layer: nn.Module, weight: torch.Tensor) -> None:
    layer.weight = nn.Parameter(weight, requires_grad=False)


def transpose(layer: Any) -> None:
    set_weight(layer, layer.weight.t().contiguous())


def pad(layer: Any) -> None:
    set_weight(layer, nn.functional.pad(layer.weight, (0, SIZE)))


def pack_and_drop(layer: Any) -> None:
    layer.packed = layer.weight.clone()
    set_weight(layer, torch.empty(0))


def add(layer: Any) -> None:
    layer.scale = nn.Parameter(layer.weight.sum(0), requires_grad=False)


def nothing(layer: Any) -> None:
    pass


def only_once(process: Process) -> Process:
    """As vLLM's experts on the CPU platform do."""

    def process_once(layer: Any) -> None:
        if not hasattr(layer, "already_processed"):
            layer.already_processed = 1
            process(layer)

    return process_once


def fails_the_second_time(layer: Any) -> None:
    if hasattr(layer, "already_processed"):
        raise KeyError("the layer that I remember")
    layer.already_processed = 1


def reload(model: Model, new: Model) -> None:
    weights = rehearse(new, model, CONFIG)
    initialize_layerwise_reload(model)
    take_over(weights, model)
    finalize_layerwise_reload(model, CONFIG)


@pytest.mark.parametrize("process", [nothing, transpose, pad, pack_and_drop, add])
def test_what_can_be_processed_again_is_replaced(process: Process) -> None:
    """Weights without bytes, with which transfer engines have had trouble (sglang #20818), do not stand in the way."""
    model, expected = Model(process).filled(1).processed(), Model(process).filled(2).processed()
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    reload(model, Model(process).filled(2))
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses
    assert all(layer.none.shape == layer.nothing_but_that.weight.shape == (0, SIZE) for layer in model.layers)
    for (name, ours), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert all(
        torch.equal(ours.packed, theirs.packed)
        for ours, theirs in zip(model.layers, expected.layers, strict=True)
        if process is pack_and_drop
    )


@pytest.mark.parametrize(
    ("process", "reason"),
    [
        (only_once(pad), "cannot give layers.0 new weights in place: RuntimeError: The size of tensor a"),
        (only_once(transpose), "layers.0.weight is another one after a reload than after a first load"),
        (only_once(add), "cannot give layers.0 new weights in place: AttributeError"),
        (fails_the_second_time, "cannot give layers.0 new weights in place: KeyError: 'the layer that I remember'"),
    ],
    ids=["another shape", "other contents", "a tensor that is missing", "an error"],
)
def test_what_cannot_be_processed_again_is_refused_before_anything_changes(process: Process, reason: str) -> None:
    model = Model(process).filled(1).processed()
    before = {name: (parameter, parameter.clone()) for name, parameter in model.named_parameters()}
    with pytest.raises(ReloadRefused, match=reason):
        reload(model, Model(process).filled(2))
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    for name, (parameter, contents) in before.items():
        assert after[name] is parameter
        assert torch.equal(parameter, contents)


def test_what_both_models_share_is_left_alone() -> None:
    """As rotary embeddings, which vLLM caches."""
    shared = nn.Sequential(nn.Identity())
    shared.register_buffer("angles", torch.arange(4.0), persistent=False)
    angles = shared.angles

    class Sharing(Model):
        def __init__(self, process: Process) -> None:
            super().__init__(process)
            for layer in self.layers:
                layer.rotary = shared

    model = Sharing(transpose).filled(1).processed()
    rehearse(Sharing(transpose).filled(2), model, CONFIG)
    assert model.layers[0].rotary is shared
    assert shared.angles is angles
    assert len(shared) == 1
    assert torch.equal(angles, torch.arange(4.0))


def test_one_part_at_a_time_has_memory_of_its_own() -> None:
    packed: list[tuple[bool, weakref.ref[torch.Tensor]]] = []

    class TwoKinds(Model):
        def __init__(self, process: Process) -> None:
            super().__init__(process)
            self.layers[0].first, self.layers[1].first = True, False

    def pack(layer: Any) -> None:
        layer.packed = layer.weight.clone()
        packed.append((layer.first, weakref.ref(layer.packed)))
        assert layer.first or all(tensor() is None for first, tensor in packed if first)

    rehearse(TwoKinds(pack).filled(2), TwoKinds(nothing).filled(1), CONFIG)
    assert [first for first, _ in packed] == [True, True, False, False]


def test_a_layer_that_was_changed_since_it_was_loaded_is_refused() -> None:
    model = Model(transpose).filled(1).processed()
    set_weight(model.layers[1], torch.empty(0))
    with pytest.raises(ReloadRefused, match=r"layers.1.weight is float32 \[0\] in use, .* float32 \[8, 8\] after"):
        reload(model, Model(transpose).filled(2))


def test_a_module_that_the_model_in_use_has_not_is_refused() -> None:
    model = Model(nothing).filled(1).processed()
    del model.head
    with pytest.raises(ReloadRefused, match="the model in use has no module head"):
        reload(model, Model(nothing).filled(2))


def test_tied_weights_stay_tied() -> None:
    model = Model(nothing, tied=True).filled(1).processed()
    reload(model, Model(nothing, tied=True).filled(2))
    assert model.head is model.embedding
    assert torch.equal(model.embedding.weight, Model(nothing, tied=True).filled(2).embedding.weight)


@pytest.mark.parametrize("by", ["module", "parameter"])
def test_weights_that_loading_tied_since_they_were_equal_are_reloaded_only_with_equal_ones(by: str) -> None:
    """vLLM ties a head that a checkpoint has beside the embedding, and that turns out to be the same."""
    model = Model(nothing).filled(1).processed()
    if by == "module":
        model.head = model.embedding
    else:
        model.head.weight = model.embedding.weight
    different = Model(nothing).filled(2)
    with pytest.raises(ReloadRefused, match=r"embedding.weight and head.weight are one tensor in the model in use"):
        reload(model, different)
    equal = Model(nothing).filled(2)
    equal.head.weight.data.copy_(equal.embedding.weight)
    reload(model, equal)
    assert torch.equal(model.head.weight, different.embedding.weight)


class WithView(Model):
    def __init__(self, process: Process) -> None:
        super().__init__(process)
        self.register_buffer("view", self.layers[0].weight.data.view(-1), persistent=False)


def test_a_view_of_a_weight_is_reloaded_with_it() -> None:
    model: Any = WithView(nothing).filled(1).processed()
    reload(model, WithView(nothing).filled(2))
    assert torch.equal(model.view, Model(nothing).filled(2).layers[0].weight.view(-1))


@pytest.mark.parametrize("process", [transpose, pack_and_drop])
def test_a_view_of_a_weight_that_processing_has_moved_is_refused(process: Process) -> None:
    """Mamba-2 on the CPU platform: the convolution's weight is packed, and its view is what it was."""
    model = WithView(process).filled(1).processed()
    with pytest.raises(ReloadRefused, match=r"view is a view of what layers.0.weight was before it was processed"):
        reload(model, WithView(process).filled(2))


def test_a_model_that_is_processed_as_a_whole_is_refused() -> None:
    class Whole(Model):
        def process_weights_after_loading(self) -> None:
            raise NotImplementedError

    with pytest.raises(ReloadRefused, match="Whole processes its weights as a whole after loading"):
        require_reloadable(Whole(nothing))
