"""PyTorch's own samples of its operators: what the simulated NPU computes equals what the CPU computes, bit for bit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice

import pytest
import torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import OpInfo, SampleInput
from torch.utils._pytree import tree_leaves, tree_map

pytestmark = pytest.mark.filterwarnings("ignore")  # some samples are of what is deprecated

SAMPLES = 3
"""How many samples of each operator and dtype are tried; the first ones are the ordinary ones."""
DTYPES = (torch.float32, torch.int64)

STRIDES_BY_SHAPE_KERNEL = {"fft_rfftn", "nonzero_static"}
"""torch's kernel for shapes, which is asked with torch-npu's queue, gives these other strides than its CPU kernel."""
UNDEFINED_CONTENT = {"empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided"}
EXCEPTIONS = {
    "as_strided_partial_views": "the samples look beyond what a copy to a device copies",
    "sparse_mm_reduce": "sparse tensors are not simulated",
    "sparse_sampled_addmm": "sparse tensors are not simulated",
    "tensor_split": "some samples have their indices in a tensor, which must be on the host",
    "to": "torch-npu makes no tensors in other memory formats",
    "to_sparse": "sparse tensors are not simulated",
} | dict.fromkeys((op.formatted_name for op in op_db if op.name.startswith("jiterator")), "for CUDA only")


def cases() -> Iterator[pytest.ParameterSet]:
    for op in op_db:
        for dtype in DTYPES:
            if dtype in op.supported_dtypes("cpu"):
                yield pytest.param(op, dtype, id=f"{op.formatted_name}-{str(dtype).removeprefix('torch.')}")


@pytest.mark.parametrize(("op", "dtype"), cases())
def test_results_equal_the_cpus(op: OpInfo, dtype: torch.dtype) -> None:
    if reason := EXCEPTIONS.get(op.formatted_name):
        pytest.skip(reason)
    for sample in islice(op.sample_inputs("cpu", dtype), SAMPLES):
        on_npu = tree_map(to_npu, (sample.input, sample.args, sample.kwargs))
        expected, found = run(op, sample), run(op, SampleInput(on_npu[0], args=on_npu[1], kwargs=on_npu[2]))
        assert all(each.device.type == "npu" for each in tree_leaves(found) if isinstance(each, torch.Tensor))
        if op.name in UNDEFINED_CONTENT:
            expected, found = tree_map(shape_of, expected), tree_map(shape_of, found)
        made_by_shape = op.formatted_name in STRIDES_BY_SHAPE_KERNEL and os.environ.get("TASK_QUEUE_ENABLE") != "0"
        check_equal(found, expected, with_strides=not made_by_shape)


def run(op: OpInfo, sample: SampleInput) -> object:
    torch.manual_seed(1)
    return op(sample.input, *sample.args, **sample.kwargs)


def to_npu(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return value.detach().npu().requires_grad_(value.requires_grad)
    if value == "cpu" or value == torch.device("cpu"):
        return "npu"
    return value


def shape_of(value: object) -> object:
    return torch.tensor((*value.shape, *value.stride())) if isinstance(value, torch.Tensor) else value


def check_equal(found: object, expected: object, *, with_strides: bool = True) -> None:
    found_leaves, expected_leaves = tree_leaves(found), tree_leaves(expected)
    assert len(found_leaves) == len(expected_leaves)
    for one, other in zip(found_leaves, expected_leaves, strict=True):
        if isinstance(other, torch.Tensor):
            assert not with_strides or one.stride() == other.stride()
            torch.testing.assert_close(one.cpu(), other, rtol=0, atol=0, equal_nan=True)
        else:
            assert one == other


def differentiable() -> Iterator[pytest.ParameterSet]:
    for op in op_db:
        if op.supports_autograd and torch.float32 in op.supported_dtypes("cpu"):
            yield pytest.param(op, id=op.formatted_name)


@pytest.mark.parametrize("op", differentiable())
def test_gradients_equal_the_cpus(op: OpInfo) -> None:
    if reason := EXCEPTIONS.get(op.formatted_name):
        pytest.skip(reason)
    sample = next(iter(op.sample_inputs("cpu", torch.float32, requires_grad=True)))
    on_npu = tree_map(to_npu, (sample.input, sample.args, sample.kwargs))
    expected = gradients(op, sample)
    found = gradients(op, SampleInput(on_npu[0], args=on_npu[1], kwargs=on_npu[2]))
    check_equal(found, expected)


def gradients(op: OpInfo, sample: SampleInput) -> list[torch.Tensor]:
    inputs = [
        each
        for each in tree_leaves((sample.input, sample.args, sample.kwargs))
        if isinstance(each, torch.Tensor) and each.requires_grad
    ]
    outputs = [each for each in tree_leaves(run(op, sample)) if isinstance(each, torch.Tensor) and each.requires_grad]
    if not outputs or not inputs:
        return []
    found = torch.autograd.grad([each.abs().sum() for each in outputs], inputs, allow_unused=True)
    return [each for each in found if each is not None]
