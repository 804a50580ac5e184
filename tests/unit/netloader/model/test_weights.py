"""How weights get into the memory that is served, and from there into a model."""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from support.models import (
    Layers,
    assert_equal,
    bound_to,
    contents_of,
    empty_arena,
    is_inside,
    loaded_from_disk,
    module,
    seeded_layers,
)
from vllm_ascend.model_loader.netloader.errors import UnsupportedModel
from vllm_ascend.model_loader.netloader.model.views import DTYPES
from vllm_ascend.model_loader.netloader.model.weights import ArenaWeights
from vllm_ascend.model_loader.netloader.transport.store import WeightStore


def test_a_bound_model_has_all_weights_of_the_source() -> None:
    source = seeded_layers(1)
    expected = contents_of(source)
    client = seeded_layers(2)
    bound_to(client, loaded_from_disk(source))
    assert_equal(contents_of(client), expected)


def test_persistent_buffers_travel_and_others_do_not() -> None:
    source = Layers()
    source.scale.fill_(3.0)
    source.table.fill_(9.0)
    client = Layers()
    bound_to(client, loaded_from_disk(source))
    assert client.scale.tolist() == [3.0, 3.0]
    assert client.table.tolist() == [7.0] * 5


def test_parameters_become_views_of_the_arena_and_buffers_stay_where_they_are() -> None:
    store = loaded_from_disk(Layers())
    model = Layers()
    objects = dict(model.named_parameters())
    buffers = {name: buffer.data_ptr() for name, buffer in model.named_buffers()}
    bound_to(model, store)
    assert all(is_inside(parameter, store.memory) for parameter in model.parameters())
    assert all(parameter is objects[name] for name, parameter in model.named_parameters())
    assert {name: buffer.data_ptr() for name, buffer in model.named_buffers()} == buffers


def test_a_large_buffer_is_served_as_it_was_loaded() -> None:
    rows = torch.arange(100_000.0)
    store = loaded_from_disk(module({"w": torch.ones(3)}, first=rows.clone(), second=rows + 1, last=rows + 2))
    client = module({"w": torch.zeros(3)}, first=rows * 0, second=rows * 0, last=rows * 0)
    bound_to(client, store)
    assert_equal(contents_of(client), {"w": torch.ones(3), "first": rows, "second": rows + 1, "last": rows + 2})


def test_a_client_that_filled_its_own_arena_serves_what_it_received() -> None:
    rows = torch.arange(100_000.0)
    first = loaded_from_disk(module({"w": torch.ones(3)}, rows=rows.clone()))
    client = module({"w": torch.zeros(3)}, rows=rows * 0)
    weights = ArenaWeights(client)
    arena = empty_arena(weights)
    with arena.writable() as bytes_:
        bytes_[:] = first.bytes[:]
    weights.bind(arena)
    gc.collect()
    arena.seal()
    assert WeightStore(weights.manifest, arena, 1).bytes == first.bytes
    assert torch.equal(client.rows, rows)


def test_post_processing_does_not_change_what_is_served() -> None:
    model = seeded_layers(1)
    store = loaded_from_disk(model)
    before = bytes(store.bytes[:])
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.zero_()
    model.embed = nn.Parameter(model.embed.data.t().contiguous())
    gc.collect()
    assert bytes(store.bytes[:]) == before


def test_moving_keeps_what_the_model_has_initialised() -> None:
    model = seeded_layers(1)
    expected = contents_of(model)
    weights = ArenaWeights(model)
    arena = empty_arena(weights)
    weights.move_into(arena)
    assert_equal(contents_of(model), expected)
    assert all(is_inside(parameter, arena) for parameter in model.parameters())


def test_moving_keeps_memory_order() -> None:
    transposed = torch.arange(35.0).view(5, 7).t()
    model = module({"w": transposed})
    weights = ArenaWeights(model)
    weights.move_into(empty_arena(weights))
    assert model.w.stride() == (1, 7)
    assert torch.equal(model.w, transposed)


