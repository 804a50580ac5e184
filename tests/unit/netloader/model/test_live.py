"""Memory that is spread over the tensors of a model.

The model is on the CPU, where the same code runs as on an accelerator, or on the first device of the type that
``--device`` names.
"""

from __future__ import annotations

import contextlib
import random
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from vllm_ascend.model_loader.netloader.errors import UnsupportedModel
from vllm_ascend.model_loader.netloader.model.device_memory import tensor_in
from vllm_ascend.model_loader.netloader.model.live import Int8Cache, LiveMemory, checksum
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


def add_in_place(model: Model) -> None:
    model.large.data.add_(1)


def swap_two_elements(model: Model) -> None:
    contents = model.large.data
    contents[0, 0], contents[5, 7] = contents[5, 7].clone(), contents[0, 0].clone()


def replace_by_another_layout(model: Model) -> None:
    model.large = nn.Parameter(model.large.data.t().contiguous(), requires_grad=False)


def replace_by_another_type(model: Model) -> None:
    model.large = nn.Parameter(model.large.data.float(), requires_grad=False)


def remove(model: Model) -> None:
    del model.large


CHANGES = (add_in_place, swap_two_elements, replace_by_another_layout, replace_by_another_type, remove)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("cache", ["hbm", "dram"])
def test_what_post_processing_changes_is_served_from_its_copy(change: Callable[[Model], None], cache: str) -> None:
    model = Model()
    memory = memory_of(model)
    original = contents_of(memory)
    memory.remember(Int8Cache(cache))
    change(model)
    assert memory.reconcile(current_tensors(model)) == ["large"]
    assert contents_of(memory) == original


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("cache", "names"), [("no", None), ("hbm", ("first",))], ids=["no cache", "another name"])
def test_without_a_copy_it_is_named_with_the_setting_that_keeps_it(
    change: Callable[[Model], None], cache: str, names: tuple[str, ...] | None
) -> None:
    model = Model()
    memory = memory_of(model)
    memory.remember(Int8Cache(cache, names))
    change(model)
    with pytest.raises(UnsupportedModel, match=r'changed 1 tensors \(large\).*INT8_CACHE to "hbm" or "dram"'):
        memory.reconcile(current_tensors(model))


def test_weights_that_are_served_from_where_they_are_note_their_originals() -> None:
    model = Model()
    weights = LiveWeights(model, DEVICE, Int8Cache("dram"))
    memory = weights.allocate()
    original = contents_of(memory)
    weights.note_originals(memory)
    add_in_place(model)
    assert weights.find_changes(model, memory) == ["large"]
    assert contents_of(memory) == original


def test_what_is_unchanged_needs_no_copy() -> None:
    model: Any = Model()
    memory = memory_of(model)
    memory.remember(Int8Cache())
    assert memory.reconcile(current_tensors(model)) == []
    assert memory.chunk(memory.nbytes - 64, 4).data_ptr() == model.scale.data_ptr()


def test_equal_bytes_elsewhere_are_served_from_there_so_that_the_first_place_is_free() -> None:
    model = Model()
    memory = memory_of(model)
    memory.remember(Int8Cache())
    model.large = nn.Parameter(model.large.data.clone(), requires_grad=False)
    assert memory.reconcile(current_tensors(model)) == []
    spec = next(spec for spec in LiveWeights(model, DEVICE).manifest.tensors if spec.name == "large")
    assert memory.chunk(spec.offset, 10).data_ptr() == model.large.data_ptr()


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


def test_the_checksum_is_that_of_the_bytes_whatever_their_number() -> None:
    chooser = random.Random(3)
    for nbytes in (0, 1, 3, 4, 8191, 8192, 8193, 40_001):
        content = torch.frombuffer(bytearray(chooser.randbytes(nbytes) or b"\0"), dtype=torch.uint8)[:nbytes].to(DEVICE)
        assert checksum(content.clone()) == checksum(content)
        if nbytes:
            other = content.clone()
            other[chooser.randrange(nbytes)] ^= 1 << chooser.randrange(8)
            assert checksum(other) != checksum(content)


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
