"""FRACTAL_NZ: a layout of the bytes, not only a name."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch
import torch_npu
from torch.npu import NPUGraph

FRACTAL_NZ, ND = torch_npu.Format.FRACTAL_NZ, torch_npu.Format.ND
COLUMNS = {torch.float16: 16, torch.bfloat16: 16, torch.float32: 16, torch.int8: 32}


@pytest.fixture(autouse=True)
def internal_formats() -> Iterator[None]:
    torch.npu.config.allow_internal_format = True
    yield
    torch.npu.config.allow_internal_format = False


def matrix(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return (torch.arange(torch.Size(shape).numel()) % 120 + 1).view(shape).to(dtype)


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the bytes of the tensor's storage on the device, as elements of its dtype."""
    torch.npu.synchronize()
    size = tensor.untyped_storage().nbytes()
    return torch.frombuffer(bytearray(ctypes.string_at(tensor.data_ptr(), size)), dtype=tensor.dtype)


@pytest.mark.parametrize("dtype", COLUMNS, ids=str)
@pytest.mark.parametrize("shape", [(20, 40), (16, 32), (6, 17, 33)], ids=str)
def test_a_cast_there_and_back_restores(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    values = matrix(*shape, dtype=dtype)
    fractal = torch_npu.npu_format_cast(values.npu(), FRACTAL_NZ)
    assert torch_npu.get_npu_format(fractal) == FRACTAL_NZ
    assert fractal.shape == values.shape
    plain = torch_npu.npu_format_cast(fractal, ND)
    assert torch_npu.get_npu_format(plain) == ND
    assert torch.equal(plain.cpu(), values)


@pytest.mark.parametrize("dtype", COLUMNS, ids=str)
def test_the_memory_holds_padded_blocks(dtype: torch.dtype) -> None:
    values, columns = matrix(20, 40, dtype=dtype), COLUMNS[dtype]
    fractal = torch_npu.npu_format_cast(values.npu(), FRACTAL_NZ)
    across = -(-40 // columns)
    expected = torch.zeros(across, 32, columns, dtype=dtype)
    for block in range(across):
        part = values[:, block * columns : (block + 1) * columns]
        expected[block, :20, : part.shape[1]] = part
    assert torch_npu.get_storage_size(fractal) == expected.numel()
    held = bytes_of(fractal)[: expected.numel()]
    assert torch.equal(held, expected.flatten())
    assert not torch.equal(held[: values.numel()], values.flatten()), "sent as if it were ND it would be wrong"


def test_operators_read_it_as_what_it_means() -> None:
    values = matrix(20, 40)
    fractal = torch_npu.npu_format_cast(values.npu(), FRACTAL_NZ)
    rows = matrix(3, 40)
    assert torch.equal((fractal * 2).cpu(), values * 2)
    assert torch.equal(fractal.cpu(), values)
    assert torch.equal(fractal.float().cpu(), values.float())
    assert torch.equal((fractal.t() + 1).cpu(), values.t() + 1)
    assert torch.equal(torch.nn.functional.linear(rows.npu(), fractal).cpu(), torch.nn.functional.linear(rows, values))


def test_writing_into_it_is_refused_by_name() -> None:
    fractal = torch_npu.npu_format_cast(matrix(20, 40).npu(), FRACTAL_NZ)
    with pytest.raises(RuntimeError, match=r"aten::add_.*self is in FRACTAL_NZ"):
        fractal.add_(1)
    with pytest.raises(RuntimeError, match=r"aten::copy_.*FRACTAL_NZ"):
        fractal.copy_(torch.zeros(20, 40))


def test_torch_npu_itself_copies_into_it() -> None:
    values = matrix(20, 40)
    fractal = torch_npu.npu_format_cast(torch.zeros(20, 40, dtype=torch.float16).npu(), FRACTAL_NZ)
    fractal.copy_(values)
    assert torch_npu.get_npu_format(fractal) == FRACTAL_NZ
    assert torch.equal((fractal + 0).cpu(), values)


def test_a_graph_reads_it_at_each_replay() -> None:
    values, rows, graph = matrix(20, 40), matrix(3, 40).npu(), NPUGraph()
    fractal = torch_npu.npu_format_cast(values.npu(), FRACTAL_NZ)
    with torch.npu.graph(graph):
        product = torch.nn.functional.linear(rows, fractal)
        single = fractal.t().to(torch.float32)
    for changed in (values, values + 1):
        fractal.copy_(changed)
        graph.replay()
        assert torch.equal(product.cpu(), torch.nn.functional.linear(rows.cpu(), changed))
        assert torch.equal(single.cpu(), changed.t().float())


def test_only_whole_tensors_keep_it_in_a_clone() -> None:
    values = matrix(3, 20, 40, dtype=torch.int8)
    fractal = torch_npu.npu_format_cast(values.npu(), FRACTAL_NZ)
    whole, part = fractal.clone(), fractal[1].clone()
    fractal.copy_(values + 1)
    assert (torch_npu.get_npu_format(whole), torch_npu.get_npu_format(part)) == (FRACTAL_NZ, ND)
    assert torch.equal(whole.cpu(), values)
    assert torch.equal(part.cpu(), values[1])
    assert torch.equal(fractal.transpose(1, 2).contiguous().cpu(), (values + 1).transpose(1, 2))


def test_bytes_of_it_can_be_seen_as_another_type() -> None:
    """As int4 numbers are, of which a byte holds two, and an operator wants to see eight in an int32."""
    values = matrix(3, 20, 40, dtype=torch.int8)
    packed = torch_npu.npu_format_cast(values.npu(), FRACTAL_NZ).view(torch.int32)
    assert packed.shape == (3, 20, 10)
    assert torch_npu.get_npu_format(packed) == FRACTAL_NZ
    assert torch.equal((packed + 0).cpu(), values.view(torch.int32))
    assert torch.equal((packed[2].t() + 0).cpu(), values.view(torch.int32)[2].t())


def test_padding_takes_memory() -> None:
    torch.npu.synchronize()
    before = torch.npu.memory_allocated()
    fractal = torch_npu.npu_format_cast(torch.zeros(3, 1025, 4097, dtype=torch.int8).npu(), FRACTAL_NZ)
    padded = 3 * 1040 * 4128
    assert fractal.untyped_storage().nbytes() == padded
    assert fractal.nbytes == 3 * 1025 * 4097
    assert padded <= torch.npu.memory_allocated() - before < padded + 4096


def test_operators_that_torch_npu_does_not_let_read_it_refuse_it() -> None:
    fractal = torch_npu.npu_format_cast(matrix(32, 32).npu(), FRACTAL_NZ)
    for refused in (
        lambda: torch_npu.npu_rms_norm(fractal, matrix(32).npu()),
        lambda: torch_npu.npu_rms_norm(matrix(2, 32).npu(), fractal),
        lambda: torch._foreach_add([fractal], 1),
        fractal.sort,
    ):
        with pytest.raises(RuntimeError, match=r"format of \w+ is FRACTAL_NZ, but must be ND"):
            refused()


def test_without_internal_formats_a_cast_changes_nothing() -> None:
    torch.npu.config.allow_internal_format = False
    cast = torch_npu.npu_format_cast(matrix(20, 40).npu(), FRACTAL_NZ)
    assert torch_npu.get_npu_format(cast) == ND
