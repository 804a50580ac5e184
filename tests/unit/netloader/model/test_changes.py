"""What post-processing has changed in a model, told by comparison with the arena."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from support.models import (
    NAMES,
    Tied,
    bound_to,
    loaded_from_disk,
    module,
    seeded_layers,
    sharing,
)
from vllm_ascend.model_loader.netloader.model.originals import Int8Cache
from vllm_ascend.model_loader.netloader.model.weights import ArenaWeights


def changed_by(
    process: Callable[[Any], object],
    names: Any = None,
    make: Callable[[], nn.Module] = lambda: seeded_layers(1),
) -> list[str]:
    """What `process` changes in a model that was loaded from disk and is served."""
    model = make()
    store = loaded_from_disk(model)
    weights = ArenaWeights(model, Int8Cache("dram", names))
    process(model)
    changed = weights.find_changes(model, store.memory)
    assert changed is not None
    return changed


def test_changes_are_looked_for_only_if_originals_are_to_be_kept() -> None:
    model = seeded_layers(1)
    store = loaded_from_disk(model)
    assert ArenaWeights(model).find_changes(model, store.memory) is None


def test_nothing_is_changed_after_loading() -> None:
    assert changed_by(lambda _: None) == []


def test_nothing_is_changed_after_fetching() -> None:
    store = loaded_from_disk(seeded_layers(1))
    client: Any = seeded_layers(2)
    bound_to(client, store)
    weights = ArenaWeights(client, Int8Cache("dram"))
    assert weights.find_changes(client, store.memory) == []
    client.layers[0].bias.data[1] += 1
    client.scale[0] = 0
    assert weights.find_changes(client, store.memory) == ["layers.0.bias", "scale"]


def test_weights_with_other_contents_are_changed() -> None:
    def process(model: Any) -> None:
        model.embed.data[2, 3] += 1
        model.layers[0].bias.data.zero_()

    assert changed_by(process) == ["embed", "layers.0.bias"]


@pytest.mark.parametrize("position", [0, -1])
def test_one_changed_byte_is_a_change(position: int) -> None:
    def process(model: Any) -> None:
        contents = model.w.data.view(torch.uint8)
        contents[position] ^= 1

    assert changed_by(process, make=lambda: module({"a": torch.ones(3), "w": torch.ones(5), "z": torch.ones(3)})) == [
        "w"
    ]


def test_values_that_are_equal_in_other_bytes_are_a_change_and_nan_is_none() -> None:
    def process(model: Any) -> None:
        model.zero.data.neg_()
        model.nan.data.mul_(1)

    make = partial(module, {"zero": torch.zeros(2), "nan": torch.full((2,), torch.nan)})
    assert changed_by(process, make=make) == ["zero"]


REPLACED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "another type": torch.Tensor.char,
    "another type over the same bytes": lambda tensor: tensor.view(torch.int32),
    "another shape over the same bytes": lambda tensor: tensor.view(3, 4),
    "one dimension more": lambda tensor: tensor[None],
    "another order in memory": lambda tensor: tensor.t().contiguous().t(),
    "a row less": lambda tensor: tensor[:3],
    "repeated rows": lambda tensor: tensor[:1].expand(4, 3),
    "no elements": lambda tensor: tensor[:0],
}


@pytest.mark.parametrize("replace", REPLACED.values(), ids=REPLACED.keys())
@pytest.mark.parametrize("in_place", [False, True], ids=["new parameter", "same parameter"])
def test_a_replaced_weight_is_changed(replace: Callable[[torch.Tensor], torch.Tensor], in_place: bool) -> None:
    def process(model: Any) -> None:
        replaced = replace(model.w.data)
        if in_place:
            model.w.data = replaced
        else:
            model.w = nn.Parameter(replaced, requires_grad=False)

    make = partial(module, {"w": torch.ones(4, 3), "other": torch.ones(2)})
    assert changed_by(process, make=make) == ["w"]


@pytest.mark.parametrize(
    "replace",
    [
        pytest.param(torch.Tensor.to_sparse, id="sparse"),
        pytest.param(lambda tensor: tensor.to("meta"), id="on meta"),
        pytest.param(torch.Tensor.to_sparse_csr, id="compressed"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
def test_a_weight_that_has_no_plain_memory_any_more_is_changed(replace: Callable[[torch.Tensor], torch.Tensor]) -> None:
    def process(model: Any) -> None:
        model.w = nn.Parameter(replace(model.w.data), requires_grad=False)

    assert changed_by(process, make=partial(module, {"w": torch.ones(4, 3)})) == ["w"]


def test_a_removed_weight_is_changed() -> None:
    def process(model: Any) -> None:
        del model.embed
        del model.layers[1].running_var
        model.layers[0].bias = None

    assert changed_by(process) == ["embed", "layers.0.bias", "layers.1.running_var"]


def test_an_equal_tensor_elsewhere_is_no_change() -> None:
    def process(model: Any) -> None:
        model.embed = nn.Parameter(model.embed.detach().clone())
        model.layers[0].weight.data = model.layers[0].weight.data.clone()
        model.scale = model.scale.clone()
        storage = torch.full((7,), -1.0)
        storage[3:5] = model.layers[0].bias.data
        model.layers[0].bias.data = storage[3:5]

    assert changed_by(process) == []


def test_what_post_processing_adds_is_no_change() -> None:
    def process(model: Any) -> None:
        model.embed_scale = nn.Parameter(torch.ones(1))
        model.register_buffer("offset", torch.zeros(1))

    assert changed_by(process) == []


def test_persistent_buffers_may_be_changed_and_others_do_not_count() -> None:
    def process(model: Any) -> None:
        model.scale.add_(1)
        model.layers[1].num_batches_tracked.add_(1)
        model.table.add_(1)

    assert changed_by(process) == ["scale", "layers.1.num_batches_tracked"]


def test_a_weight_that_becomes_a_buffer_of_the_same_contents_is_no_change() -> None:
    def process(model: Any) -> None:
        contents = model.embed.data
        del model.embed
        model.register_buffer("embed", contents)

    assert changed_by(process) == []


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (None, NAMES),
        ([""], NAMES),
        ([], []),
        (["bias"], ["layers.0.bias", "layers.1.bias"]),
        (["layers.0"], ["layers.0.weight", "layers.0.bias"]),
        (["scale", "embed"], ["embed", "scale"]),
        (("layers.0.weight", "weight"), ["layers.0.weight", "layers.1.weight"]),
        (["Layers", "table", "layers.*"], []),
    ],
)
def test_names_restrict_what_is_looked_at_by_any_part_of_a_name(
    names: Sequence[str] | None, expected: list[str]
) -> None:
    def process(model: Any) -> None:
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data.add_(1)

    assert changed_by(process, names) == expected


def test_weights_without_elements_are_changed_only_by_type_and_shape() -> None:
    def process(model: Any) -> None:
        model.same.data = torch.empty(0, 8)
        model.narrower.data = torch.empty(0, 4)
        model.of_another_type.data = torch.empty(0, dtype=torch.int8)
        model.filled.data = torch.empty(1)
        model.turned.data = torch.empty(1, 0)

    names = ("same", "narrower", "of_another_type", "filled", "turned")
    shapes = ((0, 8), (0, 8), (0,), (0,), (0, 1))
    make = partial(module, {name: torch.empty(*shape) for name, shape in zip(names, shapes, strict=True)})
    assert changed_by(lambda _: None, make=make) == []
    assert changed_by(process, make=make) == ["narrower", "of_another_type", "filled", "turned"]


def test_nothing_is_changed_in_a_model_without_weights() -> None:
    assert changed_by(lambda _: None, make=nn.Identity) == []


def test_memory_that_is_shared_is_changed_once() -> None:
    assert changed_by(lambda model: model.rows.data.add_(1), make=sharing) == ["whole"]
    assert changed_by(lambda model: model.head.weight.data.add_(1), make=Tied) == ["embed.weight"]
