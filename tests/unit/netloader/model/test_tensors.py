from __future__ import annotations

import contextlib
import gc
import mmap
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn

from vllm_ascend.model_loader.netloader.errors import UnsupportedModel
from vllm_ascend.model_loader.netloader.model.device_memory import tensor_in
from vllm_ascend.model_loader.netloader.model.live import Int8Cache
from vllm_ascend.model_loader.netloader.model.tensors import own_tensors
from vllm_ascend.model_loader.netloader.model.views import manifest_of
from vllm_ascend.model_loader.netloader.model.weights import ArenaWeights, ModelWeights
from vllm_ascend.model_loader.netloader.transport.store import WeightStore
from vllm_ascend.model_loader.netloader.weights.arena import Arena
from vllm_ascend.model_loader.netloader.weights.manifest import Alias


def module(parameters: dict[str, torch.Tensor], **buffers: torch.Tensor) -> nn.Module:
    """A module of these parameters and persistent buffers, over exactly the given memory."""
    made = nn.Module()
    for name, tensor in parameters.items():
        made.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    for name, tensor in buffers.items():
        made.register_buffer(name, tensor)
    return made


class Layers(nn.Module):
    """Two layers with a buffer each and one table that is no weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.arange(12.0).view(3, 4))
        self.layers = nn.ModuleList([nn.Linear(4, 2), nn.BatchNorm1d(3)])
        self.register_buffer("scale", torch.tensor([2.0, 4.0]))
        self.register_buffer("table", torch.full((5,), 7.0), persistent=False)


def seeded_layers(seed: int) -> Layers:
    torch.manual_seed(seed)
    model = Layers()
    for tensor in (*model.parameters(), model.scale, model.layers[1].running_mean):
        tensor.data.normal_()
    return model


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def empty_arena(weights: ModelWeights) -> Arena:
    return Arena.create(weights.manifest.nbytes)


def is_inside(tensor: torch.Tensor, arena: Arena) -> bool:
    begin = torch.frombuffer(arena.writable(), dtype=torch.uint8).data_ptr()
    return begin <= tensor.data_ptr() and tensor.data_ptr() + tensor.nbytes <= begin + arena.nbytes


def loaded_from_disk(model: nn.Module, load: Callable[[nn.Module], None] = lambda _: None) -> WeightStore:
    """What a load from disk leaves: `model` bound to a sealed arena that holds what `load` brought."""
    weights = ArenaWeights(model)
    arena = empty_arena(weights)
    weights.move_into(arena)
    load(model)
    weights.collect_into(model, arena)
    arena.seal()
    return WeightStore(weights.manifest, arena, 1)


def bound_to(model: nn.Module, store: WeightStore) -> ModelWeights:
    """`model` after a fetch of `store`, as a peer that shares its memory has it."""
    weights = ArenaWeights(model)
    assert weights.manifest.mismatch(store.manifest) == ()
    weights.bind(store.memory)
    return weights


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


def test_weights_are_described_in_the_order_in_which_the_model_names_them() -> None:
    assert [spec.name for spec in ArenaWeights(Layers()).manifest.tensors] == NAMES


def test_weights_are_exactly_what_the_model_would_save() -> None:
    model = Layers()
    manifest = ArenaWeights(model).manifest
    assert {spec.name for spec in manifest.tensors} == model.state_dict().keys()
    assert {spec.name: spec.shape for spec in manifest.tensors} == {
        name: tuple(tensor.shape) for name, tensor in model.state_dict().items()
    }


def test_a_bound_model_has_all_weights_of_the_source() -> None:
    source = seeded_layers(1)
    expected = weights_of(source)
    client = seeded_layers(2)
    bound_to(client, loaded_from_disk(source))
    assert_equal(weights_of(client), expected)


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
    assert_equal(weights_of(client), {"w": torch.ones(3), "first": rows, "second": rows + 1, "last": rows + 2})


def test_a_client_that_filled_its_own_arena_serves_what_it_received() -> None:
    rows = torch.arange(100_000.0)
    first = loaded_from_disk(module({"w": torch.ones(3)}, rows=rows.clone()))
    client = module({"w": torch.zeros(3)}, rows=rows * 0)
    weights = ArenaWeights(client)
    arena = empty_arena(weights)
    with arena.writable() as bytes_:
        bytes_[:] = first.bytes
    weights.bind(arena)
    gc.collect()
    arena.seal()
    assert WeightStore(weights.manifest, arena, 1).bytes == first.bytes
    assert torch.equal(client.rows, rows)


def test_post_processing_does_not_change_what_is_served() -> None:
    model = seeded_layers(1)
    store = loaded_from_disk(model)
    before = bytes(store.bytes)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.zero_()
    model.embed = nn.Parameter(model.embed.data.t().contiguous())
    gc.collect()
    assert bytes(store.bytes) == before


def test_moving_keeps_what_the_model_has_initialised() -> None:
    model = seeded_layers(1)
    expected = weights_of(model)
    weights = ArenaWeights(model)
    arena = empty_arena(weights)
    weights.move_into(arena)
    assert_equal(weights_of(model), expected)
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
    def load(model: nn.Module) -> None:
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

    def load(model: nn.Module) -> None:
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

    def load(model: nn.Module) -> None:
        model.embed.data = elsewhere

    store = loaded_from_disk(model, load)
    assert model.embed.stride() == (4, 1)
    client = Layers()
    bound_to(client, store)
    assert torch.equal(client.embed, elsewhere)


def test_a_loader_that_replaces_what_it_loads_makes_a_model_that_is_not_served() -> None:
    def replace_parameter(model: nn.Module) -> None:
        model.embed = nn.Parameter(torch.zeros(3, 4))

    def replace_buffer(model: nn.Module) -> None:
        model.scale = torch.zeros(2)

    def add(model: nn.Module) -> None:
        model.scale_inverse = nn.Parameter(torch.zeros(1))

    def add_buffer(model: nn.Module) -> None:
        model.register_buffer("offset", torch.zeros(1))

    def remove(model: nn.Module) -> None:
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
    def load(model: nn.Module) -> None:
        model.w.data = torch.zeros(3, dtype=torch.int8)

    with pytest.raises(UnsupportedModel, match=r"loading changed w from float32 \[3\] to torch.int8 \[3\]"):
        loaded_from_disk(module({"w": torch.zeros(3)}), load)


def test_a_loader_that_changes_a_shape_makes_a_model_that_is_not_served() -> None:
    def load(model: nn.Module) -> None:
        model.embed.data = torch.zeros(4, 3)

    with pytest.raises(
        UnsupportedModel, match=r"loading changed embed from float32 \[3, 4\] to torch.float32 \[4, 3\]"
    ):
        loaded_from_disk(Layers(), load)


class Tied(nn.Module):
    """One parameter under two names, as embeddings and head of small language models are."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight


