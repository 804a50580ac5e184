"""vLLM's layers and functions on an NPU: torch_npu's operators stand in, and give what vLLM's plain torch gives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from support.operators import operators_of

NPU = "npu:0"
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(scope="module", autouse=True)
def _vllm_is_configured() -> Iterator[None]:
    """As in a worker: layers ask for the configuration when they are made."""
    from vllm.config import VllmConfig, set_current_vllm_config

    import vllm_ascend.ops.experts
    import vllm_ascend.ops.layers  # noqa: F401

    config = VllmConfig()
    with set_current_vllm_config(config), config.kernel_config.ir_op_priority.set_priority():
        yield


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The operators of torch_npu that have been called."""
    names: set[str] = set()
    namespace = torch.ops.npu

    class Watch:
        def __getattr__(self, name: str) -> Any:
            names.add(name)
            return getattr(namespace, name)

    monkeypatch.setattr(torch.ops, "npu", Watch())
    return names


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype).to(NPU)


def assert_close(ours: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance: dict[str, Any] = (
        {"rtol": 2e-2, "atol": 2e-2} if ours.dtype.itemsize == 2 else {"rtol": 1e-5, "atol": 1e-5}
    )
    torch.testing.assert_close(ours.cpu(), expected.cpu(), **tolerance)


@pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES.keys())
def test_rms_norm(dtype: torch.dtype, used: set[str]) -> None:
    from vllm import ir
    from vllm.model_executor.layers.layernorm import RMSNorm

    norm = RMSNorm(192, eps=1e-5, dtype=dtype).to(NPU)
    norm.weight.data.copy_(random(192))
    x, residual = random(7, 192, dtype=dtype), random(7, 192, dtype=dtype) * 2
    with torch.no_grad():
        ours, both = norm(x), norm(x.clone(), residual.clone())
        assert used == {"npu_rms_norm", "npu_add_rms_norm"}
        with ir.ops.rms_norm.set_priority(["native"]), ir.ops.fused_add_rms_norm.set_priority(["native"]):
            assert_close(ours, norm(x))
            for each, expected in zip(both, norm(x.clone(), residual.clone()), strict=True):
                assert_close(each, expected)


def test_a_norm_that_the_operator_cannot_do_is_plain_torch(used: set[str]) -> None:
    from vllm.model_executor.layers.layernorm import RMSNorm

    x = random(3, 64)
    for norm in (RMSNorm(64, has_weight=False), RMSNorm(64, var_hidden_size=32).to(NPU)):
        expected = x * torch.rsqrt(x[:, : norm.variance_size_override].pow(2).mean(-1, keepdim=True) + 1e-6)
        assert_close(norm(x), expected)
    assert used == set()


@pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES.keys())
def test_silu_and_mul(dtype: torch.dtype, used: set[str]) -> None:
    from vllm.model_executor.layers.activation import SiluAndMul

    layer, x = SiluAndMul(), random(9, 96, dtype=dtype)
    assert_close(layer(x), layer.forward_native(x))
    assert used == {"npu_swiglu"}


LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
FUSED = {"npu_mrope"}
ROTARY: dict[str, tuple[int, dict[str, Any], set[str]]] = {
    "heads of 64": (64, {}, FUSED),
    "heads of 128": (128, {}, FUSED),
    "heads of 96": (96, {}, FUSED),
    "Llama 3": (64, {"rope_parameters": LLAMA_3}, FUSED),
    "YaRN": (128, {"rope_parameters": YARN}, FUSED),
    "a part of each head": (128, {"rope_parameters": {"partial_rotary_factor": 0.5}}, FUSED),
    "neighbouring values turned": (64, {"is_neox_style": False}, FUSED),
    "heads of an odd size": (40, {}, set()),
    "too many heads": (256, {"heads": 30}, set()),
}


@pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES.keys())
@pytest.mark.parametrize(("size", "arguments", "operators"), ROTARY.values(), ids=ROTARY.keys())
def test_rotary_embedding(
    size: int, arguments: dict[str, Any], operators: set[str], dtype: torch.dtype, used: set[str]
) -> None:
    from vllm.model_executor.layers.rotary_embedding import get_rope

    arguments = {"is_neox_style": True, **arguments}
    heads = arguments.pop("heads", 3)
    parameters = {"rope_theta": 10000.0, **arguments.pop("rope_parameters", {})}
    rope = get_rope(size, 256, **arguments, rope_parameters=parameters, dtype=dtype).to(NPU)
    positions = torch.tensor([0, 1, 250, 3, 17], device=NPU)
    projected = random(5, (heads + 3) * size, dtype=dtype)
    query, key, _ = projected.split((heads * size, 2 * size, size), dim=-1)  # not contiguous, as in a model
    expected = rope.forward_native(positions, query.clone(), key.clone())
    for ours, native in zip(rope(positions, query, key), expected, strict=True):
        assert_close(ours, native)
    assert used == operators


