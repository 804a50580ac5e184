"""Random numbers: torch-npu's generators rule."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional


def test_the_first_numbers_after_a_seed_are_the_cpus() -> None:
    torch.manual_seed(7)
    expected = torch.randn(100)
    torch.manual_seed(7)
    assert torch.equal(torch.randn(100, device="npu").cpu(), expected)


def test_a_seed_repeats_all_that_follows() -> None:
    def draw() -> list[torch.Tensor]:
        a = torch.rand(50, device="npu")
        return [a, torch.bernoulli(a), functional.dropout(a), torch.randperm(9, device="npu"), torch.multinomial(a, 5)]

    torch.npu.manual_seed(3)
    first = draw()
    second = draw()
    torch.npu.manual_seed(3)
    assert all(map(torch.equal, first, draw()))
    assert not any(map(torch.equal, first, second))


def test_a_state_can_be_kept() -> None:
    state = torch.npu.get_rng_state()
    first = torch.rand(5, device="npu")
    torch.npu.set_rng_state(state)
    assert torch.equal(torch.rand(5, device="npu"), first)


def test_generators_are_independent() -> None:
    generator = torch.Generator("npu").manual_seed(1)
    first = torch.rand(5, device="npu", generator=generator)
    torch.rand(5, device="npu")
    generator.manual_seed(1)
    assert torch.equal(torch.rand(5, device="npu", generator=generator), first)
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(5, device="npu", generator=torch.Generator())


def test_the_hosts_generator_is_left_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(5)
    torch.manual_seed(1)
    functional.dropout(torch.ones(50, device="npu"))
    torch.ops.aten.native_dropout(torch.ones(50, device="npu"), 0.5, True)
    torch.rand(5, device="npu")
    assert torch.equal(torch.rand(5), expected)