def test_one_parameter_under_two_names_travels_once_and_stays_one() -> None:
    source = Tied()
    store = loaded_from_disk(source)
    assert [spec.name for spec in store.manifest.tensors] == ["embed.weight"]
    assert store.manifest.aliases == ()
    client = Tied()
    bound_to(client, store)
    assert client.head.weight is client.embed.weight
    assert torch.equal(client.head.weight, source.embed.weight)


def sharing() -> nn.Module:
    """Three parameters over one memory: all of it, two of its rows, and a column."""
    storage = torch.zeros(4, 6)
    return module({"rows": storage[1:3], "whole": storage, "column": storage[:, 2], "other": torch.zeros(2)})


def test_parameters_within_the_memory_of_another_travel_once() -> None:
    manifest = ArenaWeights(sharing()).manifest
    assert [spec.name for spec in manifest.tensors] == ["whole", "other"]
    assert manifest.aliases == (
        Alias("rows", 0, 24, "float32", (2, 6), (6, 1)),
        Alias("column", 0, 8, "float32", (4,), (6,)),
    )


def assert_shared(model: nn.Module) -> None:
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
    def load(model: nn.Module) -> None:
        model.rows.data = torch.zeros(2, 6)

    with pytest.raises(UnsupportedModel, match="loading parted rows from the memory that it shared"):
        loaded_from_disk(sharing(), load)


