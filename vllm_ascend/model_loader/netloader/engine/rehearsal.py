"""A dry run of a reload, which shows whether a model in use can take over new weights before any of it changes.

vLLM's reload processes a layer and copies the result into the memory that the layer computes with. If that does not
fit, it fails between two layers. Which layers do not fit depends on the model, the platform and the processor.

So one part of each kind (a decoder layer, an embedding) is taken from the scratch model that holds the new weights. It
gets memory of its own on the device and goes the whole way: it is processed as after a first load, then reloaded with
the same weights. The reload must bring the very same tensors, bit for bit, and their layout must be the one that the
model in use has. No knowledge of particular layers is needed for that.

What layers keep outside of tensors, such as handles of a library, stays hidden from it. `reloadable` knows the one of
these that is wrong after a reload.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.config import ModelConfig
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import materialize_meta_tensor, to_meta_tensor
from vllm.utils.torch_utils import set_default_torch_dtype

from vllm_ascend.model_loader.netloader.engine.reloadable import (
    equal,
    layout,
    require_counterparts,
    require_same_layout,
    require_that_views_follow,
)
from vllm_ascend.model_loader.netloader.engine.takeover import (
    NewWeights,
    Tensors,
    layers_of,
    processed_parts,
    raw_tensors,
    take_over,
)
from vllm_ascend.model_loader.netloader.errors import ReloadRefused
from vllm_ascend.model_loader.netloader.model.tensors import own_tensors, qualified


def rehearse(scratch: nn.Module, model: nn.Module, model_config: ModelConfig) -> NewWeights:
    """What `model` can take over from `scratch`, which is loaded and not processed, and cannot be used afterwards.

    Raises ReloadRefused, naming the layer or tensor, if vLLM's reload would fail or go wrong.
    """
    weights = raw_tensors(scratch)
    layers = layers_of(model)
    require_counterparts(weights, layers)
    require_that_views_follow(scratch, layers)
    _take_out_what_is_in_use(scratch, model)

    detours: dict[str, Mapping[str, torch.Tensor]] = {}
    known: dict[Hashable, _Outcome] = {}
    in_parts: set[str] = set()
    parts = {part: (prefix, _kind(part)) for prefix, part in reversed([*processed_parts(scratch)])}
    for part, (prefix, kind) in reversed(parts.items()):
        in_parts.update(_join(prefix, name) for name, _ in part.named_modules())
        if kind not in known:
            known[kind] = _rehearse_part(prefix, part, model_config, layers)
            _hollow_out(part)
        outcome = known[kind]
        for name, tensors in outcome.processed.items():
            path = _join(prefix, name)
            require_same_layout(path, tensors, layers[path])
        detours |= {_join(prefix, name): tensors for name, tensors in outcome.detours.items()}

    for path in weights.keys() - in_parts:
        require_same_layout(path, weights[path], layers[path])
    return NewWeights(weights, detours)


@dataclass(frozen=True)
class _Outcome:
    """What processing leaves in a part, and which of it takes a detour, as tensors on the meta device.

    Names of modules are those within the part.
    """

    processed: Tensors
    detours: Tensors


@torch.no_grad()
def _rehearse_part(
    prefix: str, part: nn.Module, model_config: ModelConfig, layers: Mapping[str, nn.Module]
) -> _Outcome:
    device = get_layerwise_info(layers[prefix]).restore_device
    weights = raw_tensors(part)
    try:
        with set_default_torch_dtype(model_config.dtype), device:
            _give_memory(part)
            _process_layers(part)
            alone = _on_meta(part)
            _process_attention(part, model_config.dtype)
            outcome = _Outcome(_on_meta(part), _detours(alone, _on_meta(part)))
            before = {name: tensor.clone() for name, tensor in _tensors(part)}

        # Only now the reload: what it must bring again is what the first load has left.
        for layer in part.modules():
            get_layerwise_info(layer).restore_device = device
        initialize_layerwise_reload(part)
        with set_default_torch_dtype(model_config.dtype):
            take_over(NewWeights(weights, outcome.detours), part)
        finalize_layerwise_reload(part, model_config)
        after = dict(_tensors(part))
    except Exception as error:  # a model's own code may raise anything
        raise ReloadRefused(
            f"vLLM cannot give {prefix} new weights in place: {type(error).__name__}: {error}. "
            f"Start the instance anew to change its weights"
        ) from error

    for name in before.keys() | after.keys():
        if name not in before or name not in after or not equal(before[name], after[name]):
            raise ReloadRefused(
                f"{_join(prefix, name)} is another one after a reload than after a first load of the same weights: "
                f"start the instance anew to change its weights"
            )
    return outcome


def _take_out_what_is_in_use(scratch: nn.Module, model: nn.Module) -> None:
    """Removes the modules that `scratch` shares with `model`: vLLM makes rotary embeddings once for all models."""
    in_use = set(model.modules())
    for module in set(scratch.modules()) - in_use:
        module._modules.update({name: None for name, child in module._modules.items() if child in in_use})


def _hollow_out(part: nn.Module) -> None:
    """Frees whatever processing has left in `part` and in what it refers to, before the next part needs as much."""
    for layer in [*part.modules()]:
        vars(layer).clear()


def _give_memory(part: nn.Module) -> None:
    """Copies all tensors of `part` to the default device, so that the raw ones stay as they are."""
    for module in part.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    copied = held[name] = materialize_meta_tensor(to_meta_tensor(tensor))
                    copied.data.copy_(tensor.data)


def _process_layers(part: nn.Module) -> None:
    """Processes the layers of `part` as vLLM does after a first load."""
    for layer in part.modules():
        method: Any = getattr(layer, "quant_method", None)
        if isinstance(method, QuantizeMethodBase):
            method.process_weights_after_loading(layer)


def _process_attention(part: nn.Module, dtype: torch.dtype) -> None:
    for layer in part.modules():
        if is_deferred_attention_layer(layer):
            process: Any = layer.process_weights_after_loading
            process(dtype)


def _on_meta(part: nn.Module) -> Tensors:
    return {
        prefix: {name: to_meta_tensor(tensor) for name, tensor in own_tensors(module)}
        for prefix, module in part.named_modules()
    }


def _detours(alone: Tensors, together: Tensors) -> Tensors:
    """The tensors of `alone` that are gone or have another layout once attention layers have been processed."""
    changed = {
        prefix: {
            name: tensor for name, tensor in tensors.items() if layout(together[prefix].get(name)) != layout(tensor)
        }
        for prefix, tensors in alone.items()
    }
    return {prefix: tensors for prefix, tensors in changed.items() if tensors}


def _kind(part: nn.Module) -> Hashable:
    """A key that parts have in common if they are processed in the same way, whatever their numbers and names."""
    return tuple(_kind_of_layer(name, layer) for name, layer in part.named_modules())


def _kind_of_layer(name: str, layer: nn.Module) -> Hashable:
    tensors = tuple((key, layout(tensor), tensor.stride()) for key, tensor in own_tensors(layer))
    method: Any = getattr(layer, "quant_method", None)
    helpers = (method, getattr(method, "kernel", None), getattr(layer, "scheme", None), getattr(layer, "impl", None))
    switches = tuple(sorted((key, value) for key, value in vars(layer).items() if isinstance(value, bool)))
    return name, type(layer), tuple(type(each) for each in helpers), tensors, switches


def _tensors(part: nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    for prefix, module in part.named_modules():
        yield from ((qualified(prefix, name), tensor.data) for name, tensor in own_tensors(module))


def _join(prefix: str, name: str) -> str:
    return qualified(prefix, name) if name else prefix
