"""Graphs: operators are captured into the genuine torch.npu.NPUGraph, and repeated by it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch_npu
from cann_sim_operators import aicpu_operators


def capture(function: Callable[[], object]) -> tuple[torch.npu.NPUGraph, object]:
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        result = function()
    return graph, result


def test_a_replay_computes_from_what_the_memory_holds_now() -> None:
    x, weight = torch.rand(4, 8, device="npu"), torch.rand(8, 8, device="npu")

    def compute(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.softmax(x @ weight, -1), x.sort().values])[1:, ::2].contiguous()

    graph, result = capture(lambda: compute(x, weight))
    for seed in range(3):
        x.copy_(torch.rand(4, 8, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        torch.testing.assert_close(result.cpu(), compute(x.cpu(), weight.cpu()), rtol=0, atol=0)


def test_operators_in_place_and_copies_are_repeated() -> None:
    counter, history = torch.zeros(1, device="npu"), torch.zeros(3, device="npu")
    narrow = torch.zeros(1, dtype=torch.float16, device="npu")

    def step() -> None:
        counter.add_(1)
        history.copy_(torch.cat([history[1:], counter]))
        narrow.copy_(counter)

    graph, _ = capture(step)
    for _ in range(4):
        graph.replay()
    assert counter.item() == 5
    assert history.tolist() == [3, 4, 5]
    assert narrow.item() == 5


def test_torch_npus_own_operators_are_captured() -> None:
    x, weight = torch.ones(2, 16, device="npu").half(), torch.ones(16, device="npu").half()
    slots = torch.tensor([0], dtype=torch.int32, device="npu")
    cache = torch.zeros(1, 4, 1, 16, device="npu").half()

    def step() -> torch.Tensor:
        normalised = torch_npu.npu_rms_norm(x, weight)[0]
        torch_npu.npu_scatter_pa_kv_cache(
            normalised[:1].view(1, 1, 16), normalised[:1].view(1, 1, 16), cache, cache.clone(), slots, cache_mode="Norm"
        )
        return torch_npu.npu_swiglu(normalised)

    graph, result = capture(step)
    x.copy_(torch.arange(32.0).view(2, 16))
    slots.fill_(3)
    graph.replay()
    normalised = torch_npu.npu_rms_norm(x, weight)[0]
    assert torch.equal(cache[0, 3, 0], normalised[0])
    assert torch.equal(result, torch_npu.npu_swiglu(normalised))


def test_numbers_of_the_host_are_captured_by_value() -> None:
    x, factor = torch.ones(2, device="npu"), torch.tensor(3.0)
    graph, result = capture(lambda: x * factor)
    factor.fill_(100)
    graph.replay()
    assert result.tolist() == [3, 3]


def test_a_replay_draws_what_the_operators_would_have_drawn() -> None:
    x = torch.rand(20, device="npu")
    draw = lambda: [torch.rand(5, device="npu"), torch.nn.functional.dropout(x), torch.bernoulli(x)]  # noqa: E731
    graph, captured = capture(draw)
    torch.npu.manual_seed(11)
    eager = [draw(), draw()]
    torch.npu.manual_seed(11)
    for expected in eager:
        graph.replay()
        assert all(map(torch.equal, captured, expected))


def test_memory_of_a_graph_is_its_own() -> None:
    x = torch.ones(1 << 20, device="npu")
    graph, result = capture(lambda: (x + 1) * 2)
    others = [torch.full_like(x, 7) for _ in range(3)]
    graph.replay()
    assert bool((result == 4).all())
    assert all(bool((each == 7).all()) for each in others)


def test_a_graph_on_another_device_and_stream() -> None:
    with torch.npu.device(1):
        x = torch.ones(3, device="npu:1")
        stream = torch.npu.Stream()
        graph = torch.npu.NPUGraph()
        with torch.npu.graph(graph, stream=stream):
            result = x * 2
        x.fill_(5)
        graph.replay()
        assert result.tolist() == [10, 10, 10]


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.cpu(),
        lambda x: x.sum().item(),
        lambda x: x[torch.tensor([0, 1])],
        lambda x: x.copy_(torch.ones(4, dtype=torch.float64)),
    ],
    ids=["nonzero", "mask", "cpu", "item", "index on the host", "conversion from the host"],
)
def test_what_makes_the_host_wait_cannot_be_captured(wait: Callable[[torch.Tensor], object]) -> None:
    x = torch.ones(4, device="npu")
    with pytest.raises(RuntimeError, match="captur"):
        capture(lambda: wait(x))
    assert (x + 1).tolist() == [2, 2, 2, 2]


def test_a_replay_that_fails_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    slots = torch.tensor([0], dtype=torch.int32, device="npu")
    rows, cache = torch.ones(1, 1, 16, device="npu").half(), torch.zeros(1, 4, 1, 16, device="npu").half()
    graph, _ = capture(
        lambda: torch_npu.npu_scatter_pa_kv_cache(rows, rows, cache, cache.clone(), slots, cache_mode="Norm")
    )
    slots.fill_(4)
    with pytest.raises(RuntimeError):
        graph.replay()
    assert "replay of npu::npu_scatter_pa_kv_cache" in capfd.readouterr().err


def test_operators_on_aicpu_are_counted_and_give_a_warning_in_a_capture() -> None:
    before = aicpu_operators()
    edges, values = torch.arange(4, device="npu"), torch.ones(4, device="npu")
    edges.sort()
    values.sort()
    values.cumsum(0)
    with pytest.warns(UserWarning, match="aten::searchsorted of Long is being captured"):
        capture(lambda: torch.searchsorted(edges, edges))
    after = aicpu_operators()
    assert {name: count - before.get(name, 0) for name, count in after.items() if count != before.get(name, 0)} == {
        "aten::sort": 1,
        "aten::searchsorted": 1,
    }
