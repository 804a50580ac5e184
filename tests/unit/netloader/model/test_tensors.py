"""Which tensors of a model are its weights, how a manifest describes them, and which it cannot describe."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from support.models import (
    NAMES,
    Layers,
    bound_to,
    loaded_from_disk,
    module,
)
from vllm_ascend.model_loader.netloader.errors import UnsupportedModel
from vllm_ascend.model_loader.netloader.model.tensors import own_tensors
from vllm_ascend.model_loader.netloader.model.weights import ArenaWeights
from vllm_ascend.model_loader.netloader.weights.manifest import Alias


def test_weights_are_described_in_the_order_in_which_the_model_names_them() -> None:
    assert [spec.name for spec in ArenaWeights(Layers()).manifest.tensors] == NAMES


def test_weights_are_exactly_what_the_model_would_save() -> None:
    model = Layers()
    manifest = ArenaWeights(model).manifest
    assert {spec.name for spec in manifest.tensors} == model.state_dict().keys()
    assert {spec.name: spec.shape for spec in manifest.tensors} == {
        name: tuple(tensor.shape) for name, tensor in model.state_dict().items()
    }


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


def test_empty_parameters_of_one_memory_are_no_aliases() -> None:
    storage = torch.zeros(6)
    manifest = ArenaWeights(module({"whole": storage, "none": storage[3:3], "nothing": storage[:0]})).manifest
    assert manifest.aliases == ()
    assert len(manifest.tensors) == 3


def test_a_model_without_weights_has_an_empty_manifest() -> None:
    store = loaded_from_disk(nn.Identity())
    assert store.manifest.nbytes == 0
    assert bytes(store.bytes[:]) == b""
    bound_to(nn.Identity(), store)


def test_a_model_that_holds_tensors_but_no_weights_has_an_empty_manifest() -> None:
    model = nn.Module()
    model.table = torch.ones(3)
    assert ArenaWeights(model).manifest.nbytes == 0


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
