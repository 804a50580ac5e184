"""Gradients equal the CPU's."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch_npu
from torch import nn

Loss = Callable[[nn.Module, torch.Tensor], torch.Tensor]


def test_a_small_network_learns_the_same() -> None:
    torch.manual_seed(0)
    on_cpu = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 4), nn.LogSoftmax(-1))
    on_npu = copy.deepcopy(on_cpu).npu()
    inputs, targets = torch.randn(32, 8), torch.randint(4, (32,))
    for model, device in ((on_cpu, "cpu"), (on_npu, "npu")):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        for _ in range(5):
            optimizer.zero_grad()
            nn.functional.nll_loss(model(inputs.to(device)), targets.to(device)).backward()
            optimizer.step()
    for ours, theirs in zip(on_npu.parameters(), on_cpu.parameters(), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=0)


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: torch.nn.functional.scaled_dot_product_attention(x, x, x).sum(),
        lambda x: nn.functional.conv1d(x, x[:, :, :3]).square().sum(),
        lambda x: x[x > 0].sum() * x[:, 0, 1:].max(dim=-1).values.prod(),
        lambda x: nn.functional.batch_norm(x, None, None, training=True).cumsum(-1).norm(),
        lambda x: torch.einsum("bij,bkj->bik", x, x).softmax(-1).std(),
        lambda x: nn.functional.interpolate(x, scale_factor=2, mode="linear").abs().mean(),
    ],
    ids=["attention", "convolution", "indexing", "batch norm", "einsum", "interpolate"],
)
def test_gradients_equal_the_cpus(loss: Callable[[torch.Tensor], torch.Tensor]) -> None:
    torch.manual_seed(1)
    on_cpu = torch.randn(2, 4, 8, requires_grad=True)
    on_npu = on_cpu.detach().npu().requires_grad_()
    loss(on_cpu).backward()
    loss(on_npu).backward()
    torch.testing.assert_close(on_npu.grad.cpu(), on_cpu.grad, rtol=0, atol=0)


def test_changing_what_a_gradient_needs_is_noticed() -> None:
    a = torch.ones(3, device="npu", requires_grad=True)
    b = a * 2
    squared = b.square()
    b.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.sum().backward()


@pytest.mark.usefixtures("errors_told_at_once")
def test_operators_of_torch_npu_have_no_gradient_here_and_say_so() -> None:
    x = torch.ones(2, 8, device="npu", requires_grad=True)
    normalised, _ = torch_npu.npu_rms_norm(x, torch.ones(8, device="npu"))
    assert normalised.requires_grad
    with pytest.raises(RuntimeError, match="RmsNormGrad"):
        normalised.sum().backward()
