"""Post-processing changes a model, and its weights are still served as they were loaded.

The model is on the CPU, where the same code runs as on an accelerator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from support.arrangements import ARRANGED, as_it_is, fractal, transposed
from vllm_ascend.model_loader.netloader.errors import UnsupportedModel
from vllm_ascend.model_loader.netloader.model import inverses, originals
from vllm_ascend.model_loader.netloader.model.inverses import Transposed
from vllm_ascend.model_loader.netloader.model.live import LiveMemory
from vllm_ascend.model_loader.netloader.model.originals import Int8Cache
from vllm_ascend.model_loader.netloader.model.weights import LiveWeights

CPU = torch.device("cpu")


class Model(nn.Module):
    """A matrix, stacked ones, a square one, a tied one, and scales, which are small."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def weight(*shape: int, dtype: torch.dtype = torch.int8) -> nn.Parameter:
            values = torch.randint(-128, 128, shape, generator=generator).to(dtype)
            return nn.Parameter(values, requires_grad=False)

        self.embed = weight(300, 64, dtype=torch.bfloat16)
        self.weight = weight(192, 160)
        self.scale = weight(192, 1, dtype=torch.float32)
        self.experts = weight(3, 96, 64)
        self.square = weight(128, 128)
        self.head = self.embed


@pytest.fixture(autouse=True)
def little_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(originals, "KEPT_BYTES", 1000)


