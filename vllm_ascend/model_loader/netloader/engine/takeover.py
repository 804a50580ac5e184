"""How layers of a model take over raw weights, between vLLM's initialize_ and finalize_layerwise_reload.

vLLM gives each layer its raw tensors back, on the meta device. When the last of them is loaded, vLLM makes them real,
fills and processes them, and copies the result into the memory that the layer computed with before.

The copy takes for granted that processing leaves tensors like those that the layer had when it went into use. That is
not so if another layer has taken some of them away since: on processors with AMX, vLLM's latent attention packs the
weight of a projection and drops it. Such a tensor gets memory of its own for the time being, its detour.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info, make_online_process_loader
from vllm.model_executor.model_loader.reload.meta import SKIP_LOAD_TENSORS, materialize_meta_tensor
from vllm.platforms import current_platform

from vllm_ascend.model_loader.netloader.model.tensors import own_tensors, qualified

Tensors = Mapping[str, Mapping[str, torch.Tensor]]
"""Tensors by the qualified name of their module, and by their own name in it."""


@dataclass(frozen=True)
class NewWeights:
    """What a model takes over: raw tensors, and the ones that take a detour, on the meta device."""

    raw: Tensors
    detours: Tensors = field(default_factory=dict)


def raw_tensors(model: nn.Module) -> Tensors:
    """The tensors of `model`, which is loaded and not processed. Only later changes in place reach them."""
    return {
        prefix: {name: tensor.data for name, tensor in own_tensors(module)} for prefix, module in model.named_modules()
    }


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """All modules of `model` by all their names, which LoRA changes by putting a layer into another one."""
    named = model.named_modules(remove_duplicate=False)
    return {name.replace(".base_layer", ""): layer for name, layer in named}


@torch.no_grad()
def take_over(weights: NewWeights, model: nn.Module) -> set[str]:
    """Loads `weights` into `model`. Returns the names of the tensors, as a model's `load_weights` does."""
    _prepare_experts(model)
    layers = layers_of(model)
    for prefix, places in weights.detours.items():
        _place(layers[prefix], places)

    loaded: set[nn.Module] = set()
    for prefix, tensors in weights.raw.items():
        layer = layers[prefix]
        if layer not in loaded:  # a layer may have two names, under which the contents are the same
            _load_layer(layer, tensors)
            loaded.add(layer)
    return {qualified(prefix, name) for prefix, tensors in weights.raw.items() for name in tensors}


def _prepare_experts(model: nn.Module) -> None:
    """Lets vLLM's CPU backend pack new expert weights as it packed the first.

    vLLM 0.32 packs only when it builds a layer's kernel, and takes the kernel's presence to mean a reload, whose
    unpacked weights that kernel then misreads.
    """
    if not current_platform.is_cpu():
        return
    for layer in model.modules():
        method: Any = getattr(layer, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


def _place(layer: nn.Module, places: Mapping[str, torch.Tensor]) -> None:
    info = get_layerwise_info(layer)
    assert info.kernel_tensors is not None
    parameters, buffers = info.kernel_tensors
    for name, place in places.items():
        buffers.pop(name, None)
        with info.restore_device:
            parameters[name] = nn.Parameter(materialize_meta_tensor(place).data, requires_grad=False)


def _load_layer(layer: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Loads all tensors of `layer`, which need neither splitting nor stacking. With the last one vLLM processes it."""
    in_place = [name for name in tensors if not getattr(layer, name).is_meta]  # vLLM leaves biases where they are
    for name in in_place:
        getattr(layer, name).data.copy_(tensors[name])
        if name not in SKIP_LOAD_TENSORS:
            get_layerwise_info(layer).load_numel += tensors[name].numel()
    for name in tensors.keys() - set(in_place):
        target = getattr(layer, name)
        target.weight_loader = _copy
        target.weight_loader = make_online_process_loader(layer, name)
        target.weight_loader(target, tensors[name])


def _copy(param: torch.Tensor, loaded_weight: torch.Tensor) -> None:
    """A weight loader, to which vLLM passes the first argument by its name."""
    param.data.copy_(loaded_weight)


def processed_parts(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The parts of `model` that are processed by themselves: those that are repeated, and the modules beside them."""
    for name, child in model.named_children():
        path = qualified(prefix, name)
        if isinstance(child, nn.ModuleList | nn.ModuleDict | nn.Sequential):
            yield from ((qualified(path, key), each) for key, each in child.named_children())
        elif any(isinstance(each, nn.ModuleList | nn.ModuleDict | nn.Sequential) for each in child.modules()):
            yield from processed_parts(child, path)
        else:
            yield path, child
