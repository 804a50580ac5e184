"""New weights for a model that is already in use, through vLLM's layerwise reload.

Post-processing may have replaced a model's parameters, so new raw weights cannot be written over them. A second,
scratch model of the same configuration takes them first, exactly as at the first load: from a source or from disk, in
host memory, in an arena that is served afterwards. Only when it is complete does the model in use change, layer by
layer: vLLM gives a layer its raw tensors back, they are filled, post-processed, and copied into the memory that the
model computes with. So whatever goes wrong while weights are fetched leaves the instance as it was, and it goes on
serving what it has.

vLLM's `reload_weights` knows checkpoints only: it takes an iterator from the loader's `get_all_weights` and gives it
to the model's `load_weights`. `hand_over` lends the model a `load_weights` for that one iterator.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUInt8ScaledMMLinearKernel
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info, make_online_process_loader
from vllm.model_executor.model_loader.reload.meta import SKIP_LOAD_TENSORS
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.platforms import current_platform
from vllm.utils.torch_utils import set_default_torch_dtype

from vllm_ascend.distributed.gather import agreed
from vllm_ascend.model_loader.netloader.attributes import own_tensors, qualified
from vllm_ascend.model_loader.netloader.errors import ReloadRefused


def require_reloadable(model: nn.Module) -> None:
    """Raises ReloadRefused where vLLM would compute with wrong weights afterwards."""
    for name, layer in model.named_modules():
        kernel = getattr(getattr(layer, "scheme", None), "kernel", None)
        if isinstance(kernel, CPUInt8ScaledMMLinearKernel):
            raise ReloadRefused(
                f"{name} has vLLM's CPU kernel for int8, which goes on reading the scales of a reload after they are "
                f"freed: start the instance anew to change its weights"
            )


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
    """What every rank does within, all have done afterwards; where one fails, it fails on all.

    Raises ReloadRefused where another rank failed.
    """
    try:
        yield
    except BaseException:
        agreed(False)
        raise
    if not agreed(True):
        raise ReloadRefused("another rank of this instance could not get its weights, see its log: nothing was changed")


def scratch_model(vllm_config: VllmConfig, model_config: ModelConfig) -> nn.Module:
    """A model like the one in use, before loading, unknown to the engine; in host memory, which has room for it."""
    config = copy.copy(vllm_config)
    config.compilation_config = copy.copy(vllm_config.compilation_config)
    config.compilation_config.static_forward_context = {}  # where layers register, each name once
    config.compilation_config.static_all_moe_layers = []
    with set_default_torch_dtype(model_config.dtype), torch.device("cpu"):
        model: nn.Module = initialize_model(vllm_config=config, model_config=model_config)
    return model


def hand_over(
    complete: nn.Module, model: nn.Module, dtype: torch.dtype, then: Callable[[], None], otherwise: Callable[[], None]
) -> Iterator[tuple[str, torch.Tensor]]:
    """What `get_all_weights` returns: given this iterator, `model.load_weights` takes over `complete`.

    `then` runs after it. Given any other iterator, it does what it always does, and the weights are given up.
    `otherwise` runs if the iterator is read instead, which fails and leaves the model as it is. `dtype` is the model's.
    """

    def read_elsewhere() -> Iterator[tuple[str, torch.Tensor]]:
        vars(model).pop("load_weights", None)
        otherwise()
        raise ReloadRefused("Netloader brings weights as a model loads them: set is_checkpoint_format to true")
        yield

    nothing_to_read = read_elsewhere()

    def load_weights(weights: Any) -> Any:
        vars(model).pop("load_weights", None)
        if weights is not nothing_to_read:
            load_checkpoint: Any = model.load_weights  # the class's own
            return load_checkpoint(weights)
        with set_default_torch_dtype(dtype):  # as at the first load: CPU kernels for int8 give results of that type
            loaded = take_over(complete, model)
        then()
        return loaded

    vars(model)["load_weights"] = load_weights
    return nothing_to_read


@torch.no_grad()
def take_over(complete: nn.Module, model: nn.Module) -> set[str]:
    """Loads the raw weights of `complete` into `model` between vLLM's initialize_ and finalize_layerwise_reload.

    Returns the names of the tensors.
    """
    _prepare_experts(model)
    layers = {name.replace(".base_layer", ""): layer for name, layer in model.named_modules()}  # LoRA wraps layers
    loaded: set[str] = set()
    for prefix, source in complete.named_modules():
        tensors = dict(own_tensors(source))
        _load_layer(layers[prefix], tensors)
        loaded.update(qualified(prefix, name) for name in tensors)
    return loaded


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


def _load_layer(layer: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Gives `layer` tensors that need neither splitting nor stacking; with the last one vLLM processes the layer."""
    in_place = [name for name in tensors if not getattr(layer, name).is_meta]  # vLLM leaves biases where they are
    for name in in_place:
        getattr(layer, name).data.copy_(tensors[name])
        if name not in SKIP_LOAD_TENSORS:
            get_layerwise_info(layer).load_numel += tensors[name].numel()
    for name in tensors.keys() - set(in_place):
        target = getattr(layer, name)
        target.weight_loader = _copy
        target.weight_loader = make_online_process_loader(layer, name)
        target.weight_loader(target, tensors[name].data)


def _copy(param: torch.Tensor, loaded_weight: torch.Tensor) -> None:
    """A weight loader; vLLM finds the first argument by its name."""
    param.data.copy_(loaded_weight)
