"""Weights that post-processing has brought into other formats are served as they were loaded, and held once."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from vllm_ascend.model_loader.netloader.errors import UnsupportedModel
from vllm_ascend.model_loader.netloader.model import inverses, originals
from vllm_ascend.model_loader.netloader.model.inverses import TransposedFractal
from vllm_ascend.model_loader.netloader.model.views import as_bytes, as_tensor, flat
from vllm_ascend.model_loader.netloader.model.weights import LiveWeights
from vllm_ascend.model_loader.netloader.weights.memory import Memory

FRACTAL_NZ = 29
MATRIX = 2048, 4096
MATRICES = 6
BUCKET = 1 << 24
"""What this client takes of its device beside the weights while they come, one chunk at a time."""


@pytest.fixture(autouse=True)
def private_formats() -> Iterator[None]:
    config: Any = torch.get_device_module("npu").config
    config.allow_internal_format = True
    yield
    config.allow_internal_format = False


def in_nz(tensor: torch.Tensor) -> torch.Tensor:
    cast: torch.Tensor = torch.ops.npu.npu_format_cast(tensor.contiguous(), FRACTAL_NZ)
    return cast


class Model(nn.Module):
    """One matrix or stack of them for each way to process it."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__()
        for name in PROCESSED:
            values = torch.randint(-128, 128, shape).to(dtype).to("npu")
            self.register_parameter(name, nn.Parameter(values, requires_grad=False))


PROCESSED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": lambda tensor: tensor.transpose(-2, -1).contiguous(),
    "in_nz": in_nz,
    "transposed_in_nz": lambda tensor: in_nz(tensor.transpose(-2, -1)),
    "a_view_of_nz": lambda tensor: in_nz(tensor.transpose(-2, -1)).transpose(-2, -1),
}


class Served:
    """A model, and the memory from which it is served: loaded from disk, or filled by a peer that holds `contents`."""

    def __init__(self, model: nn.Module, contents: Memory | None = None) -> None:
        self.model = model
        self.weights = LiveWeights(model, next(model.parameters()).device)
        self.memory = self.weights.allocate()
        if contents is not None:
            self._fill(contents)
        self.memory.seal()
        self.weights.note_originals(self.memory)

    def changes(self) -> list[str]:
        return self.weights.find_changes(self.model, self.memory)

    @property
    def contents(self) -> bytes:
        return bytes(self.memory.reader()[0 : self.memory.nbytes])

    def _fill(self, contents: Memory) -> None:
        served = contents.reader()
        for offset in range(0, self.memory.nbytes, 1 << 24):
            length = min(1 << 24, self.memory.nbytes - offset)
            landing = self.memory.landing(offset, length)
            landing.tensor.copy_(as_tensor(served[offset : offset + length]))
            landing.settle()


def process(model: nn.Module, change: Callable[[torch.Tensor], torch.Tensor] | None = None) -> None:
    for name in [name for name, _ in model.named_parameters()]:
        changed = (change or PROCESSED[name])(getattr(model, name).data)
        setattr(model, name, nn.Parameter(changed, requires_grad=False))


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(96, 160), (50, 70), (3, 64, 96)], ids=str)
def test_what_is_transposed_and_in_fractal_nz_is_turned_back(
    shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(originals, "KEPT_BYTES", 0)
    monkeypatch.setattr(inverses, "SCRATCH_BYTES", 1 << 12)
    served = Served(Model(shape, dtype))
    before = {name: each.data.cpu() for name, each in served.model.named_parameters()}
    process(served.model)
    processed = {name: each.cpu() for name, each in served.model.named_parameters()}
    assert served.changes() == list(PROCESSED)
    for spec in served.weights.manifest.tensors:
        raw = flat(before[spec.name])
        assert served.memory.reader()[spec.offset : spec.end] == as_bytes(raw)
        sent = served.memory.chunk(spec.offset + 32, spec.nbytes - 32)
        assert torch.equal(sent.cpu(), raw[32:])

    formats = {name: torch.ops.npu.get_npu_format(each) for name, each in served.model.named_parameters()}
    assert formats["transposed"] != FRACTAL_NZ
    assert formats["transposed_in_nz"] == formats["in_nz"] == FRACTAL_NZ
    for name, tensor in served.model.named_parameters():
        assert torch.equal(tensor.cpu(), processed[name]), name


def test_an_inverse_that_is_wrong_is_named_and_not_served_from(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(TransposedFractal):
        def block(self, matrix: int, first: int, last: int) -> torch.Tensor:
            block = super().block(matrix, first, last).clone()
            quarter = self.rows // 4
            if first <= quarter < last:
                block[quarter - first].add_(1)
            return block

    monkeypatch.setattr(inverses, "ARRANGEMENTS", (Wrong,))
    served = Served(Large(1))
    process(served.model, PROCESSED["transposed_in_nz"])
    with pytest.raises(UnsupportedModel, match=r"changed 1 tensors \(weight_0\)"):
        served.changes()


class Large(nn.Module):
    """Matrices of a size at which a few megabytes beside them would show."""

    def __init__(self, number: int = MATRICES) -> None:
        super().__init__()
        generator = torch.Generator(device="npu").manual_seed(number)
        for each in range(number):
            values = torch.empty(MATRIX, dtype=torch.int8, device="npu").random_(-128, 128, generator=generator)
            self.register_parameter(f"weight_{each}", nn.Parameter(values, requires_grad=False))


def peak_of(load: Callable[[], object]) -> tuple[object, int, int]:
    """What `load` returns, and the bytes of the device that it has taken at most, and in the end."""
    npu: Any = torch.get_device_module("npu")
    gc.collect()
    before = npu.memory_allocated()
    npu.reset_peak_memory_stats()
    loaded = load()
    gc.collect()
    return loaded, npu.max_memory_allocated() - before, npu.memory_allocated() - before


def test_a_start_takes_no_more_memory_than_without_netloader_at_most_and_in_the_end() -> None:
    def without() -> object:
        model = Large()
        process(model, PROCESSED["transposed_in_nz"])
        return model

    def with_netloader(contents: Memory | None = None) -> Served:
        served = Served(Large(), contents)
        process(served.model, PROCESSED["transposed_in_nz"])
        assert len(served.changes()) == MATRICES
        return served

    plain, plain_peak, plain_end = peak_of(without)
    del plain
    served, peak, end = peak_of(with_netloader)
    assert peak <= 1.02 * plain_peak
    assert end <= 1.01 * plain_end

    assert isinstance(served, Served)
    client, peak, end = peak_of(lambda: with_netloader(served.memory))
    assert peak <= 1.02 * plain_peak + BUCKET
    assert end <= 1.01 * plain_end
    assert isinstance(client, Served)
    assert client.contents == served.contents
