"""A load of a checkpoint that leaves something of a quantised model unwritten is an error.

vLLM does not look for this where layers have quantised weights, and the model would compute with what happens to be in
the memory: with weights of another model, or none. So every `load_weights` of such a model is watched (`Writes`), and
what it has left out is named as the checkpoint names it. This is about reading checkpoints. Weights that come in
another way, as from Netloader's sources, are proven there, and nothing is watched; nor are random weights.

A model is made by one function of vLLM and loaded by many. vLLM offers no hook between, so that the last thing which
this function calls is replaced by one that calls it and knows the model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.model_executor.model_loader import utils as loading
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from vllm_ascend.quantization.writes import Writes

_NAMED: Final = 4


class CompleteCheckpoints:
    """What a configuration of quantised models inherits so that their checkpoints must have everything."""

    packed_modules_mapping: dict[str, list[str]]

    def may_lack(self, parameter: str) -> bool:
        """Whether a model has `parameter` that its checkpoint need not have, as it has a value of its own."""
        return False


class IncompleteCheckpoint(ValueError):
    """A checkpoint lacks tensors that its model computes with."""


class Place(NamedTuple):
    """A parameter of a model, and the layer that it belongs to."""

    path: str
    layer: nn.Module
    name: str
    tensor: torch.Tensor


@dataclass
class _Watched:
    config: CompleteCheckpoints
    loaded: bool = False


_watched: Final[WeakKeyDictionary[nn.Module, _Watched]] = WeakKeyDictionary()


def watch(model: nn.Module, config: CompleteCheckpoints) -> None:
    """From now on `load_weights` of `model`, which is not loaded yet, raises IncompleteCheckpoint."""
    _watched[model] = _Watched(config)
    kind: Any = type(model)
    _watch_models_of(kind)


@functools.cache
def _watch_models_of(kind: type[Any]) -> None:
    """Wraps `load_weights` of a class of models. Idempotent."""
    kind.load_weights = _watching(kind.load_weights)


def _watching(load: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load)
    def load_weights(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        watched = _watched.pop(model, None)  # so that the method of a base class, called within, does nothing more
        try:
            if watched is None or (watched.loaded and not _is_reloaded_by_layers(model)):
                return load(model, *args, **kwargs)
            places = [*_places(model, watched.config)]
            with Writes(place.tensor for place in places) as writes:
                result = load(model, *args, **kwargs)
            layers = set(model.modules())  # a load may remove some, as the head of what becomes a classifier
            _require_complete([each for each in places if each.layer in layers], writes, watched.config)
            watched.loaded = True
        finally:
            if watched is not None:
                _watched[model] = watched
        return result

    return load_weights


def _is_reloaded_by_layers(model: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in model.parameters())


def _places(model: nn.Module, config: CompleteCheckpoints) -> Iterator[Place]:
    for path, layer in model.named_modules():
        if isinstance(getattr(layer, "quant_method", None), BaseKVCacheMethod):
            continue  # its scales have values of their own
        for name, parameter in layer.named_parameters(recurse=False):
            if parameter.numel() and not config.may_lack(_joined(path, name)):
                yield Place(path, layer, name, parameter.data)


def _require_complete(places: Sequence[Place], writes: Writes, config: CompleteCheckpoints) -> None:
    """Raises IncompleteCheckpoint. What layers share needs to be written once."""
    left_out = {_tensor_in_use(place): (place, gaps) for place in places if (gaps := writes.left_out(place.tensor))}
    for place in places:
        if _tensor_in_use(place) in left_out and not writes.left_out(place.tensor):
            del left_out[_tensor_in_use(place)]
    missing = [name for place, gaps in left_out.values() for name in _names(place, gaps, config)]
    if missing:
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        raise IncompleteCheckpoint(
            f"the checkpoint has no {', '.join(missing[:_NAMED])}{more}, or not all of it, and this quantised model "
            f"cannot compute without: is a file of the checkpoint missing?"
        )


def _tensor_in_use(place: Place) -> Hashable:
    """A key of the memory that a parameter is loaded for, which vLLM puts aside while it reloads layers."""
    in_use = get_layerwise_info(place.layer).kernel_tensors if place.tensor.is_meta else None
    tensor = place.tensor if in_use is None else in_use[0].get(place.name, place.tensor)
    return tensor.untyped_storage()._cdata, tensor.storage_offset()


def _names(place: Place, gaps: Sequence[range], config: CompleteCheckpoints) -> Iterator[str]:
    """The tensors of the checkpoint that would have filled the gaps."""
    if not place.tensor.is_contiguous():
        yield _joined(place.path, place.name)
        return
    width = place.tensor.element_size()
    start = place.tensor.storage_offset() * width
    for name, first, end in _tensors(place, config):
        if any(gap.start < start + end * width and gap.stop > start + first * width for gap in gaps):
            yield name


def _tensors(place: Place, config: CompleteCheckpoints) -> Iterator[tuple[str, int, int]]:
    """The tensors of the checkpoint that a parameter is filled from, and the elements that each one fills."""
    if isinstance(place.layer, RoutedExperts):
        yield from _tensors_of_experts(place, place.layer)
        return
    block, _, own = place.path.rpartition(".")
    rows, numel = place.tensor.shape[0] if place.tensor.dim() else 1, place.tensor.numel()
    parts = config.packed_modules_mapping.get(own, [own])
    sizes = getattr(place.layer, "output_partition_sizes", [rows])
    if rows == 1:  # all parts share it
        yield from ((_joined(_joined(block, part), place.name), 0, numel) for part in parts)
        return
    if rows == len(parts):
        sizes = [1] * rows
    if len(parts) != len(sizes) or sum(sizes) != rows:
        parts, sizes = [own], [rows]
    first = 0
    for part, size in zip(parts, sizes, strict=True):
        yield _joined(_joined(block, part), place.name), first, first + size * (numel // rows)
        first += size * (numel // rows)


def _tensors_of_experts(place: Place, layer: Any) -> Iterator[tuple[str, int, int]]:
    matrix, _, part = place.name.partition("_")
    projections = {
        "w13": [layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name],
        "w2": [layer.ckpt_down_proj_name],
    }[matrix]
    size = place.tensor.numel() // (len(place.tensor) * len(projections))
    first = 0
    for expert in layer.expert_map_manager.get_local_expert_ids():
        for projection in projections:
            yield f"{layer.layer_name}.{expert}.{projection}.{part}", first, first + size
            first += size


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _watch_models() -> None:
    """Has every model watched that is made for such a configuration in this process."""
    record: Callable[[nn.Module], None] = loading.record_metadata_for_reloading

    @functools.wraps(record)
    def record_and_watch(model: nn.Module) -> None:
        record(model)
        config = get_current_vllm_config().quant_config
        if isinstance(config, CompleteCheckpoints):
            watch(model, config)

    loading.record_metadata_for_reloading = record_and_watch


_watch_models()
