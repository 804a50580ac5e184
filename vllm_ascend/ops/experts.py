"""Mixtures of experts without quantisation: routing, and the experts' layers as grouped matrix products.

vLLM leaves both to a platform of its own. Each token's row is copied once for each of its experts, the copies are
sorted by expert, and one operator multiplies every group by its expert's matrix. How long the groups are, only the
device knows, so that the host does not wait and the whole can be captured in a graph.

Where experts are divided among devices (expert parallel), a device gets all tokens and computes all routes: those of
other devices' experts go through one of its own and count nothing, because the operator takes no rows without a group.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.custom_op import CustomOp
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod


class NPUUnquantizedFusedMoEMethod(UnquantizedFusedMoEMethod):
    @property
    def is_monolithic(self) -> bool:
        """The routing is done here: vLLM's own needs kernels for it."""
        return True

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        """Raises ValueError for a layer that routes or computes in a way not written for NPUs."""
        unsupported = {
            "grouped top-k": layer.use_grouped_topk,
            "a routing function of its own": layer.custom_routing_function is not None,
            f"{layer.scoring_func} scores": layer.scoring_func != "softmax",
            "a correction bias": layer.e_score_correction_bias is not None,
            "router weights on the input": layer.apply_router_weight_on_input,
            f"the activation {layer.activation.value}": layer.activation != MoEActivation.SILU,
            "a limit of the activation": layer.swiglu_limit is not None,
            "biases": self.moe.has_bias,
        }
        if reasons := [name for name, wanted in unsupported.items() if wanted]:
            raise ValueError(f"{layer.layer_name}: experts with {', '.join(reasons)} are not supported on NPUs")
        super().create_weights(layer, *args, **kwargs)

    def apply_monolithic(
        self, layer: Any, x: torch.Tensor, router_logits: torch.Tensor, input_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        weights, experts = torch.topk(torch.softmax(router_logits.float(), dim=-1), layer.top_k, dim=-1)
        if layer.renormalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        if layer.expert_map is not None:
            here = layer.expert_map.index_select(0, experts.flatten()).view(experts.shape).to(experts.dtype)
            weights = weights.masked_fill(here < 0, 0)
            experts = torch.where(here < 0, experts % layer.local_num_experts, here)
        return run_experts(x, weights, experts, layer.w13_weight, layer.w2_weight)


def run_experts(
    x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor
) -> torch.Tensor:
    """The weighted sum over each token's experts; `weights` and `experts` are [tokens, experts of a token]."""
    routed, order = torch.sort(experts.flatten())
    ends = torch.searchsorted(routed, torch.arange(w13.shape[0], device=x.device, dtype=routed.dtype), right=True)
    rows = x.index_select(0, order // experts.shape[1])
    hidden = torch.ops.npu.npu_swiglu(_grouped_product(rows, w13, ends))
    results = _grouped_product(hidden, w2, ends).index_select(0, torch.argsort(order))
    return (results.view(*experts.shape, -1) * weights.unsqueeze(-1)).sum(dim=1).to(x.dtype)


def _grouped_product(rows: torch.Tensor, matrices: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Rows up to `ends[i]` times the transpose of `matrices[i]`."""
    product: torch.Tensor = torch.ops.npu.npu_grouped_matmul(
        [rows], [matrices.transpose(1, 2)], group_list=ends, split_item=2, group_type=0, group_list_type=0
    )[0]
    return product


CustomOp.register_oot(NPUUnquantizedFusedMoEMethod, name=UnquantizedFusedMoEMethod.__name__)
NPUUnquantizedFusedMoEMethod.name = UnquantizedFusedMoEMethod.name