class Served:
    """A model as it was loaded, and the memory from which it is served."""

    def __init__(self, model: Any, cache: str = "no", names: tuple[str, ...] | None = None) -> None:
        self.model = model
        self.weights = LiveWeights(model, CPU, Int8Cache(cache, names))
        self.memory: LiveMemory = self.weights.allocate()
        self.memory.seal()
        self.before = self.contents
        self.weights.note_originals(self.memory)

    @property
    def contents(self) -> bytes:
        return bytes(self.memory.reader()[0 : self.memory.nbytes])

    def changes(self) -> list[str]:
        return self.weights.find_changes(self.model, self.memory)

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether what is served lies in the storage of `tensor`."""
        used = {each.memory.untyped_storage().data_ptr() for each in self.memory._contents.values()}
        return tensor.untyped_storage().data_ptr() in used


def replace(module: Any, name: str, change: Callable[[torch.Tensor], torch.Tensor], *, in_place: bool = False) -> None:
    changed = change(getattr(module, name).data)
    if in_place:
        getattr(module, name).data = changed
    else:
        setattr(module, name, nn.Parameter(changed, requires_grad=False))


@pytest.mark.parametrize("in_place", [False, True], ids=["new parameter", "same parameter"])
@pytest.mark.parametrize("arrange", ARRANGED.values(), ids=ARRANGED.keys())
def test_what_is_rearranged_is_turned_back_from_where_it_is(
    arrange: Callable[[torch.Tensor], torch.Tensor], in_place: bool
) -> None:
    served = Served(Model())
    for name in ("weight", "experts", "square"):
        replace(served.model, name, arrange, in_place=in_place)
    replace(served.model, "scale", torch.flatten, in_place=in_place)
    assert served.changes() == ([] if arrange is as_it_is else ["weight", "experts", "square"])
    assert served.contents == served.before
    for tensor in served.model.parameters():
        assert served.holds(tensor)


def test_any_range_is_the_same_part_of_the_whole_through_inverses_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inverses, "SCRATCH_BYTES", 1 << 12)
    served = Served(Model())
    for name in ("weight", "experts"):
        replace(served.model, name, lambda tensor: fractal(transposed(tensor)))
    served.changes()
    for begin in range(0, len(served.before), 3001):
        end = min(begin + 20_000, len(served.before))
        assert bytes(served.memory.reader()[begin:end]) == served.before[begin:end]
        assert bytes(served.memory.chunk(begin, end - begin).numpy()) == served.before[begin:end]


def test_nothing_holds_what_is_replaced_while_the_model_is_processed() -> None:
    served = Served(Model(), "no")
    for name in ("weight", "experts", "square"):
        original = StorageWeakRef(getattr(served.model, name).data.untyped_storage())
        replace(served.model, name, transposed)
        assert original.expired(), name
    served.changes()
    assert served.contents == served.before


def drop_columns(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[..., :-1].contiguous()


def rotate(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.roll(1, -1)


def add(tensor: torch.Tensor) -> torch.Tensor:
    return tensor + 1


def change_one_byte(tensor: torch.Tensor) -> torch.Tensor:
    changed = tensor.clone()
    changed.view(-1)[changed.numel() // 4] += 1
    return changed


def turn_and_change_one_byte(tensor: torch.Tensor) -> torch.Tensor:
    return change_one_byte(fractal(transposed(tensor)))


IRREVERSIBLE = (drop_columns, rotate, add, change_one_byte, turn_and_change_one_byte)


@pytest.mark.parametrize("change", IRREVERSIBLE)
@pytest.mark.parametrize(("cache", "names"), [("no", None), ("hbm", ("experts",))], ids=["no cache", "another name"])
def test_what_has_no_inverse_is_named_with_the_setting_that_keeps_it(
    change: Callable[[torch.Tensor], torch.Tensor], cache: str, names: tuple[str, ...] | None
) -> None:
    served = Served(Model(), cache, names)
    replace(served.model, "weight", change)
    with pytest.raises(UnsupportedModel, match=r'changed 1 tensors \(weight\).*INT8_CACHE to "hbm" or "dram"'):
        served.changes()


@pytest.mark.parametrize("change", IRREVERSIBLE)
@pytest.mark.parametrize("cache", ["hbm", "dram"])
def test_what_has_no_inverse_is_served_from_its_copy_and_no_other_copy_is_left(
    change: Callable[[torch.Tensor], torch.Tensor], cache: str
) -> None:
    served = Served(Model(), cache)
    replace(served.model, "weight", change)
    replace(served.model, "experts", transposed)
    assert served.changes() == ["weight", "experts"]
    assert served.contents == served.before
    assert not served.holds(served.model.weight)
    for tensor in (served.model.experts, served.model.square, served.model.embed, served.model.scale):
        assert served.holds(tensor)


def test_the_smallest_tensors_are_kept_whatever_the_cache() -> None:
    served = Served(Model())
    replace(served.model, "scale", lambda tensor: tensor.to(torch.int64))
    assert served.changes() == ["scale"]
    assert served.contents == served.before


def test_no_more_is_kept_than_a_share_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(originals, "KEPT_BYTES", 767)  # the scales have 768
    monkeypatch.setattr(originals, "KEPT_SHARE", 0.0)
    served = Served(Model())
    replace(served.model, "scale", add)
    with pytest.raises(UnsupportedModel, match=r"\(scale\)"):
        served.changes()
    monkeypatch.setattr(originals, "KEPT_SHARE", 0.01)
    assert originals.kept_bytes_of(1 << 40) == (1 << 40) // 100


class Wrong(Transposed):
    """An inverse that is wrong in a single row."""

    def block(self, matrix: int, first: int, last: int) -> torch.Tensor:
        block = super().block(matrix, first, last).clone()
        quarter = self.rows // 4
        if first <= quarter < last:
            block[quarter - first] += 1
        return block


def test_an_inverse_that_is_wrong_is_never_served_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inverses, "ARRANGEMENTS", (Wrong,))
    served = Served(Model())
    replace(served.model, "weight", transposed)
    with pytest.raises(UnsupportedModel, match=r"changed 1 tensors \(weight\)"):
        served.changes()

    monkeypatch.setattr(inverses, "ARRANGEMENTS", (Wrong, Transposed))
    served = Served(Model())
    replace(served.model, "weight", transposed)
    assert served.changes() == ["weight"]
    assert served.contents == served.before


def test_a_single_value_decides_how_a_tensor_is_read() -> None:
    model = Model()
    model.square.data.zero_()
    model.square.data[20, 90] = 1
    served = Served(model)
    replace(model, "square", transposed)
    assert served.changes() == ["square"]
    assert served.contents == served.before


def test_a_device_that_cannot_read_like_that_leaves_the_model_one_that_is_not_served(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def block(*_: object) -> torch.Tensor:
        raise RuntimeError("operator not supported")

    monkeypatch.setattr(Transposed, "block", block)
    served = Served(Model())
    replace(served.model, "weight", transposed)
    with pytest.raises(UnsupportedModel, match=r"\(weight\)"):
        served.changes()
    assert "weight cannot be read as Transposed on cpu, so it is not served like that: operator not" in caplog.text


def test_a_device_that_has_no_memory_for_copies_leaves_the_model_one_that_is_not_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def clone(_: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("NPU out of memory")

    monkeypatch.setattr(torch.Tensor, "clone", clone)
    with pytest.raises(UnsupportedModel, match=r"cpu failed .* \(INT8_CACHE is 'hbm'\) .*: NPU out of memory"):
        Served(Model(), "hbm")


def test_a_tensor_that_the_model_has_under_another_name_is_served_from_there() -> None:
    served = Served(Model())
    served.model.rows = served.model.weight.data
    del served.model.weight
    assert served.changes() == []
    assert served.contents == served.before


def test_weights_that_are_tied_after_loading_are_served_from_the_one_that_is_left() -> None:
    model = Model()
    model.head = nn.Parameter(model.embed.data.clone(), requires_grad=False)
    served = Served(model)
    model.head = model.embed
    assert served.changes() == []
    assert served.contents == served.before


@pytest.mark.parametrize("name", ["embed", "weight", "experts"])
def test_a_change_that_nobody_has_told_of_is_found_in_what_is_served(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    served = Served(Model(), "dram")
    replace(served.model, "weight", transposed)
    replace(served.model, "experts", lambda tensor: fractal(transposed(tensor)))
    replace(served.model, "square", add)
    served.changes()
    served.model.square.data.zero_()  # what is served is its copy
    assert served.memory.is_as_loaded()
    getattr(served.model, name).data.view(-1)[17] += 1
    assert not served.memory.is_as_loaded()
    assert f"1 tensors ({name}) were changed after loading by something that Netloader does not know of" in caplog.text


def test_nothing_is_read_while_the_model_is_processed() -> None:
    served = Served(Model())
    with pytest.raises(OSError, match="being processed"):
        served.memory.chunk(0, 1)
