"""Linear layers of ModelSlim's checkpoints, each with the tensors that the checkpoint has for its kind.

Post-processing replaces parameters under their own names, so that vLLM's reload finds the same ones. A static layer
adds `quant_bias` before its results are scaled; it makes up for the offset of the input, and contains the bias of the
layer, so that of several devices which add up their results only the first one adds it.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    RowParallelLinear,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.parameter import (
    ChannelQuantScaleParameter,
    ModelWeightParameter,
    PerTensorScaleParameter,
)
from vllm.model_executor.utils import replace_parameter

from vllm_ascend.ops import quantized
from vllm_ascend.ops.layout import for_quantised_product
from vllm_ascend.quantization.checked_loading import Loader, checked, scales_in_bits, symmetric
from vllm_ascend.quantization.description import STATIC


@register_weight_loader_v2_supported_method
class FloatLinearMethod(UnquantizedLinearMethod):
    """vLLM's for layers without quantisation, which takes no integers."""

    def create_weights(self, layer: Any, *args: Any, weight_loader: Loader, **kwargs: Any) -> None:
        loader = checked(weight_loader, layer.prefix, integers=False)
        super().create_weights(layer, *args, weight_loader=loader, **kwargs)


@register_weight_loader_v2_supported_method
class DynamicLinearMethod(LinearMethodBase):
    """W8A8_DYNAMIC: activations are quantised for each token."""

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        *args: Any,
        weight_loader: Loader,
        **kwargs: Any,
    ) -> None:
        """Raises ValueError for a layer with more inputs or outputs than a device takes."""
        outputs = sum(output_partition_sizes)
        _register_weight(layer, outputs, input_size_per_partition, weight_loader)
        _register_scales(layer, outputs, weight_loader)

    def process_weights_after_loading(self, layer: Any) -> None:
        for name in ("weight_scale", "weight_offset"):
            replace_parameter(layer, name, getattr(layer, name).data.flatten())
        replace_parameter(layer, "weight", for_quantised_product(layer.weight.data))

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return quantized.dynamic_linear(x, layer.weight, layer.weight_scale, bias)


@register_weight_loader_v2_supported_method
class MixedLinearMethod(DynamicLinearMethod):
    """W8A8_MIX: checkpoints for prefill and decode on different instances have the tensors of both kinds.

    Activations are quantised for each token, but for instances that only decode what others have prefilled. There are
    none on this platform, and what only they would compute with stays as it was loaded.
    """

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        *args: Any,
        weight_loader: Loader,
        **kwargs: Any,
    ) -> None:
        """Raises ValueError as `DynamicLinearMethod` does."""
        sizes = input_size_per_partition, output_partition_sizes
        super().create_weights(layer, *sizes, *args, weight_loader=weight_loader, **kwargs)
        _register_static_input(layer, output_partition_sizes, weight_loader)


@register_weight_loader_v2_supported_method
class StaticLinearMethod(LinearMethodBase):
    """W8A8: the checkpoint has one scale and one offset for all activations of a layer.

    Checkpoints of older tools have the scales of the weights too (`with_scales`), which the results are not scaled by:
    `deq_scale` contains them.
    """

    def __init__(self, *, with_scales: bool) -> None:
        self._with_scales = with_scales

    def create_weights(  # noqa: PLR0917
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        *,
        weight_loader: Loader,
        **kwargs: Any,
    ) -> None:
        """Raises ValueError for a layer that is too large, or whose caller adds its bias, a second time then."""
        if layer.has_bias and layer.skip_bias_add:
            raise ValueError(f"{layer.prefix} in {STATIC} has a bias that its caller adds, which quant_bias contains")
        layer.input_is_static = True
        self._dtype = params_dtype
        config = get_current_vllm_config_or_none()
        self._has_real_weights = config is None or config.load_config.load_format != "dummy"
        outputs = sum(output_partition_sizes)
        _register_weight(layer, outputs, input_size_per_partition, weight_loader)
        if self._with_scales:
            _register_scales(layer, outputs, weight_loader)
        _register_static_input(layer, output_partition_sizes, weight_loader)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Raises ValueError if the parts of the layer quantise their input in different ways."""
        scale, offset = (self._common(layer, name) for name in ("input_scale", "input_offset"))
        given = quantized.static_input(scale, offset, self._dtype)
        of_product = layer.deq_scale.data / scale * given.scale
        replace_parameter(layer, "input_scale", given.reciprocal)
        replace_parameter(layer, "input_offset", given.offset)
        replace_parameter(layer, "deq_scale", quantized.scale_of_static_product(of_product, self._dtype))
        replace_parameter(layer, "quant_bias", layer.quant_bias.data)
        replace_parameter(layer, "weight", for_quantised_product(layer.weight.data))

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        others_add_it = isinstance(layer, RowParallelLinear) and layer.tp_rank > 0
        given = quantized.StaticInput(layer.input_scale, layer.input_offset)
        quant_bias = None if others_add_it else layer.quant_bias
        return quantized.static_linear(x, given, layer.weight, layer.deq_scale, quant_bias)

    def _common(self, layer: Any, name: str) -> torch.Tensor:
        values = getattr(layer, name).data
        if self._has_real_weights and bool((values != values[0]).any()):
            raise ValueError(
                f"{layer.prefix} is one layer in vLLM, and its parts have different {name}, {values.tolist()}: they "
                f"quantise the same input, so let ModelSlim observe it for all of them"
            )
        first: torch.Tensor = values[:1]
        return first


def _register_weight(layer: Any, outputs: int, inputs: int, load: Loader) -> None:
    quantized.refuse_long_rows(layer.prefix, inputs, outputs)
    values, loader = torch.empty(outputs, inputs, dtype=torch.int8), checked(load, layer.prefix, integers=True)
    weight = ModelWeightParameter(data=values, input_dim=1, output_dim=0, weight_loader=loader)
    layer.register_parameter("weight", weight)


def _register_scales(layer: Any, outputs: int, load: Loader) -> None:
    floats = checked(load, layer.prefix, integers=False)
    loaders = {"weight_scale": floats, "weight_offset": symmetric(floats, layer.prefix)}
    for name, loader in loaders.items():
        _register_channels(layer, name, torch.empty(outputs, 1, dtype=torch.float32), loader)


def _register_static_input(layer: Any, output_partition_sizes: list[int], load: Loader) -> None:
    outputs = sum(output_partition_sizes)
    for name in ("input_scale", "input_offset"):
        of_parts = torch.empty(len(output_partition_sizes), dtype=torch.float32)
        layer.register_parameter(name, PerTensorScaleParameter(data=of_parts, weight_loader=load))
    integers, floats = (checked(load, layer.prefix, integers=each) for each in (True, False))
    _register_channels(layer, "quant_bias", torch.empty(outputs, dtype=torch.int32), integers)
    _register_channels(layer, "deq_scale", torch.empty(outputs, dtype=torch.float32), scales_in_bits(floats))


def _register_channels(layer: Any, name: str, values: torch.Tensor, loader: Loader) -> None:
    layer.register_parameter(name, ChannelQuantScaleParameter(data=values, output_dim=0, weight_loader=loader))
