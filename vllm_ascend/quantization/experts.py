"""What methods of quantised experts have in common, whatever the format of the checkpoint.

A format creates the parameters: `w13_weight` and `w2_weight` with a scale for each output. Post-processing replaces
them under their own names, so that vLLM's reload finds the same ones.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Final

import torch
from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.utils import replace_parameter

from vllm_ascend.ops import quantized
from vllm_ascend.ops.experts import own_experts
from vllm_ascend.ops.layout import for_quantised_product

WEIGHTS: Final = ("w13", "w2")


class QuantisedExpertsMethod(FusedMoEMethodBase):
    """Experts whose activations are quantised to int8 for each token."""

    @property
    def is_monolithic(self) -> bool:
        """The layer's router chooses the experts before."""
        return False

    def get_fused_moe_quant_config(self, layer: Any) -> FusedMoEQuantConfig | None:
        """None: what vLLM's own kernels would ask is asked by nobody here."""
        return None

    @abstractmethod
    def weights_for_product(self, layer: Any, name: str) -> quantized.ExpertWeights:
        """Those of `name`, w13 or w2, after post-processing."""

    def apply(  # noqa: PLR0917
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any = None,
        shared_experts_input: torch.Tensor | None = None,
    ) -> torch.Tensor:
        w13, w2 = (self.weights_for_product(layer, name) for name in WEIGHTS)
        return quantized.run_quantised_experts(x, topk_weights, topk_ids, w13, w2, own_experts(self.moe))


class Int8ExpertsMethod(QuantisedExpertsMethod):
    """Experts with weights in int8."""

    def process_weights_after_loading(self, layer: Any) -> None:
        for name in WEIGHTS:
            scale = getattr(layer, f"{name}_weight_scale").data.flatten(1)
            replace_parameter(layer, f"{name}_weight_scale", quantized.scale_of_experts(scale, self.moe.in_dtype))
            replace_parameter(layer, f"{name}_weight", for_quantised_product(getattr(layer, f"{name}_weight").data))

    def weights_for_product(self, layer: Any, name: str) -> quantized.ExpertWeights:
        return quantized.ExpertWeights(getattr(layer, f"{name}_weight"), getattr(layer, f"{name}_weight_scale"))