def test_a_base_that_a_loader_puts_elsewhere_with_its_aliases_is_brought_in_as_one() -> None:
    def load(model: nn.Module) -> None:
        storage = torch.arange(24.0).view(4, 6)
        model.whole.data, model.rows.data, model.column.data = storage, storage[1:3], storage[:, 2]

    model = sharing()
    store = loaded_from_disk(model, load)
    assert all(is_inside(parameter, store.memory) for parameter in model.parameters())
    assert_shared(model)


def test_two_parameters_over_the_same_memory_are_one_with_an_alias() -> None:
    storage = torch.ones(6)
    manifest = ArenaWeights(module({"a": storage, "b": storage})).manifest
    assert [spec.name for spec in manifest.tensors] == ["a"]
    assert manifest.aliases == (Alias("b", 0, 0, "float32", (6,), (1,)),)


def test_the_larger_of_two_parameters_that_begin_together_owns_the_memory() -> None:
    storage = torch.zeros(6)
    manifest = ArenaWeights(module({"front": storage[:2], "whole": storage})).manifest
    assert [spec.name for spec in manifest.tensors] == ["whole"]
    assert manifest.aliases == (Alias("front", 0, 0, "float32", (2,), (1,)),)


def test_an_alias_may_be_of_another_type() -> None:
    complex_ = torch.zeros(3, dtype=torch.complex64)
    model = module({"complex": complex_, "real": torch.view_as_real(complex_)})
    store = loaded_from_disk(model, lambda model: model.real.data.fill_(2.0))
    client_memory = torch.zeros(3, dtype=torch.complex64)
    client = module({"complex": client_memory, "real": torch.view_as_real(client_memory)})
    bound_to(client, store)
    assert client.complex.tolist() == [2 + 2j] * 3


def test_parameters_beside_each_other_in_one_memory_are_no_aliases() -> None:
    storage = torch.arange(24.0)
    model = module({"a": storage[:10], "b": storage[10:]})
    manifest = ArenaWeights(model).manifest
    assert [spec.name for spec in manifest.tensors] == ["a", "b"]
    assert manifest.aliases == ()


def test_a_parameter_within_a_buffer_follows_it() -> None:
    def make() -> nn.Module:
        storage = torch.zeros(6)
        return module({"part": storage[2:4]}, whole=storage)

    store = loaded_from_disk(make(), lambda model: model.whole.copy_(torch.arange(6.0)))
    client = make()
    bound_to(client, store)
    assert client.part.tolist() == [2.0, 3.0]
    client.whole.fill_(9.0)
    assert client.part.tolist() == [9.0, 9.0]


def buffer_within_a_parameter() -> nn.Module:
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
    def make(value: float) -> nn.Module:
        return module({"none": torch.empty(0, 8), "w": torch.full((3,), value), "bias": torch.empty(0)})

    store = loaded_from_disk(make(1.0))
    assert [(spec.name, spec.nbytes) for spec in store.manifest.tensors] == [("none", 0), ("w", 12), ("bias", 0)]
    client = make(2.0)
    bound_to(client, store)
    assert (client.none.shape, client.bias.shape, client.w.tolist()) == ((0, 8), (0,), [1.0, 1.0, 1.0])


def test_empty_parameters_of_one_memory_are_no_aliases() -> None:
    storage = torch.zeros(6)
    manifest = ArenaWeights(module({"whole": storage, "none": storage[3:3], "nothing": storage[:0]})).manifest
    assert manifest.aliases == ()
    assert len(manifest.tensors) == 3


