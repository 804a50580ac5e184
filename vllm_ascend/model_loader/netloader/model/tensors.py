"""Which tensors of a model are its weights, and which of them share memory.

Weights are the parameters and the persistent buffers: exactly what the model would save. A tensor that lies within the
memory of another is an alias, so its bytes travel once. Beside them, modules hold views of weights that nobody saves;
a Mamba mixer, for example, computes with a view of its convolution's weight. Such views have to follow when the weight
moves to other memory.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping, Sequence

import msgspec
import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from vllm_ascend.model_loader.netloader.errors import UnsupportedModel
from vllm_ascend.model_loader.netloader.model.views import DTYPES, dtype_name, has_plain_format
from vllm_ascend.model_loader.netloader.weights.manifest import Alias, is_dense, span


def qualified(prefix: str, name: str) -> str:
    """The name that torch gives to what a module holds; `prefix` is the module's own, empty for the model itself."""
    return f"{prefix}.{name}" if prefix else name


def own_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers of `module` itself, by name. Its children have their own.

    Non-persistent buffers are left out: in them vLLM keeps tables that it derives from other things.
    """
    yield from module.named_parameters(recurse=False)
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            yield name, buffer


def current_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights that `model` holds by now, by name; a tensor under several names has the first of them."""
    return dict(model.named_parameters()) | persistent_buffers(model)


def persistent_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that count as weights of `model`, by name."""
    return {
        qualified(prefix, name): tensor
        for prefix, module in model.named_modules()
        for name, tensor in own_tensors(module)
        if name in module._buffers
    }


def held_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Buffers of every kind, and tensors that modules of `model` hold as plain attributes or in lists, by name."""
    for prefix, module in model.named_modules():
        for name, value in (*module._buffers.items(), *vars(module).items()):
            for tensor in value if isinstance(value, list | tuple) else (value,):
                if isinstance(tensor, torch.Tensor):
                    yield qualified(prefix, name), tensor


def require_plain_memory(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    """Raises UnsupportedModel if a manifest cannot describe how the bytes of `tensor` lie, or not on `device`."""
    if is_lazy(tensor):
        raise UnsupportedModel(f"{name} gets its shape only while it is loaded")
    if tensor.is_meta:
        raise UnsupportedModel(f"{name} has no memory before it is loaded (online quantization keeps it on meta)")
    has_inner_tensors = is_traceable_wrapper_subclass(tensor) or hasattr(tensor, "partitions")
    if has_inner_tensors or tensor.layout is not torch.strided:
        raise UnsupportedModel(f"{name} keeps its bytes in inner tensors ({type(tensor).__name__}, {tensor.layout})")
    if tensor.is_quantized or tensor.is_nested or tensor.is_neg() or tensor.is_conj():
        raise UnsupportedModel(f"{name} is quantized by torch, nested, or a view that changes signs")
    if dtype_name(tensor) not in DTYPES:
        raise UnsupportedModel(f"{name} has the dtype {tensor.dtype}, of which no tensor can be made over given memory")
    if tensor.device != device:
        raise UnsupportedModel(f"{name} is on {tensor.device}: weights are served from one device, here {device}")
    if not has_plain_format(tensor):
        raise UnsupportedModel(f"{name} lies in a private format of the device, whose bytes mean nothing elsewhere")


def separate_aliases(tensors: dict[str, torch.Tensor]) -> tuple[list[str], list[Alias]]:
    """The names of the `tensors` that own their memory, in order, and the ones that lie within the memory of those.

    Raises UnsupportedModel, naming the tensor, if one overlaps another without lying within it, or is not dense.
    """
    order = {name: number for number, name in enumerate(tensors)}
    by_address = sorted(
        (name for name in tensors if _extent(tensors[name])),
        key=lambda name: (tensors[name].data_ptr(), -_extent(tensors[name]), order[name]),
    )

    inside: dict[str, str] = {}
    base: str | None = None
    for name in by_address:
        if base is not None and tensors[name].data_ptr() < tensors[base].data_ptr() + _extent(tensors[base]):
            inside[name] = base
        else:
            base = name

    bases = [name for name in tensors if name not in inside]
    for name in bases:
        _require_dense(name, tensors[name])

    index = {name: number for number, name in enumerate(bases)}
    aliases = (name for name in tensors if name in inside)
    return bases, [_alias(name, tensors[name], index[inside[name]], tensors[inside[name]]) for name in aliases]


def further_names(
    model: nn.Module, bases: Sequence[str], aliases: Sequence[Alias], tensors: Mapping[str, torch.Tensor]
) -> list[Alias]:
    """The further names of weights that `model` has under several, as when embedding and head are one module.

    Nothing has to be done for them in a model. But what reads a state dict, like vLLM's sharded format, may know a
    weight by any of its names.
    """
    places = {id(tensor): name for name, tensor in current_tensors(model).items()}
    index = {name: number for number, name in enumerate(bases)}
    inside = {alias.name: alias for alias in aliases}

    further: list[Alias] = []
    for prefix, module in model.named_modules(remove_duplicate=False):
        saved = {**module._parameters, **module._buffers}
        for short in saved.keys() - module._non_persistent_buffers_set:
            name, tensor = qualified(prefix, short), saved[short]
            if tensor is None or name in tensors:
                continue
            first = places[id(tensor)]
            if first in inside:
                further.append(msgspec.structs.replace(inside[first], name=name))
            else:
                further.append(_alias(name, tensors[first], index[first], tensors[first]))
    return sorted(further, key=lambda alias: alias.name)


def views_of(
    bases: Sequence[torch.Tensor], others: Sequence[tuple[str, torch.Tensor]]
) -> Iterator[tuple[torch.Tensor, Alias]]:
    """The tensors among `others` that lie in host memory of one of `bases`, each with where in it.

    Raises UnsupportedModel, naming the tensor, if one lies only partly in there.
    """
    by_address = sorted((base.data_ptr(), number) for number, base in enumerate(bases) if _extent(base))
    if not by_address:
        return

    for name, tensor in others:
        if tensor.device.type != "cpu" or tensor.layout is not torch.strided or tensor.is_nested or not _extent(tensor):
            continue
        last_byte = tensor.data_ptr() + _extent(tensor) - 1
        _, number = by_address[bisect.bisect_right(by_address, (last_byte, len(bases))) - 1]
        base = bases[number]
        if base.data_ptr() <= last_byte and tensor.data_ptr() < base.data_ptr() + _extent(base):
            yield tensor, _alias(name, tensor, number, base)


def _alias(name: str, tensor: torch.Tensor, index: int, base: torch.Tensor) -> Alias:
    start = tensor.data_ptr() - base.data_ptr()
    if start < 0 or start + _extent(tensor) > _extent(base) or start % tensor.itemsize:
        raise UnsupportedModel(f"{name} overlaps the memory of another tensor without lying within it")
    return Alias(name, index, start, dtype_name(tensor), tuple(tensor.shape), tensor.stride())


def _require_dense(name: str, tensor: torch.Tensor) -> None:
    if not is_dense(tuple(tensor.shape), tensor.stride()):
        raise UnsupportedModel(f"{name} is not dense in memory: shape {list(tensor.shape)}, strides {tensor.stride()}")


def _extent(tensor: torch.Tensor) -> int:
    """Bytes from the first element to behind the last, holes included."""
    return span(tuple(tensor.shape), tensor.stride()) * tensor.itemsize
