"""Memory that is spread over the tensors of a model.

The model is on the CPU, where the same code runs as on an accelerator, or on the first device of the type that
``--device`` names.
"""

from __future__ import annotations

import contextlib
import random
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from vllm_ascend.model_loader.netloader.errors import UnsupportedModel
from vllm_ascend.model_loader.netloader.model.device_memory import tensor_in
from vllm_ascend.model_loader.netloader.model.live import LiveMemory
from vllm_ascend.model_loader.netloader.model.streams import own_stream
from vllm_ascend.model_loader.netloader.model.tensors import current_tensors
from vllm_ascend.model_loader.netloader.model.views import flat
from vllm_ascend.model_loader.netloader.model.weights import LiveWeights
from vllm_ascend.model_loader.netloader.weights.manifest import Manifest

DEVICE = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def chosen_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Puts the models of these tests on the device that is asked for."""
    kind = request.config.getoption("--device", default=None)
    if kind is not None and not getattr(torch, kind).device_count():
        pytest.skip(f"torch sees no {kind} device here")
    with pytest.MonkeyPatch.context() as patch:
        if kind is not None:
            patch.setattr(sys.modules[__name__], "DEVICE", torch.device(kind, 0))
        yield


class Model(nn.Module):
    """Parameters of odd sizes, one of them transposed in memory, a tied one, and a buffer."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first = nn.Parameter(torch.randn(3, 5, generator=generator).to(DEVICE))
        self.turned = nn.Parameter(torch.randn(7, 4, generator=generator).to(DEVICE).t())
        self.tied = self.first
        self.rows = nn.Parameter(self.first.data[1:])
        large = torch.randn(300, 41, generator=generator).to(DEVICE, torch.bfloat16)
        self.large = nn.Parameter(large, requires_grad=False)
        self.register_buffer("scale", torch.tensor([2.5], device=DEVICE))


def memory_of(model: Any) -> LiveMemory:
    return LiveWeights(model, DEVICE).allocate()


def contents_of(memory: LiveMemory) -> bytes:
    return bytes(memory.contents()[0 : memory.nbytes])


def test_what_lies_there_is_each_tensor_in_its_place_with_zeros_between() -> None:
    model = Model()
    memory, manifest = memory_of(model), LiveWeights(model, DEVICE).manifest
    expected = bytearray(manifest.nbytes)
    for spec in manifest.tensors:
        tensor = current_tensors(model)[spec.name]
        expected[spec.offset : spec.end] = bytes(flat(tensor.data).cpu().numpy())
    assert contents_of(memory) == expected


def test_any_range_is_the_same_part_of_the_whole() -> None:
    memory = memory_of(Model())
    whole, chooser = contents_of(memory), random.Random(1)
    for _ in range(300):
        begin, end = sorted(chooser.randrange(memory.nbytes + 1) for _ in range(2))
        assert bytes(memory.contents()[begin:end]) == whole[begin:end]
        assert bytes(memory.chunk(begin, end - begin).cpu().numpy()) == whole[begin:end]


def test_a_chunk_within_one_tensor_is_its_own_memory() -> None:
    model = Model()
    memory = memory_of(model)
    spec = next(spec for spec in LiveWeights(model, DEVICE).manifest.tensors if spec.name == "large")
    assert memory.chunk(spec.offset + 2, 100).data_ptr() == model.large.data_ptr() + 2


@pytest.mark.parametrize("by_host", [True, False], ids=["from host bytes", "as a tensor"])
def test_nothing_of_a_chunk_is_in_the_model_before_it_settles(by_host: bool) -> None:
    source, target = memory_of(Model(1)), memory_of(Model(2))
    before, wanted = contents_of(target), contents_of(source)
    landing = target.landing(4, 300)
    if by_host:
        landing.host[:] = wanted[4:304]
    else:
        landing.tensor.copy_(source.chunk(4, 300))
    assert bytes(landing.arrived(0, 300)) == wanted[4:304]
    assert contents_of(target) == before
    landing.settle()
    settled = contents_of(target)
    assert settled[4:304] == wanted[4:304]
    assert settled[:4] + settled[304:] == before[:4] + before[304:]


def test_filling_all_chunks_makes_the_models_equal() -> None:
    source, model = memory_of(Model(1)), Model(2)
    target = memory_of(model)
    for offset in range(0, target.nbytes, 97):
        length = min(97, target.nbytes - offset)
        landing = target.landing(offset, length)
        landing.host[:] = source.contents()[offset : offset + length]
        landing.settle()
    for name, tensor in current_tensors(Model(1)).items():
        assert torch.equal(current_tensors(model)[name], tensor), name
    assert model.tied is model.first


def test_memory_that_is_given_up_says_so() -> None:
    memory = memory_of(Model())
    memory.seal()
    assert memory.servable
    memory.close()
    assert not memory.servable
    with pytest.raises(OSError, match="given up"):
        memory.chunk(0, 1)


def test_a_loader_may_put_a_tensor_elsewhere() -> None:
    model = Model()
    weights = LiveWeights(model, DEVICE)
    memory = weights.allocate()
    model.large.data = torch.ones_like(model.large.data)
    weights.collect_into(model, memory)
    assert torch.equal(tensor_in(memory, weights.manifest.tensors[-2]), model.large)


def test_a_loader_that_changes_a_shape_makes_the_model_one_that_is_not_served() -> None:
    model = Model()
    weights = LiveWeights(model, DEVICE)
    memory = weights.allocate()
    model.large.data = torch.ones(3, device=DEVICE)
    with pytest.raises(UnsupportedModel, match="loading changed large"):
        weights.collect_into(model, memory)


def test_a_manifest_without_bytes_is_memory_too() -> None:
    memory = LiveMemory(Manifest([]), {}, DEVICE)
    memory.seal()
    assert contents_of(memory) == b""


class StandIn(types.ModuleType):
    """What torch has for each type of device, of a type that is none here: it notes what is asked of it."""

    def __init__(self) -> None:
        super().__init__("stand_in")
        self.calls: list[str] = []

    def set_device(self, device: torch.device) -> None:
        self.calls.append(f"set {device.index}")

    def Stream(self, device: torch.device) -> StandIn:  # noqa: N802
        self.calls.append(f"make a stream on {device.index}")
        return self

    @contextlib.contextmanager
    def stream(self, stream: object) -> Iterator[None]:
        self.calls.append("enter")
        yield
        self.calls.append("leave")

    def synchronize(self) -> None:
        self.calls.append("wait")


def test_a_device_of_any_type_needs_nothing_but_a_module_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    module, device = StandIn(), torch.device("xpu", 3)
    monkeypatch.setattr(torch, device.type, module)
    for _ in range(2):
        with own_stream(device):
            module.calls.append("work")
    once = ["enter", "work", "leave", "wait"]
    assert module.calls == ["set 3", "make a stream on 3", *once, "set 3", *once]
