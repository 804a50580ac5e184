"""The layers of experts, as grouped matrix products; here those without quantisation, and what all of them share.

A token's row is copied once for each of its experts, the copies lie sorted by expert, and one operator multiplies every
group by its expert's matrix. How long the groups are, only the device knows, so that the host does not wait and the
whole can be captured in a graph.

Where experts are divided among devices (expert parallel), a device gets all tokens and computes the routes to its own
experts. The operators keep the shapes of all routes, and leave the rows behind its own as they find them: what those
hold is undefined, and may be NaN. The last operator reads no row whose weight is 0. Its documentation wants indices
within the rows; its source shows that it reads nothing for a weight of 0, and others depend on that as well.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from vllm.model_executor.custom_op import CustomOp
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

import vllm_ascend.ops.routing  # noqa: F401  makes the routers

COUNTS = 1
"""How the groups' lengths are told: each by itself, not as running totals."""
UNQUANTISED, DYNAMIC = -1, 1
"""What npu_moe_init_routing_v2 does with the rows that it copies."""


class Range(NamedTuple):
    """The experts of a device, from `first` to before `end`, of `total`."""

    first: int
    end: int
    total: int


class NPUUnquantizedFusedMoEMethod(UnquantizedFusedMoEMethod):
    @property
    def is_monolithic(self) -> bool:
        """The layer's router chooses the experts before."""
        return False

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        """Raises ValueError for a layer that computes in a way not written for NPUs."""
        refuse_unsupported_experts(layer, self.moe)
        super().create_weights(layer, *args, **kwargs)

    def apply(  # noqa: PLR0917
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any = None,
        shared_experts_input: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return run_experts(x, topk_weights, topk_ids, layer.w13_weight, layer.w2_weight, own_experts(self.moe))


def refuse_unsupported_experts(layer: Any, moe: Any) -> None:
    """Raises ValueError for a layer that computes in a way not written for NPUs, with quantised weights or others."""
    unsupported = {
        "router weights on the input": layer.apply_router_weight_on_input,
        f"the activation {layer.activation.value}": layer.activation != MoEActivation.SILU,
        "a limit of the activation": layer.swiglu_limit is not None,
        "biases": moe.has_bias,
        f"placement {layer.expert_placement_strategy}": layer.expert_placement_strategy != "linear",
    }
    if reasons := [name for name, wanted in unsupported.items() if wanted]:
        raise ValueError(f"{layer.layer_name}: experts with {', '.join(reasons)} are not supported on NPUs")


def own_experts(moe: Any) -> Range | None:
    """Those of this device, if others have some: vLLM gives each device as many, and the first ones one more."""
    if not moe.use_ep:
        return None
    each, rest = divmod(moe.num_experts, moe.ep_size)
    first = moe.ep_rank * each + min(moe.ep_rank, rest)
    return Range(first, first + moe.num_local_experts, moe.num_experts)


class Routed(NamedTuple):
    """Rows of tokens, sorted by expert, of which there are `lengths`.

    `positions` says where the rows of a token are, one for each of its experts. Quantised rows have `scales`.
    """

    rows: torch.Tensor
    positions: torch.Tensor
    lengths: torch.Tensor
    scales: torch.Tensor


def run_experts(  # noqa: PLR0917
    x: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    own: Range | None = None,
) -> torch.Tensor:
    """The weighted sum over those of each token's experts that are here; all are, if `own` is not given.

    `weights` and `experts`, in int32, are [tokens, experts of a token]; `w13` and `w2` have the experts that are here.
    """
    routed = route(x, experts, own or Range(0, len(w13), len(w13)))
    hidden = torch.ops.npu.npu_swiglu(_grouped_product(routed.rows, w13, routed.lengths))
    results = _grouped_product(hidden, w2, routed.lengths)
    return combine(results, routed.positions, weights, own)


def route(x: torch.Tensor, experts: torch.Tensor, here: Range, *, quantise: bool = False) -> Routed:
    """The rows of x for the experts that are here. If asked to, quantises each to int8 by its largest value."""
    rows, positions, lengths, scales = torch.ops.npu.npu_moe_init_routing_v2(
        x,
        experts,
        active_num=experts.numel(),
        expert_num=here.total,
        expert_tokens_num_type=COUNTS,
        expert_tokens_num_flag=True,
        quant_mode=DYNAMIC if quantise else UNQUANTISED,
        active_expert_range=[here.first, here.end],
    )
    return Routed(rows, positions, lengths, scales)


def combine(
    results: torch.Tensor, positions: torch.Tensor, weights: torch.Tensor, own: Range | None = None
) -> torch.Tensor:
    """For each token the sum of its rows among `results`, times their weights; without rows of others' experts."""
    if own is not None:
        weights = weights.masked_fill(positions.view(weights.shape) < 0, 0)
        positions = positions.clamp_min(0)
    total_of_token: torch.Tensor = torch.ops.npu.npu_moe_token_unpermute(results, positions, weights)
    return total_of_token


def _grouped_product(rows: torch.Tensor, matrices: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Groups of rows, of these lengths, times the transposes of the matrices."""
    product: torch.Tensor = torch.ops.npu.npu_grouped_matmul(
        [rows], [matrices.transpose(1, 2)], group_list=lengths, split_item=2, group_type=0, group_list_type=COUNTS
    )[0]
    return product


CustomOp.register_oot(NPUUnquantizedFusedMoEMethod, name=UnquantizedFusedMoEMethod.__name__)
NPUUnquantizedFusedMoEMethod.name = UnquantizedFusedMoEMethod.name