def test_moving_copies_only_memory_that_was_touched() -> None:
    count = 16 << 20
    untouched = torch.empty(count)
    untouched[5] = 1.0
    untouched[count // 2] = 2.0
    untouched[-1] = 3.0
    model = module({"w": untouched})
    weights = ArenaWeights(model)
    arena = empty_arena(weights)
    weights.move_into(arena)
    assert os.fstat(arena.descriptor).st_blocks * 512 < count
    assert (model.w[5], model.w[count // 2], model.w[-1]) == (1.0, 2.0, 3.0)
    arena.close()


def test_moving_keeps_parameters_that_begin_and_end_within_a_page() -> None:
    floats_per_page = mmap.PAGESIZE // 4
    storage = torch.arange(10.0 * floats_per_page)
    cuts = {"a": (3, 100), "b": (100, 3 * floats_per_page + 7), "c": (3 * floats_per_page + 7, 9 * floats_per_page)}
    model = module({name: storage[begin:end] for name, (begin, end) in cuts.items()})
    weights = ArenaWeights(model)
    weights.move_into(empty_arena(weights))
    for name, (begin, end) in cuts.items():
        assert torch.equal(model.get_parameter(name), storage[begin:end])
        assert model.get_parameter(name).untyped_storage().data_ptr() != storage.untyped_storage().data_ptr()


def test_moving_keeps_what_lies_in_a_mapped_file(tmp_path: Path) -> None:
    numpy.full(100_000, 5.0, dtype=numpy.float32).tofile(tmp_path / "w.bin")
    model = module({"w": torch.from_file(str(tmp_path / "w.bin"), shared=False, size=100_000)})
    weights = ArenaWeights(model)
    weights.move_into(empty_arena(weights))
    assert model.w.eq(5.0).all()


def test_what_a_loader_writes_in_place_is_collected() -> None:
    def load(model: Any) -> None:
        model.embed.data.fill_(3.0)
        model.scale.fill_(4.0)

    store = loaded_from_disk(Layers(), load)
    client = Layers()
    bound_to(client, store)
    assert set(client.embed.flatten().tolist()) == {3.0}
    assert client.scale.tolist() == [4.0, 4.0]


def test_what_a_loader_puts_elsewhere_is_brought_into_the_arena() -> None:
    model = Layers()
    elsewhere = torch.full((3, 4), 3.0)

    def load(model: Any) -> None:
        model.embed.data = elsewhere

    store = loaded_from_disk(model, load)
    assert is_inside(model.embed, store.memory)
    assert torch.equal(model.embed, elsewhere)
    client = Layers()
    bound_to(client, store)
    assert torch.equal(client.embed, elsewhere)


def test_what_a_loader_puts_elsewhere_in_another_memory_order_is_brought_in() -> None:
    model = Layers()
    elsewhere = torch.arange(12.0).view(4, 3).t()

    def load(model: Any) -> None:
        model.embed.data = elsewhere

    store = loaded_from_disk(model, load)
    assert model.embed.stride() == (4, 1)
    client = Layers()
    bound_to(client, store)
    assert torch.equal(client.embed, elsewhere)


def test_a_loader_that_replaces_what_it_loads_makes_a_model_that_is_not_served() -> None:
    def replace_parameter(model: Any) -> None:
        model.embed = nn.Parameter(torch.zeros(3, 4))

    def replace_buffer(model: Any) -> None:
        model.scale = torch.zeros(2)

    def add(model: Any) -> None:
        model.scale_inverse = nn.Parameter(torch.zeros(1))

    def add_buffer(model: Any) -> None:
        model.register_buffer("offset", torch.zeros(1))

    def remove(model: Any) -> None:
        del model.embed

    cases = [
        (replace_parameter, "embed"),
        (replace_buffer, "scale"),
        (add, "scale_inverse"),
        (add_buffer, "offset"),
        (remove, "embed"),
    ]
    for load, name in cases:
        with pytest.raises(UnsupportedModel, match=f"loading replaced, added or removed {name}$"):
            loaded_from_disk(Layers(), load)


def test_a_loader_that_changes_a_type_makes_a_model_that_is_not_served() -> None:
    def load(model: Any) -> None:
        model.w.data = torch.zeros(3, dtype=torch.int8)

    with pytest.raises(UnsupportedModel, match=r"loading changed w from float32 \[3\] to torch.int8 \[3\]"):
        loaded_from_disk(module({"w": torch.zeros(3)}), load)


def test_a_loader_that_changes_a_shape_makes_a_model_that_is_not_served() -> None:
    def load(model: Any) -> None:
        model.embed.data = torch.zeros(4, 3)

    with pytest.raises(
        UnsupportedModel, match=r"loading changed embed from float32 \[3, 4\] to torch.float32 \[4, 3\]"
    ):
        loaded_from_disk(Layers(), load)


def test_a_buffer_of_a_type_that_torch_cannot_copy_is_served_or_unsupported() -> None:
    model = module({}, w=torch.empty(4, dtype=DTYPES["uint4"]))
    with contextlib.suppress(UnsupportedModel):
        loaded_from_disk(model)