def test_a_model_without_weights_has_an_empty_manifest() -> None:
    store = loaded_from_disk(nn.Identity())
    assert store.manifest.nbytes == 0
    assert bytes(store.bytes) == b""
    bound_to(nn.Identity(), store)


UNSUPPORTED: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "on meta": (lambda: torch.empty(3, device="meta"), "w has no memory before it is loaded"),
    "sparse": (lambda: torch.eye(3).to_sparse(), r"w keeps its bytes in inner tensors \(.*torch.sparse_coo\)"),
    "compressed": (lambda: torch.eye(3).to_sparse_csr(), r"w keeps its bytes in inner tensors \(.*torch.sparse_csr\)"),
    "jagged": (
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        "w keeps its bytes in inner tensors",
    ),
    "with holes": (lambda: torch.zeros(4, 6)[:, :3], r"w is not dense in memory: shape \[4, 3\], strides \(6, 1\)"),
    "every second element": (lambda: torch.zeros(10)[::2], "w is not dense in memory"),
    "expanded": (lambda: torch.zeros(1).expand(5), r"w is not dense in memory: shape \[5\], strides \(0,\)"),
}


@pytest.mark.parametrize(("make", "reason"), UNSUPPORTED.values(), ids=UNSUPPORTED.keys())
@pytest.mark.parametrize("as_buffer", [False, True], ids=["parameter", "buffer"])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_memory_that_no_manifest_describes_is_unsupported_and_named(
    make: Callable[[], torch.Tensor], reason: str, as_buffer: bool
) -> None:
    model = module({"other": torch.zeros(2)}, w=make()) if as_buffer else module({"other": torch.zeros(2), "w": make()})
    with pytest.raises(UnsupportedModel, match=reason):
        ArenaWeights(model)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_a_parameter_that_gets_its_shape_while_it_is_loaded_is_unsupported_and_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3))
    with pytest.raises(UnsupportedModel, match=r"1\.weight gets its shape only while it is loaded"):
        ArenaWeights(model)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_a_buffer_that_gets_its_shape_while_it_is_loaded_is_unsupported_and_named() -> None:
    with pytest.raises(UnsupportedModel, match="running_mean gets its shape only while it is loaded"):
        ArenaWeights(nn.LazyBatchNorm1d(affine=False))


def test_a_parameter_that_carries_partitions_is_unsupported_and_named() -> None:
    model = module({"w": torch.zeros(2)})
    model.w.partitions = [torch.zeros(1), torch.zeros(1)]
    with pytest.raises(UnsupportedModel, match="w keeps its bytes in inner tensors"):
        ArenaWeights(model)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_quantised_tensor_is_unsupported_and_named() -> None:
    quantised = torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)
    with pytest.raises(UnsupportedModel, match="w"):
        ArenaWeights(module({}, w=quantised))


def test_a_type_that_no_manifest_knows_is_unsupported_and_named() -> None:
    with pytest.raises(UnsupportedModel, match="w"):
        ArenaWeights(module({"w": torch.empty(4, dtype=torch.bits8)}))


def test_a_buffer_of_a_type_that_torch_cannot_copy_is_served_or_unsupported() -> None:
    model = module({}, w=torch.empty(4, dtype=torch.uint4))
    with contextlib.suppress(UnsupportedModel):
        loaded_from_disk(model)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_a_nested_tensor_is_unsupported_and_named() -> None:
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    with pytest.raises(UnsupportedModel, match="w"):
        ArenaWeights(module({"w": nested}))


@pytest.mark.parametrize(
    "make",
    [lambda: torch._neg_view(torch.ones(3)), lambda: torch.full((3,), 1 + 2j).conj()],
    ids=["negative", "conjugate"],
)
def test_a_view_that_changes_signs_is_unsupported_and_named(make: Callable[[], torch.Tensor]) -> None:
    with pytest.raises(UnsupportedModel, match=r"w is .*a view that changes signs"):
        ArenaWeights(module({"w": make()}))


