"""Layers of experts in ModelSlim's checkpoints: int8, or 4 bits of which a byte holds those of two outputs.

Of experts in 4 bits the checkpoint has sums as well, `scale_bias`, as `ops.four_bits` explains. Those of w2 are sums of
16 parts of the inputs, so that up to 16 devices can divide a layer; after loading they are added up, and the parts are
gone.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import FusedMoeWeightScaleSupported
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.utils import replace_parameter, set_weight_attrs

from vllm_ascend.ops import quantized
from vllm_ascend.ops.experts import refuse_unsupported_experts
from vllm_ascend.ops.four_bits import DEPTH_STEP, packed_for_product, scale_in_bits
from vllm_ascend.ops.layout import for_quantised_product
from vllm_ascend.quantization.checked_loading import Loader, checked, symmetric, wrapped
from vllm_ascend.quantization.description import DYNAMIC, FLOAT, FOUR_BITS
from vllm_ascend.quantization.experts import WEIGHTS, Int8ExpertsMethod, QuantisedExpertsMethod

CHANNEL, GROUP = FusedMoeWeightScaleSupported.CHANNEL.value, FusedMoeWeightScaleSupported.GROUP.value
"""How vLLM divides a tensor of w2 among devices: not at all, or as the inputs."""
PARTS = 16


class _Parameters:
    """Registers those that both kinds have."""

    def _register(  # noqa: PLR0917
        self, layer: Any, name: str, shape: tuple[int, ...], dtype: torch.dtype, load: Loader, divided: str = CHANNEL
    ) -> None:
        parameter = torch.nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
        loader = checked(load, layer.layer_name, integers=dtype == torch.int8)
        layer.register_parameter(name, parameter)
        set_weight_attrs(parameter, {"weight_loader": loader, "quant_method": divided})

    def _register_scales(self, layer: Any, experts: int, inner: int, hidden: int, load: Loader) -> None:
        for name, outputs in zip(WEIGHTS, (2 * inner, hidden), strict=True):
            loaders = {"weight_scale": load, "weight_offset": symmetric(load, layer.layer_name)}
            for part, loader in loaders.items():
                self._register(layer, f"{name}_{part}", (experts, outputs, 1), torch.float32, loader)


class DynamicExpertsMethod(_Parameters, Int8ExpertsMethod):
    """W8A8_DYNAMIC."""

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        *,
        weight_loader: Loader,
        **kwargs: Any,
    ) -> None:
        """Raises ValueError for a layer that computes in a way not written for NPUs."""
        refuse_unsupported_experts(layer, self.moe)
        experts, inner, hidden = num_experts, intermediate_size_per_partition, hidden_size
        self._register(layer, "w13_weight", (experts, 2 * inner, hidden), torch.int8, weight_loader)
        self._register(layer, "w2_weight", (experts, hidden, inner), torch.int8, weight_loader)
        self._register_scales(layer, experts, inner, hidden, weight_loader)

    def process_weights_after_loading(self, layer: Any) -> None:
        _flatten_offsets(layer)
        super().process_weights_after_loading(layer)


class FourBitExpertsMethod(_Parameters, QuantisedExpertsMethod):
    """W4A8_DYNAMIC."""

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        *,
        weight_loader: Loader,
        **kwargs: Any,
    ) -> None:
        """Raises ValueError for a layer that computes in a way not written for NPUs, or of sizes they do not take."""
        refuse_unsupported_experts(layer, self.moe)
        devices = self.moe.tp_size
        if PARTS % devices:
            raise ValueError(
                f"{layer.layer_name} in {FOUR_BITS} is made for 1, 2, 4, 8 or {PARTS} devices that divide each expert, "
                f"not {devices}: choose such a tensor parallel size, or --enable-expert-parallel"
            )
        experts, inner, hidden = num_experts, intermediate_size_per_partition, hidden_size
        if hidden % DEPTH_STEP or inner % DEPTH_STEP:
            raise ValueError(
                f"{layer.layer_name} in {FOUR_BITS}, on a device from {hidden} values over {inner} to {hidden}, is not "
                f"supported on NPUs: these must be multiples of {DEPTH_STEP}"
            )
        self._register(layer, "w13_weight", (experts, inner, hidden), torch.int8, weight_loader)
        self._register(layer, "w2_weight", (experts, hidden // 2, inner), torch.int8, weight_loader)
        self._register_scales(layer, experts, inner, hidden, weight_loader)
        sums = _as_scale(weight_loader)
        self._register(layer, "w13_scale_bias", (experts, 2 * inner, 1), torch.float32, sums, GROUP)
        self._register(layer, "w2_scale_bias", (experts, hidden, PARTS // devices), torch.float32, sums, GROUP)

    def process_weights_after_loading(self, layer: Any) -> None:
        _flatten_offsets(layer)
        for name in WEIGHTS:
            scale = getattr(layer, f"{name}_weight_scale").data
            replace_parameter(layer, f"{name}_weight_scale", scale_in_bits(scale.transpose(1, 2)))
            replace_parameter(layer, f"{name}_scale_bias", getattr(layer, f"{name}_scale_bias").data.sum(2))
            replace_parameter(layer, f"{name}_weight", for_quantised_product(getattr(layer, f"{name}_weight").data))

    def weights_for_product(self, layer: Any, name: str) -> quantized.ExpertWeights:
        weight, scale, sums = (getattr(layer, f"{name}_{part}") for part in ("weight", "weight_scale", "scale_bias"))
        return quantized.ExpertWeights(packed_for_product(weight), scale, sums)


def method(layer: Any, kind: str) -> FusedMoEMethodBase:
    """For the experts of `layer` in this kind."""
    methods: dict[str, type[FusedMoEMethodBase]] = {
        FLOAT: UnquantizedFusedMoEMethod,
        DYNAMIC: DynamicExpertsMethod,
        FOUR_BITS: FourBitExpertsMethod,
    }
    return methods[kind](layer.moe_config)


def _flatten_offsets(layer: Any) -> None:
    for name in WEIGHTS:
        replace_parameter(layer, f"{name}_weight_offset", getattr(layer, f"{name}_weight_offset").data.flatten(1))


def _as_scale(load: Loader) -> Loader:
    """For sums: vLLM takes what is called a bias for one of the layer, and loads it in another way."""

    def body(
        load: Loader,
        param: torch.nn.Parameter,
        loaded_weight: torch.Tensor,
        weight_name: str,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        return load(param, loaded_weight, weight_name.replace("scale_bias", "scale"), *args, **kwargs)

    return wrapped(load, body)
