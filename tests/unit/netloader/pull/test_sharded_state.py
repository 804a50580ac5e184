"""The file has the tensors that vLLM's own writer would write, and vLLM's own reader reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from vllm.model_executor.model_loader.sharded_state_loader import ShardedStateLoader

from support.models import Tied, loaded_from_disk, module, sharing
from vllm_ascend.model_loader.netloader.errors import CannotBeWritten
from vllm_ascend.model_loader.netloader.pull.file_memory import FileMemory
from vllm_ascend.model_loader.netloader.pull.sharded_state import layout_of
from vllm_ascend.model_loader.netloader.weights.manifest import Manifest


def written(model: nn.Module, path: Path) -> dict[str, torch.Tensor]:
    """What is in the file for the weights that `model` has."""
    store = loaded_from_disk(model)
    memory = FileMemory(path, layout_of(store.manifest), store.manifest.nbytes)
    for offset in range(0, store.manifest.nbytes, 100):
        end = min(offset + 100, store.manifest.nbytes)
        landing = memory.landing(offset, end - offset)
        landing.host[:] = store.bytes[offset:end]
        landing.settle()
    assert bytes(memory.contents()[0 : memory.nbytes]) == bytes(store.bytes[0 : memory.nbytes])
    memory.finish()
    memory.close()
    return load_file(path)


def tied() -> nn.Module:
    model = Tied()
    model.register_buffer("scale", torch.tensor(2.5))
    return model


def same_module_twice() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(2, 3), nn.BatchNorm1d(3))
    model[1] = model[0]
    return model


def sharing_rows() -> Any:
    storage = torch.zeros(4, 6)
    return module({"rows": storage[1:3], "whole": storage, "all": storage.view(24), "none": torch.empty(0, 3)})


MODELS: dict[str, Any] = {
    "tied embeddings and a scalar": tied,
    "a module under two names": same_module_twice,
    "rows of another": sharing_rows,
    "rows and a column of another": sharing,
    "types": lambda: module(
        {
            "a": torch.arange(3, dtype=torch.int8),
            "b": torch.ones(5, dtype=torch.bfloat16),
            "c": torch.ones(2, 2, dtype=torch.float8_e4m3fn),
            "d": torch.ones(3, dtype=torch.float64),
            "e": torch.tensor([True, False]),
        }
    ),
    "beside each other": lambda: module({"a": torch.arange(24.0)[:10], "b": torch.arange(24.0)[10:]}),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_the_file_has_what_vllms_own_writer_keeps(make: Any, tmp_path: Path) -> None:
    model = make()
    expected = {
        name: tensor.clone() for name, tensor in ShardedStateLoader._filter_subtensors(model.state_dict()).items()
    }
    found = written(model, tmp_path / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].view(-1).view(torch.uint8), tensor.contiguous().view(-1).view(torch.uint8)), name


def turned() -> Any:
    storage = torch.zeros(4, 6)
    return module({"whole": storage, "turned": storage.t()})


def test_what_vllms_own_writer_stumbles_over_is_refused() -> None:
    model = turned()
    with pytest.raises(RuntimeError):
        ShardedStateLoader._filter_subtensors(model.state_dict())
    with pytest.raises(CannotBeWritten, match="turned, whose"):
        layout_of(loaded_from_disk(model).manifest)


def test_a_type_that_safetensors_does_not_know_is_refused() -> None:
    with pytest.raises(CannotBeWritten, match="w of type complex32"):
        layout_of(Manifest.layout([("w", "complex32", (2,), (1,))]))


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["int8", "bfloat16", "float32"]), st.lists(st.integers(0, 9), max_size=3)), max_size=8
    )
)
def test_any_tensors_are_read_as_they_were(tensors: list[tuple[str, list[int]]]) -> None:
    from vllm_ascend.model_loader.netloader.weights.manifest import contiguous_strides

    manifest = Manifest.layout(
        (f"w{number}", dtype, tuple(shape), contiguous_strides(tuple(shape)))
        for number, (dtype, shape) in enumerate(tensors)
    )
    layout = layout_of(manifest)
    places = sorted((segment.at, segment.at + segment.end - segment.begin) for segment in layout.segments)
    assert [begin for begin, _ in places] == [len(layout.header), *(end for _, end in places)][: len(places)]
    assert layout.nbytes == (places[-1][1] if places else len(layout.header))
    assert len(layout.header) % 8 == 0
    assert layout.tensors == sum(0 not in shape for _, shape in tensors)