def test_a_strided_parameter_without_elements_is_supported() -> None:
    assert ArenaWeights(module({"w": torch.empty(0, 6)[:, ::2]})).manifest.nbytes == 0


@pytest.mark.parametrize(
    "parts", [((0, 6), (3, 9)), ((3, 9), (0, 6)), ((0, 9), (8, 10))], ids=["front", "back", "by one element"]
)
def test_parameters_that_overlap_in_part_are_unsupported_and_named(parts: tuple[tuple[int, int], ...]) -> None:
    storage = torch.zeros(12)
    model = module({name: storage[slice(*part)] for name, part in zip("ab", parts, strict=True)})
    with pytest.raises(UnsupportedModel, match="overlaps the memory of another tensor without lying within it"):
        ArenaWeights(model)


def test_a_view_of_another_type_between_two_elements_is_unsupported_and_named() -> None:
    storage = torch.zeros(16, dtype=torch.uint8)
    model = module({"bytes": storage[2:], "words": storage[4:8].view(torch.float32)})
    with pytest.raises(UnsupportedModel, match="words overlaps the memory of another tensor"):
        ArenaWeights(model)


def test_own_tensors_are_the_parameters_and_persistent_buffers_of_one_module() -> None:
    model = Layers()
    model.beside = torch.ones(1)
    assert [(name, tensor is getattr(model, name)) for name, tensor in own_tensors(model)] == [
        ("embed", True),
        ("scale", True),
    ]
    assert [name for name, _ in own_tensors(model.layers)] == []
    assert [name for name, _ in own_tensors(model.layers[0])] == ["weight", "bias"]
    assert [name for name, _ in own_tensors(model.layers[1])] == [
        "weight",
        "bias",
        "running_mean",
        "running_var",
        "num_batches_tracked",
    ]


def test_own_tensors_of_a_module_are_not_those_that_are_none() -> None:
    model = nn.Linear(2, 2, bias=False)
    model.register_buffer("offset", None)
    assert [name for name, _ in own_tensors(model)] == ["weight"]


def changed_by(
    process: Callable[[nn.Module], None],
    names: tuple[str, ...] | None = None,
    make: Callable[[], nn.Module] = lambda: seeded_layers(1),
) -> list[str]:
    """What `process` changes in a model that was loaded from disk and is served."""
    model = make()
    store = loaded_from_disk(model)
    weights = ArenaWeights(model)
    process(model)
    changed = weights.find_changes(model, store.memory, Int8Cache("dram", names))
    assert changed is not None
    return changed


def test_nothing_is_changed_after_loading() -> None:
    assert changed_by(lambda _: None) == []


def test_nothing_is_changed_after_fetching() -> None:
    store = loaded_from_disk(seeded_layers(1))
    client = seeded_layers(2)
    weights = bound_to(client, store)
    assert weights.find_changes(client, store.memory, Int8Cache("dram")) == []
    client.layers[0].bias.data[1] += 1
    client.scale[0] = 0
    assert weights.find_changes(client, store.memory, Int8Cache("dram")) == ["layers.0.bias", "scale"]


def test_weights_with_other_contents_are_changed() -> None:
    def process(model: nn.Module) -> None:
        model.embed.data[2, 3] += 1
        model.layers[0].bias.data.zero_()

    assert changed_by(process) == ["embed", "layers.0.bias"]


@pytest.mark.parametrize("position", [0, -1])
def test_one_changed_byte_is_a_change(position: int) -> None:
    def process(model: nn.Module) -> None:
        contents = model.w.data.view(torch.uint8)
        contents[position] ^= 1

    assert changed_by(process, make=lambda: module({"a": torch.ones(3), "w": torch.ones(5), "z": torch.ones(3)})) == [
        "w"
    ]


