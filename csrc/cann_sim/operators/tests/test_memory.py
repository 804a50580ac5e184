"""Memory of the device: whose it is, how it is counted, and what happens when it ends."""

from __future__ import annotations

import pytest
import torch
import torch_npu

MIB = 1 << 20


def device_bytes() -> int:
    return int(torch.npu.memory_allocated())


def test_a_result_is_device_memory_and_was_not_copied_into_it() -> None:
    a = torch.zeros(MIB, device="npu")
    before = device_bytes()
    torch.npu.reset_peak_memory_stats()
    b = a + a
    assert 4 * MIB <= device_bytes() - before < 5 * MIB
    assert torch.npu.max_memory_allocated() == device_bytes()
    assert b.device == torch.device("npu:0")
    del b
    assert device_bytes() == before


def test_what_an_operator_needs_meanwhile_is_counted_and_given_back() -> None:
    a = torch.rand(4 * MIB, device="npu")
    before = device_bytes()
    torch.npu.reset_peak_memory_stats()
    a.sort()
    assert torch.npu.max_memory_allocated() - before >= (4 + 8) * 4 * MIB
    assert device_bytes() == before


def test_an_operator_runs_out_of_memory_and_later_does_not() -> None:
    half = torch.npu.get_device_properties(0).total_memory // 2
    a = torch.empty(half, dtype=torch.uint8, device="npu")
    with pytest.raises(torch.OutOfMemoryError, match="NPU out of memory"):
        a + 1
    small = torch.ones(1000, device="npu")
    assert float((small + 1).sum()) == 2000


def test_host_tensors_are_not_counted() -> None:
    before = device_bytes()
    host = torch.ones(MIB) + 1
    assert device_bytes() == before
    assert host.device.type == "cpu"


def test_an_output_is_resized_on_the_device() -> None:
    a = torch.arange(6.0, device="npu")
    output = torch.empty(0, device="npu")
    returned = torch.add(a, 1, out=output)
    assert returned is output
    assert output.tolist() == [1, 2, 3, 4, 5, 6]
    assert output.untyped_storage().nbytes() == 24
    output.resize_(2, 3)
    assert (output * 2).tolist() == [[2, 4, 6], [8, 10, 12]]


def test_storages_are_described_for_torch_npu() -> None:
    a = torch.ones(3, 5, device="npu") @ torch.ones(5, 7, device="npu")
    assert torch_npu.get_npu_format(a) == torch_npu.Format.ND
    images = torch.zeros(1, 2, 3, 4, device="npu")
    assert torch_npu.get_npu_format(images + 1) == torch_npu.get_npu_format(torch.empty_like(images))
    assert torch_npu.get_storage_size(a) == 21
    assert torch_npu.get_storage_size(torch.cat([a, a])) == 42


def test_views_of_results_share_their_memory() -> None:
    a = torch.zeros(4, 4, device="npu") + 1
    parts = a.unbind(0)
    parts[1].add_(1)
    a.t()[3].fill_(7)
    assert a.tolist() == [[1, 1, 1, 7], [2, 2, 2, 7], [1, 1, 1, 7], [1, 1, 1, 7]]
    assert parts[1].untyped_storage().data_ptr() == a.untyped_storage().data_ptr()
    values, _ = torch.topk(a, 2)
    assert values.untyped_storage().data_ptr() != a.untyped_storage().data_ptr()


def test_two_arguments_on_one_memory_are_recognised() -> None:
    a = torch.arange(6.0, device="npu")
    with pytest.raises(RuntimeError, match="refer to a single memory location"):
        torch.add(a[:-1], 1, out=a[1:])


def test_a_result_is_on_its_arguments_device() -> None:
    a = torch.ones(4, device="npu:1")
    before = device_bytes()
    assert (a + a).device == torch.device("npu:1")
    assert torch.npu.current_device() == 0
    assert device_bytes() == before