def test_rotary_embedding_of_queries_alone(used: set[str]) -> None:
    from vllm.model_executor.layers.rotary_embedding import get_rope

    rope = get_rope(64, 256, rope_parameters={"rope_theta": 10000.0}, dtype=torch.float32).to(NPU)
    positions, query = torch.arange(5, device=NPU), random(5, 64)
    ours, nothing = rope(positions, query)
    assert_close(ours, rope.forward_native(positions, query)[0])
    assert nothing is None
    assert used == set()


GROUPED = {"use_grouped_topk": True, "num_expert_group": 4, "topk_group": 2}
PLAIN, CHOSEN = {"npu_moe_gating_top_k_softmax_v2"}, {"npu_moe_gating_top_k"}
ROUTERS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "softmax": ({"renormalize": False}, PLAIN),
    "softmax, normalised": ({}, PLAIN),
    "softmax in groups": ({**GROUPED, "routed_scaling_factor": 2.5}, CHOSEN),
    "softmax in groups, not normalised": (
        {**GROUPED, "renormalize": False, "routed_scaling_factor": 16.0},
        CHOSEN,
    ),
    "sigmoid, not normalised": (
        {**GROUPED, "scoring_func": "sigmoid", "renormalize": False, "e_score_correction_bias": True},
        CHOSEN,
    ),
    "softmax with a bias": ({**GROUPED, "e_score_correction_bias": True}, CHOSEN),
    "sigmoid in groups": ({**GROUPED, "scoring_func": "sigmoid"}, CHOSEN),
    "sigmoid with a bias": (
        {**GROUPED, "scoring_func": "sigmoid", "e_score_correction_bias": True, "routed_scaling_factor": 2.5},
        CHOSEN,
    ),
    "sigmoid in one group": (
        {"use_grouped_topk": True, "num_expert_group": 1, "topk_group": 1, "scoring_func": "sigmoid"},
        CHOSEN,
    ),
}


@pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES.keys())
@pytest.mark.parametrize(("arguments", "operators"), ROUTERS.values(), ids=ROUTERS.keys())
def test_routers(arguments: dict[str, Any], operators: set[str], dtype: torch.dtype, used: set[str]) -> None:
    from vllm.model_executor.layers.fused_moe.layer import create_fused_moe_router
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

    bias = random(16) if arguments.get("e_score_correction_bias") else None
    arguments = {"top_k": 3, "global_num_experts": 16, **arguments, "e_score_correction_bias": bias}
    logits = random(9, 16, dtype=dtype)
    weights, experts = create_fused_moe_router(**arguments).select_experts(logits, logits)
    assert used == operators
    assert (weights.dtype, experts.dtype) == (torch.float32, torch.int32)

    arguments["e_score_correction_bias"] = None if bias is None else bias.cpu()
    expected = torch.zeros(9, 16).scatter_(1, *_wide(CPURouter(**arguments), logits.float().cpu()))
    found = torch.zeros(9, 16).scatter_(1, experts.long().cpu(), weights.cpu())
    torch.testing.assert_close(found, expected)


def _wide(router: Any, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    weights, experts = router.select_experts(logits, logits)
    return experts.long(), weights


UNROUTABLE = {
    "sqrtsoftplus scores": {"scoring_func": "sqrtsoftplus"},
    "16 in 8 groups": {**GROUPED, "num_expert_group": 8},
    "a routing function of their own": {"custom_routing_function": print},
    "experts that compute nothing": {"zero_expert_type": "identity"},
}


@pytest.mark.parametrize(("reason", "arguments"), UNROUTABLE.items(), ids=UNROUTABLE.keys())
def test_a_router_that_no_operator_computes_is_refused(reason: str, arguments: dict[str, Any]) -> None:
    from vllm.model_executor.layers.fused_moe.layer import create_fused_moe_router

    with pytest.raises(ValueError, match=reason):
        create_fused_moe_router(**{"top_k": 3, "global_num_experts": 16, **arguments})


@pytest.mark.parametrize("own", [None, (0, 5), (5, 16), (15, 16)], ids=str)
@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES.keys())
def test_experts(tokens: int, own: tuple[int, int] | None, dtype: torch.dtype, used: set[str]) -> None:
    """Some experts get no token, and some devices none of a single token's routes."""
    from vllm_ascend.ops.experts import Range, run_experts

    count, hidden, inner = 16, 64, 48
    first, end = own or (0, count)
    w13, w2 = random(count, 2 * inner, hidden, dtype=dtype) / 8, random(count, hidden, inner, dtype=dtype) / 8
    x = random(tokens, hidden, dtype=dtype)
    weights, experts = random(tokens, count).softmax(-1).topk(3)
    expected = torch.zeros(tokens, hidden)
    for token in range(tokens):
        for weight, expert in zip(weights[token].tolist(), experts[token].tolist(), strict=True):
            if first <= expert < end:
                gate, up = (w13[expert].cpu().float() @ x[token].cpu().float()).chunk(2)
                expected[token] += weight * (w2[expert].cpu().float() @ (torch.nn.functional.silu(gate) * up))

    here = None if own is None else Range(first, end, count)
    found = run_experts(x, weights, experts.int(), w13[first:end], w2[first:end], here)
    assert_close(found, expected.to(dtype))
    assert used == {"npu_moe_init_routing_v2", "npu_grouped_matmul", "npu_swiglu", "npu_moe_token_unpermute"}


