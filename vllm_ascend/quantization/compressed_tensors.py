"""Checkpoints of compressed-tensors whose weights and activations are int8 (W8A8), by vLLM's own hooks.

vLLM reads the format and loads its tensors. Here is what becomes of them after loading, and which functions they go to:
for linear layers by the kernel that vLLM chooses, for experts by a subclass of its method, which its configuration for
this name makes. Post-processing replaces parameters under their own names, so that vLLM's reload finds the same ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy, QuantizationType
from torch import nn
from vllm.model_executor.kernels.linear import register_linear_kernel
from vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel import (
    Int8ScaledMMLinearKernel,
    Int8ScaledMMLinearLayerConfig,
)
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import register_weight_loader_v2_supported_method
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
    CompressedTensorsLinearMethod,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_w8a8_int8,
)
from vllm.model_executor.layers.quantization.utils.w8a8_utils import convert_to_channelwise
from vllm.model_executor.utils import replace_parameter
from vllm.platforms import PlatformEnum

from vllm_ascend.ops import quantized
from vllm_ascend.ops.experts import refuse_unsupported_experts
from vllm_ascend.ops.layout import for_quantised_product
from vllm_ascend.quantization import COMPRESSED_TENSORS
from vllm_ascend.quantization.completeness import CompleteCheckpoints
from vllm_ascend.quantization.experts import Int8ExpertsMethod

INT8 = (8, QuantizationType.INT)
UNQUANTISED_BITS = 16
SCALES_OF_WEIGHTS = {QuantizationStrategy.CHANNEL, QuantizationStrategy.TENSOR}


class NPUInt8LinearKernel(Int8ScaledMMLinearKernel):
    """Quantises the input and multiplies it by int8 weights. Made while a model of a known default dtype is made."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._dtype = torch.get_default_dtype()

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        return True, None

    @classmethod
    def can_implement(cls, c: Int8ScaledMMLinearLayerConfig) -> tuple[bool, str | None]:
        if not c.is_static_input_scheme and not c.input_symmetric:
            return False, "activations have a zero point for each token"
        return True, None

    def process_weights_after_loading(self, layer: Any) -> None:
        scale = layer.weight_scale.data
        if not self.config.is_channelwise:
            scale = convert_to_channelwise(scale, layer.logical_widths)
        scale = scale.flatten().float()
        if self.config.is_static_input_scheme:
            scale = self._prepare_static_input(layer, scale)
        replace_parameter(layer, "weight_scale", scale)
        replace_parameter(layer, "weight", for_quantised_product(layer.weight.data))

    def apply_weights(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if not self.config.is_static_input_scheme:
            return quantized.dynamic_linear(x, layer.weight, layer.weight_scale, bias)
        given = quantized.StaticInput(layer.input_scale, layer.input_zero_point)
        return quantized.static_linear(x, given, layer.weight, layer.weight_scale, layer.azp_adj, bias)

    def _prepare_static_input(self, layer: Any, scale: torch.Tensor) -> torch.Tensor:
        """Returns the scale of the product. What a zero point adds to it is taken away again by a bias in int32."""
        zero_point = layer.input_zero_point
        given = quantized.static_input(layer.input_scale.max(), zero_point, self._dtype)
        if zero_point is not None:
            sums = layer.weight.data.sum(dim=1, dtype=torch.int32)
            layer.azp_adj = nn.Parameter(sums * -zero_point.data.int(), requires_grad=False)
            replace_parameter(layer, "input_zero_point", given.offset)
        replace_parameter(layer, "input_scale", given.reciprocal)
        return quantized.scale_of_static_product(scale * given.scale, self._dtype)


@register_weight_loader_v2_supported_method
class NPUInt8LinearMethod(CompressedTensorsLinearMethod):
    """Creates and loads parameters as vLLM's method does."""

    def create_weights(
        self, layer: Any, input_size_per_partition: int, output_partition_sizes: list[int], *args: Any, **kwargs: Any
    ) -> None:
        """Raises ValueError for a layer with more inputs or outputs than a device takes."""
        quantized.refuse_long_rows(layer.prefix, input_size_per_partition, sum(output_partition_sizes))
        super().create_weights(layer, input_size_per_partition, output_partition_sizes, *args, **kwargs)
        layer.input_is_static = layer.scheme.is_static_input_scheme


class NPUW8A8Int8MoEMethod(Int8ExpertsMethod, compressed_tensors_moe_w8a8_int8.CompressedTensorsW8A8Int8MoEMethod):
    """Creates and loads parameters as vLLM's method does, which knows no kernels for NPUs."""

    def __init__(self, weight_quant: QuantizationArgs, input_quant: QuantizationArgs, moe: Any) -> None:
        FusedMoEMethodBase.__init__(self, moe)
        self.weight_quant = weight_quant
        self.input_quant = input_quant
        self.static_input_scales = False

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        """Raises ValueError for a layer that computes in a way not written for NPUs."""
        refuse_unsupported_experts(layer, self.moe)
        super().create_weights(layer, *args, **kwargs)


@register_quantization_config(COMPRESSED_TENSORS)
class NPUCompressedTensorsConfig(CompleteCheckpoints, CompressedTensorsConfig):
    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        """As vLLM's, with the methods above. Raises ValueError for experts in another scheme."""
        if not isinstance(layer, RoutedExperts):
            method = super().get_quant_method(layer, prefix)
            return NPUInt8LinearMethod(self) if type(method) is CompressedTensorsLinearMethod else method
        self._add_fused_moe_to_target_scheme_map()
        projections = (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name)
        first, *others = (self.get_scheme_dict(layer, f"{prefix}.0.{name}") for name in projections)
        if any(other != first for other in others):
            raise ValueError(f"{prefix}: the projections of an expert have different schemes, {[first, *others]}")
        if first is None:
            return super().get_quant_method(layer, prefix)
        weights, inputs = first["weights"], first["input_activations"]
        if _scheme_refusal(weights, inputs) or not inputs.dynamic or weights.strategy != QuantizationStrategy.CHANNEL:
            raise ValueError(
                f"{prefix}: experts in {_scheme_name(weights, inputs)} are not supported on NPUs, which take int8 "
                f"weights with a scale for each channel and activations that are quantised for each token"
            )
        return NPUW8A8Int8MoEMethod(weights, inputs, layer.moe_config)


register_linear_kernel(NPUInt8LinearKernel, PlatformEnum.OOT, "int8")


def refusals(config: Any) -> Iterator[str]:
    """What `config`, vLLM's of such a checkpoint, asks for and NPUs do not do."""
    for target, scheme in config.target_scheme_map.items():
        if reason := _scheme_refusal(scheme["weights"], scheme["input_activations"]):
            name = _scheme_name(scheme["weights"], scheme["input_activations"])
            yield f"compressed-tensors {name} of {target} ({reason})"
        if scheme.get("output_activations") is not None:
            yield f"compressed-tensors with quantised outputs of {target}"
    if config.kv_cache_scheme is not None:
        yield "compressed-tensors with a quantised KV cache (kv_cache_scheme)"
    if config.transform_config is not None:
        yield "compressed-tensors with transforms (transform_config)"


def _scheme_refusal(weights: Any, inputs: Any) -> str | None:
    """Why NPUs do not compute in such a scheme, None if they do."""
    if any(args is None or (args.num_bits, args.type) != INT8 for args in (weights, inputs)):
        return "there is W8A8 in int8"
    given = QuantizationStrategy.TOKEN if inputs.dynamic else QuantizationStrategy.TENSOR
    reasons = {
        f"weights have a scale for each {QuantizationStrategy(weights.strategy).value}": weights.strategy
        not in SCALES_OF_WEIGHTS,
        "weights have zero points": not weights.symmetric,
        "weights are quantised at every step": weights.dynamic,
        f"activations have a scale for each {QuantizationStrategy(inputs.strategy).value}": inputs.strategy != given,
        "activations have a zero point for each token": inputs.dynamic and not inputs.symmetric,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _scheme_name(weights: Any, inputs: Any) -> str:
    bits = UNQUANTISED_BITS if inputs is None else inputs.num_bits
    kinds = {QuantizationType(args.type).value for args in (weights, inputs) if args is not None}
    return f"W{weights.num_bits}A{bits} ({', '.join(sorted(kinds))})"