def test_values_that_are_equal_in_other_bytes_are_a_change_and_nan_is_none() -> None:
    def process(model: nn.Module) -> None:
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
    def process(model: nn.Module) -> None:
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
    def process(model: nn.Module) -> None:
        model.w = nn.Parameter(replace(model.w.data), requires_grad=False)

    assert changed_by(process, make=partial(module, {"w": torch.ones(4, 3)})) == ["w"]


def test_a_removed_weight_is_changed() -> None:
    def process(model: nn.Module) -> None:
        del model.embed
        del model.layers[1].running_var
        model.layers[0].bias = None

    assert changed_by(process) == ["embed", "layers.0.bias", "layers.1.running_var"]


def test_an_equal_tensor_elsewhere_is_no_change() -> None:
    def process(model: nn.Module) -> None:
        model.embed = nn.Parameter(model.embed.detach().clone())
        model.layers[0].weight.data = model.layers[0].weight.data.clone()
        model.scale = model.scale.clone()
        storage = torch.full((7,), -1.0)
        storage[3:5] = model.layers[0].bias.data
        model.layers[0].bias.data = storage[3:5]

    assert changed_by(process) == []


def test_what_post_processing_adds_is_no_change() -> None:
    def process(model: nn.Module) -> None:
        model.embed_scale = nn.Parameter(torch.ones(1))
        model.register_buffer("offset", torch.zeros(1))

    assert changed_by(process) == []


def test_persistent_buffers_may_be_changed_and_others_do_not_count() -> None:
    def process(model: nn.Module) -> None:
        model.scale.add_(1)
        model.layers[1].num_batches_tracked.add_(1)
        model.table.add_(1)

    assert changed_by(process) == ["scale", "layers.1.num_batches_tracked"]


def test_a_weight_that_becomes_a_buffer_of_the_same_contents_is_no_change() -> None:
    def process(model: nn.Module) -> None:
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
    def process(model: nn.Module) -> None:
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data.add_(1)

    assert changed_by(process, names) == expected


def test_weights_without_elements_are_changed_only_by_type_and_shape() -> None:
    def process(model: nn.Module) -> None:
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


def test_a_store_carries_what_else_loading_has_set() -> None:
    store = loaded_from_disk(Layers())
    assert store.attributes == {}
    told = WeightStore(store.manifest, store.memory, 2, {"has_own_embed_tokens": True, "layers.0.rank": None})
    assert told.attributes == {"has_own_embed_tokens": True, "layers.0.rank": None}
    assert WeightStore(store.manifest, store.memory, 3).attributes == {}


def test_a_store_gives_its_bytes_in_the_address_space_of_its_manifest() -> None:
    manifest = manifest_of([("a", torch.empty(3)), ("b", torch.empty(2, dtype=torch.uint8))])
    arena = Arena.create(manifest.nbytes)
    tensor_in(arena, manifest.tensors[0]).copy_(torch.tensor([1.0, 2.0, 3.0]))
    tensor_in(arena, manifest.tensors[1]).fill_(255)
    arena.seal()
    store = WeightStore(manifest, arena, 7)
    assert store.bytes.nbytes == manifest.nbytes == 128
    assert store.bytes.readonly
    assert bytes(store.bytes[:12]) == torch.tensor([1.0, 2.0, 3.0]).numpy().tobytes()
    assert bytes(store.bytes[64:67]) == b"\xff\xff\x00"
    assert store.bytes is store.bytes


def test_a_session_that_still_reads_keeps_the_bytes_of_a_closed_store() -> None:
    store = loaded_from_disk(module({"w": torch.ones(4)}))
    reader = store.bytes
    store.close()
    store.close()
    assert bytes(reader[:16]) == torch.ones(4).numpy().tobytes()


def test_a_model_that_holds_tensors_but_no_weights_has_an_empty_manifest() -> None:
    model = nn.Module()
    model.table = torch.ones(3)
    assert ArenaWeights(model).manifest.nbytes == 0
