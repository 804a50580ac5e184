"""What a model in use must have, so that a reload reaches everything that it computes with.

This is what can be found by looking: at names, types and shapes, at which tensors share memory, and at the few things
that no comparison of tensors shows. What shows only when it is tried is found by `rehearsal`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping

import torch
from torch import nn
from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUInt8ScaledMMLinearKernel

from vllm_ascend.model_loader.netloader.engine.takeover import Tensors
from vllm_ascend.model_loader.netloader.errors import ReloadRefused
from vllm_ascend.model_loader.netloader.model.inverses import has_memory
from vllm_ascend.model_loader.netloader.model.tensors import own_tensors, qualified

Layout = tuple[torch.dtype | None, tuple[int, ...]]
"""Type and shape of a tensor. The type of an empty one is None: vLLM gives it whatever is the default at the time."""


def require_reloadable(model: nn.Module) -> None:
    """Raises ReloadRefused if `model` sleeps, or if its reload would leave wrong weights that no comparison shows."""
    for name, parameter in model.named_parameters():
        if parameter.numel() and has_memory(parameter) and not parameter.untyped_storage().nbytes():
            raise ReloadRefused(f"{name} has no memory while this instance sleeps: wake its weights up first")
    if hasattr(model, "process_weights_after_loading"):
        raise ReloadRefused(
            f"{type(model).__name__} processes its weights as a whole after loading, which vLLM's reload leaves out: "
            f"start the instance anew to change its weights"
        )
    for name, layer in model.named_modules():
        kernel = getattr(getattr(layer, "scheme", None), "kernel", None)
        if isinstance(kernel, CPUInt8ScaledMMLinearKernel) and hasattr(kernel, "dnnl_handler"):
            raise ReloadRefused(
                f"{name} has vLLM's CPU kernel for int8, which goes on reading the scales of a reload after they are "
                f"freed: start the instance anew to change its weights"
            )


def require_counterparts(weights: Tensors, layers: Mapping[str, nn.Module]) -> None:
    """Raises ReloadRefused if the `layers` in use lack something, or have one memory for two different tensors."""
    sharing: dict[Hashable, tuple[str, torch.Tensor]] = {}
    for path, tensors in weights.items():
        if path not in layers:
            raise ReloadRefused(f"the model in use has no module {path}: start the instance anew to change its weights")
        for name, tensor in tensors.items():
            for memory in _memory(layers[path], name):
                first, contents = sharing.setdefault(memory, (qualified(path, name), tensor))
                if not equal(contents, tensor):
                    raise ReloadRefused(
                        f"{first} and {qualified(path, name)} are one tensor in the model in use, and two different "
                        f"ones in the new weights: start the instance anew to change its weights"
                    )


def require_that_views_follow(scratch: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Raises ReloadRefused if processing has parted a weight from a view of it, which a reload would then miss."""
    weights = {
        _storage(tensor): (prefix, name)
        for prefix, module in scratch.named_modules()
        for name, tensor in own_tensors(module)
        if tensor.numel()
    }
    for prefix, module in scratch.named_modules():
        for name, tensor in _derived_tensors(module):
            if not tensor.is_meta and _storage(tensor) in weights:
                owner, weight = weights[_storage(tensor)]
                view, viewed = getattr(layers[prefix], name, None), getattr(layers[owner], weight, None)
                if view is None or viewed is None or _storage(view) != _storage(viewed):
                    raise ReloadRefused(
                        f"{qualified(prefix, name)} is a view of what {qualified(owner, weight)} was before it was "
                        f"processed, which a reload does not change: start the instance anew to change its weights"
                    )


def _derived_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    buffers = {name: module._buffers[name] for name in module._non_persistent_buffers_set}
    for name, value in (vars(module) | buffers).items():
        if isinstance(value, torch.Tensor) and value.numel() and value.layout is torch.strided:
            yield name, value


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _memory(layer: nn.Module, name: str) -> Iterator[Hashable]:
    """Keys of the memory of a tensor of `layer`: if two tensors have one in common, they are one."""
    yield id(layer), name
    tensor = getattr(layer, name, None)
    if isinstance(tensor, torch.Tensor) and tensor.numel() and not tensor.is_meta:
        yield tensor.data_ptr(), tensor.device, layout(tensor)


def require_same_layout(path: str, expected: Mapping[str, torch.Tensor], layer: nn.Module) -> None:
    """Raises ReloadRefused if `layer`, in use under the name `path`, has tensors of other layouts than `expected`."""
    found = dict(own_tensors(layer))
    for name in expected.keys() | found.keys():
        if layout(expected.get(name)) != layout(found.get(name)):
            raise ReloadRefused(
                f"{qualified(path, name)} is {_text(found.get(name))} in use, and would be "
                f"{_text(expected.get(name))} after a reload: start the instance anew to change its weights"
            )


def layout(tensor: torch.Tensor | None) -> Layout | None:
    """The layout of `tensor`, None if there is none."""
    return None if tensor is None else (tensor.dtype if tensor.numel() else None, tuple(tensor.shape))


def _text(tensor: torch.Tensor | None) -> str:
    return "missing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}".removeprefix("torch.")


def equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are equal bit for bit, so that NaN equals itself."""
    if layout(one) != layout(other):
        return False
    mine, theirs = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(mine, theirs)