def test_few_operators_route_tokens_to_experts_and_back() -> None:
    """None of them runs on a device's AI CPUs, as sorting integers and searching do."""
    from vllm.model_executor.layers.fused_moe.layer import create_fused_moe_router

    from vllm_ascend.ops.experts import Range, run_experts

    x, logits = random(9, 64, dtype=torch.bfloat16), random(9, 16, dtype=torch.bfloat16)
    w13, w2 = random(16, 96, 64, dtype=torch.bfloat16), random(16, 64, 48, dtype=torch.bfloat16)
    router = create_fused_moe_router(top_k=3, global_num_experts=16)

    def layer(own: Range | None) -> torch.Tensor:
        here = slice(own.first, own.end) if own else slice(None)
        weights, experts = router.select_experts(x, logits)
        return run_experts(x, weights, experts, w13[here], w2[here], own)

    to_experts = ["to", "npu_moe_gating_top_k_softmax_v2", "npu_moe_init_routing_v2"]
    experts = ["npu_grouped_matmul", "npu_swiglu", "npu_grouped_matmul"]
    assert operators_of(lambda: layer(None)) == [*to_experts, *experts, "npu_moe_token_unpermute"]
    only_own = ["lt", "masked_fill", "clamp_min"]
    assert operators_of(lambda: layer(Range(4, 8, 16))) == [*to_experts, *experts, *only_own, "npu_moe_token_unpermute"]


def test_one_operator_turns_queries_and_keys() -> None:
    from vllm.model_executor.layers.rotary_embedding import get_rope

    rope = get_rope(64, 256, rope_parameters={"rope_theta": 10000.0}, dtype=torch.bfloat16).to(NPU)
    positions = torch.arange(5, device=NPU)
    query, key = random(5, 6 * 64, dtype=torch.bfloat16).split((4 * 64, 2 * 64), dim=-1)
    assert operators_of(lambda: rope(positions, query, key)) == ["contiguous", "contiguous", "npu_mrope"]


@pytest.mark.parametrize("devices", [2, 3])
def test_experts_are_divided_as_vllm_does(devices: int) -> None:
    """Among 3 devices, 16 experts are not the same number on each."""
    from types import SimpleNamespace

    from vllm.model_executor.layers.fused_moe.expert_map_manager import determine_expert_map

    from vllm_ascend.ops.experts import own_experts

    for rank in range(devices):
        count, here, _ = determine_expert_map(devices, rank, 16)
        moe = SimpleNamespace(use_ep=True, num_experts=16, num_local_experts=count, ep_size=devices, ep_rank=rank)
        own = own_experts(moe)
        assert here is not None
        assert own is not None
        assert (here >= 0).nonzero().flatten().tolist() == list(range(own.first, own.end))


def test_slots_are_found_for_tokens_and_padding() -> None:
    from vllm_ascend.ops.slot_mapping import compute_slot_mapping

    ends = torch.tensor([0, 3, 4, 6, 6], dtype=torch.int32, device=NPU)  # the last request only pads the batch
    positions = torch.tensor([126, 127, 128, 5, 300, 301], device=NPU)
    blocks = torch.tensor([[7, 2, 0], [4, 0, 0], [9, 8, 1], [5, 5, 5]], dtype=torch.int32, device=NPU)
    slots = torch.full((10,), 77, device=NPU)
    compute_slot_mapping(6, 9, ends, positions, blocks, 3, slots, 128, 1, 0, 1, -1, 1024)
    in_order = [7 * 128 + 126, 7 * 128 + 127, 2 * 128, 4 * 128 + 5, 128 + 44, 128 + 45]
    assert slots.tolist() == [*in_order, -1, -1, -1, 77]
