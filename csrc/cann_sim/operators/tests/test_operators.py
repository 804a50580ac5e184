"""ATen's operators on the device: arguments, results, copies, refusals. (Their values are test_opinfo's subject.)"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

DTYPES = [torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.uint8, torch.bool, torch.complex64]


def test_operators_in_place_return_their_argument() -> None:
    a = torch.ones(3, device="npu")
    assert a.add_(1) is a
    assert a.clamp_(max=1.5).tolist() == [1.5] * 3


def test_lists_of_tensors_are_taken_and_returned() -> None:
    parts = [torch.full((2,), float(i), device="npu") for i in range(3)]
    torch._foreach_add_(parts, 1)
    assert torch.stack(parts).tolist() == [[1, 1], [2, 2], [3, 3]]
    assert [each.tolist() for each in torch._foreach_mul(parts, 2)] == [[2, 2], [4, 4], [6, 6]]
    rows, columns = torch.meshgrid(parts[0], parts[1], indexing="ij")
    assert rows.device.type == columns.device.type == "npu"


def test_numbers_on_the_host_mix_with_tensors_on_the_device() -> None:
    a = torch.ones(2, device="npu")
    assert (a * torch.tensor(3.0)).tolist() == [3, 3]
    assert a.device == (torch.tensor(3.0) * a).device


@pytest.mark.parametrize(
    "mix",
    [
        lambda npu, cpu: npu + cpu,
        lambda npu, cpu: torch.cat([npu, cpu]),
        lambda npu, cpu: torch.where(npu > 0, npu, cpu),
        lambda npu, cpu: torch.add(npu, npu, out=cpu),
    ],
    ids=["add", "cat", "where", "out"],
)
def test_tensors_on_the_host_do_not(mix: Callable[[torch.Tensor, torch.Tensor], object]) -> None:
    with pytest.raises(RuntimeError, match=r"on the same device.*npu:0 and cpu"):
        mix(torch.ones(2, device="npu"), torch.ones(2))


def test_tensors_on_two_devices_do_not_mix() -> None:
    with pytest.raises(RuntimeError, match=r"on the same device.*npu:0 and npu:1"):
        torch.ones(2, device="npu:0") + torch.ones(2, device="npu:1")


def test_indices_may_be_on_the_host() -> None:
    a = torch.arange(4.0, device="npu")
    assert a[torch.tensor([3, 1])].tolist() == [3, 1]
    a[torch.tensor([True, False, False, True])] = 9
    assert a.tolist() == [9, 1, 2, 9]
    assert a[a > 5].tolist() == [9, 9]


def test_tensors_are_made_where_they_are_wanted() -> None:
    a = torch.ones(2, device="npu:1")
    assert torch.zeros_like(a, device="cpu").device.type == "cpu"
    assert torch.full_like(a, 3, device="npu:0").device == torch.device("npu:0")
    assert torch.full_like(a, 3).device == a.device
    assert torch.arange(3, device="npu").device == torch.device("npu:0")
    assert a.new_tensor([1, 2]).device == a.device


@pytest.mark.filterwarnings("ignore:Casting complex values to real")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_copies_convert(dtype: torch.dtype) -> None:
    values = torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]])
    expected = values.to(dtype)
    assert torch.equal(values.npu().to(dtype).cpu(), expected)
    assert torch.equal(values.to("npu", dtype).cpu(), expected)
    assert torch.equal(expected.npu().float().cpu(), expected.float())


@pytest.mark.parametrize("source", ["cpu", "npu:0"])
@pytest.mark.parametrize("target", ["cpu", "npu:0", "npu:1"])
def test_copies_of_strided_tensors(source: str, target: str) -> None:
    values = torch.arange(12.0).view(3, 4)
    into = torch.zeros(4, 6, dtype=torch.float64, device=target)
    into[:, ::2].copy_(values.to(source).t())
    assert torch.equal(into[:, ::2].cpu(), values.t().double())
    assert not into[:, 1::2].any()
    assert torch.equal(values.to(source)[:, 1:3].to(target).cpu(), values[:, 1:3])
    into.copy_(torch.ones(6, device=source))
    assert bool((into == 1).all())


def test_copies_to_pinned_memory_and_back() -> None:
    pinned = torch.zeros(4, pin_memory=True)
    pinned.copy_(torch.arange(4.0, device="npu"), non_blocking=True)
    torch.npu.current_stream().synchronize()
    assert pinned.to("npu", non_blocking=True).tolist() == [0, 1, 2, 3]


def test_conjugates_are_resolved() -> None:
    a = torch.tensor([1 + 2j, 3 - 1j])
    assert torch.equal((a.npu().conj() * 2).cpu(), a.conj() * 2)
    assert torch.equal(a.npu().conj().cpu(), a.conj())


def test_inference_mode_works() -> None:
    with torch.inference_mode():
        a = torch.ones(2, 3, device="npu")
        b = (a @ a.t()).view(-1)[1:]
        b.mul_(2)
    assert b.tolist() == [6, 6, 6]
    assert b.is_inference()


def test_autocast_chooses_dtypes() -> None:
    a = torch.ones(4, 4, device="npu")
    with torch.autocast("npu", torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16
        assert functional.softmax(a @ a, -1).dtype == torch.float32


def test_complaints_are_the_cpus() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        torch.ones(2, 3, device="npu") @ torch.ones(2, 3, device="npu")


def test_what_is_not_simulated_fails_by_name() -> None:
    a = torch.ones(2, 2, device="npu")
    with pytest.raises(RuntimeError, match=r"sparse.*not simulated"):
        a.to_sparse()
    with pytest.raises(RuntimeError, match="aclnnGelu"):
        torch.ops.npu.npu_gelu(a)
