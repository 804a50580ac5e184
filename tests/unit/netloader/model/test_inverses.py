"""Bytes of tensors that lie in another order, against the tensors as they were."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

import pytest
import torch

from support.arrangements import ARRANGED
from vllm_ascend.model_loader.netloader.model import inverses
from vllm_ascend.model_loader.netloader.model.inverses import AsLoaded, Contents, Rearranged, memory_of, readings
from vllm_ascend.model_loader.netloader.model.views import flat, manifest_of
from vllm_ascend.model_loader.netloader.weights.manifest import TensorSpec

SHAPES: Final = [(48, 64), (37, 50), (64, 64), (3, 40, 33), (2, 3, 20, 17)]
TYPES: Final = [torch.int8, torch.bfloat16, torch.float32]


def spec_of(tensor: torch.Tensor) -> TensorSpec:
    return manifest_of([("weight", tensor)]).tensors[0]


def bytes_of(contents: Contents, begin: int, end: int) -> bytes:
    return b"".join(bytes(piece.numpy()) for piece in contents.pieces(begin, end))


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def reading_of(tensor: torch.Tensor, arranged: torch.Tensor) -> Contents:
    """The one that gives the bytes of `tensor` back from `arranged`. Fails the test if there is none."""
    memory, raw = memory_of(arranged), bytes(flat(tensor).numpy())
    assert memory is not None
    return next(each for each in readings(spec_of(tensor), memory) if bytes_of(each, 0, len(raw)) == raw)


@pytest.mark.parametrize("arrange", ARRANGED.values(), ids=ARRANGED.keys())
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_part_is_that_of_the_tensor_before(
    arrange: Callable[[torch.Tensor], torch.Tensor],
    dtype: torch.dtype,
    shape: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inverses, "SCRATCH_BYTES", 1000)
    tensor = random_tensor(shape, dtype)
    contents, raw, chooser = reading_of(tensor, arrange(tensor)), bytes(flat(tensor).numpy()), random.Random(2)
    for _ in range(60):
        begin, end = sorted(chooser.randrange(len(raw) + 1) for _ in range(2))
        assert bytes_of(contents, begin, end) == raw[begin:end]
        assert contents.on_host(begin, end) == raw[begin:end]


def test_a_tensor_whose_columns_follow_each_other_in_memory_is_turned_back_to_that() -> None:
    tensor = random_tensor((40, 70), torch.int8).t()
    for arrange in ARRANGED.values():
        contents = reading_of(tensor, arrange(tensor.t()))
        assert bytes_of(contents, 100, 300) == bytes(flat(tensor).numpy())[100:300]


def test_a_reading_of_another_type_and_shape_over_the_same_bytes_is_found() -> None:
    tensor = random_tensor((3, 40, 64), torch.int8)
    packed = tensor.transpose(1, 2).contiguous().view(torch.int32).view(-1, 24)
    assert type(reading_of(tensor, packed)).__name__ == "Transposed"


@pytest.mark.parametrize("kind", inverses.ARRANGEMENTS)
def test_what_is_turned_back_at_a_time_is_bounded(kind: type[Rearranged], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inverses, "SCRATCH_BYTES", 1 << 12)
    spec = spec_of(random_tensor((4, 300, 64), torch.int8))
    contents = kind(spec, torch.zeros(kind.size(spec), dtype=torch.uint8))
    sizes = [piece.nbytes for piece in contents.pieces(70, spec.nbytes)]
    assert sum(sizes) == spec.nbytes - 70
    assert max(sizes) <= 1 << 12
    assert len(sizes) <= 2 * spec.nbytes // (1 << 12)


@pytest.mark.parametrize("kind", inverses.ARRANGEMENTS)
def test_little_is_read_where_little_is_wanted(kind: type[Rearranged]) -> None:
    rows: list[int] = []

    class Noting(kind):  # type: ignore[valid-type, misc]
        def block(self, matrix: int, first: int, last: int) -> torch.Tensor:
            rows.append(last - first)
            return super().block(matrix, first, last)  # type: ignore[no-any-return]

    spec = spec_of(random_tensor((2, 3000, 64), torch.int8))
    contents = Noting(spec, torch.zeros(kind.size(spec), dtype=torch.uint8))
    begin = (3000 + 1500) * 64 + 10
    assert len(bytes_of(contents, begin, begin + 200)) == 200
    assert sum(rows) <= 32 + 5


def test_memory_of_another_size_is_no_arrangement() -> None:
    spec = spec_of(random_tensor((48, 64), torch.int8))
    assert list(readings(spec, torch.zeros(spec.nbytes + 1, dtype=torch.uint8))) == []


def test_a_vector_has_no_other_arrangement() -> None:
    spec = spec_of(random_tensor((48, 1, 1), torch.int8))
    (only,) = readings(spec, torch.zeros(48, dtype=torch.uint8))
    assert isinstance(only, AsLoaded)


def test_a_tensor_without_memory_of_its_own_has_none_to_be_read() -> None:
    matrix = torch.ones(4, 4)
    assert memory_of(matrix.to("meta")) is None
    assert memory_of(matrix.to_sparse()) is None
    assert memory_of(matrix[:, :2]) is None
    assert memory_of(matrix.t()) is not None
