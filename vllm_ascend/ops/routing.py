"""The experts of each token, chosen by one of torch_npu's operators, in place of vLLM's kernels for GPUs.

vLLM makes the router of a layer by a function, which is replaced here. Its routers are told apart by what they compute,
and an operator computes several of them:

- `npu_moe_gating_top_k_softmax_v2`: softmax and the largest; or, which is the same as dividing by their sum afterwards,
  the largest and their softmax;
- `npu_moe_gating_top_k`: sigmoid, choice with a correction bias and among the best groups. It always divides what it
  chose among sigmoids by their sum. Whether it does so for softmax, its documentation and its source do not agree;
  dividing once more is right in both cases. Where a router does not want it, as that of DeepSeek V2, the operator only
  chooses, and the scores are computed beside it.

The rest of a router is vLLM's: what it chose can be recorded for `enable_return_routed_experts`. Logits are taken in
float32, so that weights are not rounded to 16 bits.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm import envs
from vllm.model_executor.layers.fused_moe import layer as moe_layer
from vllm.model_executor.layers.fused_moe.config import RoutingMethodType, get_routing_method_type
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
from vllm.model_executor.layers.fused_moe.router.router_factory import create_fused_moe_router as create_vllm_router

MAX_CHOSEN = 1024
"""Documented for npu_moe_gating_top_k_softmax_v2."""
MAX_EXPERTS = 2048
GROUP_STEP = 32
"""Documented for npu_moe_gating_top_k, which counts the experts of a group in these steps."""
BEST_EXPERT, BEST_TWO = 0, 1
SOFTMAX, SIGMOID = 0, 1


class NPURouter(BaseRouter):
    """Takes what vLLM's function for routers takes; raises ValueError for a routing not written for NPUs."""

    def __init__(  # noqa: PLR0917
        self,
        top_k: int,
        global_num_experts: int,
        renormalize: bool = True,
        use_grouped_topk: bool = False,
        num_expert_group: int | None = None,
        topk_group: int | None = None,
        scoring_func: str = "softmax",
        routed_scaling_factor: float = 1.0,
        e_score_correction_bias: torch.Tensor | None = None,
        eplb_state: Any = None,
        **others: Any,
    ) -> None:
        super().__init__(top_k, global_num_experts, eplb_state)
        self.renormalize = renormalize
        self.groups = (num_expert_group or 1) if use_grouped_topk else 1
        self.chosen_groups = (topk_group or 1) if self.groups > 1 else 1
        self.scoring_func = scoring_func
        self.bias = e_score_correction_bias
        self.scale = routed_scaling_factor if use_grouped_topk or self.bias is not None else 1.0
        self._num_expert_group = num_expert_group
        if reasons := [*self._unsupported(), *_unknown(others)]:
            raise ValueError(f"experts with {', '.join(reasons)} are not supported on NPUs")

    def _unsupported(self) -> list[str]:
        size, rest = divmod(self.global_num_experts, self.groups)
        counted = -(-size // GROUP_STEP) * GROUP_STEP * self.groups
        reasons = {
            f"{self.scoring_func} scores": self.scoring_func not in {"softmax", "sigmoid"},
            f"{self.top_k} chosen for each token": self._is_plain and self.top_k > MAX_CHOSEN,
            f"{self.global_num_experts} in {self.groups} groups": not self._is_plain
            and (rest or size <= 2 or counted > MAX_EXPERTS),
        }
        return [reason for reason, holds in reasons.items() if holds]

    @property
    def _is_plain(self) -> bool:
        return self.scoring_func == "softmax" and self.groups == 1 and self.bias is None and self.scale == 1.0

    @property
    def routing_method_type(self) -> RoutingMethodType:
        return get_routing_method_type(
            scoring_func=self.scoring_func,
            top_k=self.top_k,
            renormalize=self.renormalize,
            num_expert_group=self._num_expert_group,
            has_e_score_bias=self.bias is not None,
        )

    def _compute_routing(
        self,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        indices_type: torch.dtype | None,
        *,
        input_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits = router_logits.float()
        if self._is_plain:
            weights, experts, _ = torch.ops.npu.npu_moe_gating_top_k_softmax_v2(
                logits, k=self.top_k, renorm=int(self.renormalize)
            )
            return weights, experts

        softmax = self.scoring_func == "softmax"
        weights, experts, _ = torch.ops.npu.npu_moe_gating_top_k(
            logits,
            self.top_k,
            bias=None if self.bias is None else self.bias.float(),
            k_group=self.chosen_groups,
            group_count=self.groups,
            group_select_mode=BEST_EXPERT if self.bias is None else BEST_TWO,
            norm_type=SOFTMAX if softmax else SIGMOID,
            routed_scaling_factor=1.0 if softmax else self.scale,
        )
        if not self.renormalize:
            scores = logits.softmax(dim=-1) if softmax else logits.sigmoid()
            return scores.gather(1, experts.long()) * self.scale, experts
        if softmax:
            weights = weights * (self.scale / weights.sum(dim=-1, keepdim=True))
        return weights, experts


def _unknown(others: dict[str, Any]) -> list[str]:
    """The parameters by which vLLM asks for more, if they do."""
    names = {
        "custom_routing_function": "a routing function of their own",
        "hash_indices_table": "routing by token",
        "zero_expert_type": "experts that compute nothing",
        "num_fused_shared_experts": "shared experts among them",
        "bias_vl": "another bias for images",
        "skip_padding": "routing that leaves padding out",
    }
    return [name for parameter, name in names.items() if others.get(parameter)]


def create_router(**arguments: Any) -> Any:
    if envs.VLLM_MOE_ROUTING_SIMULATION_STRATEGY:
        return create_vllm_router(**arguments)  # by chance or in turn, in plain torch
    return NPURouter(**arguments)


moe_layer.create_fused_moe_router = create_router
