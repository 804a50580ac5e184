"""Which tensors of a model are its weights, and how they get into the memory that is served.

`ModelWeights` knows which tensors of a model are weights and moves them into an arena: parameters are rebound to views
of it before anything is loaded, so that the disk loader, too, writes straight into it and the bytes exist once.
Persistent buffers count as weights; they are small and stay where they are, their contents are copied. `LiveWeights`
are those on an accelerator: they are served from where they are, and filled there.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import mmap
import os
from collections.abc import Iterator, Sequence
from typing import Final

import numpy
import numpy.typing
import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from vllm_ascend.model_loader.netloader.errors import UnsupportedModel
from vllm_ascend.model_loader.netloader.model.attributes import own_tensors, qualified
from vllm_ascend.model_loader.netloader.model.buffers import (
    DTYPES,
    bind_alias,
    dtype_name,
    flat,
    has_plain_format,
    manifest_of,
    tensor_in,
)
from vllm_ascend.model_loader.netloader.model.live import LiveMemory
from vllm_ascend.model_loader.netloader.weights.arena import Arena, allocate
from vllm_ascend.model_loader.netloader.weights.manifest import Alias, Manifest, TensorSpec, is_dense, span
from vllm_ascend.model_loader.netloader.weights.memory import Memory

_CPU: Final = torch.device("cpu")


class ModelWeights:
    """The weights of `model` before post-processing, in the order in which the model names them."""

    def __init__(self, model: nn.Module, device: torch.device = _CPU) -> None:
        """Raises UnsupportedModel, naming the tensor, where the memory cannot be described by a manifest."""
        self.device = device
        self._parameters = dict(model.named_parameters())
        self._buffers = dict(_persistent_buffers(model))
        tensors = {name: tensor.data for name, tensor in (self._parameters | self._buffers).items()}
        for name, tensor in tensors.items():
            _require_plain_memory(name, self._parameters.get(name, tensor), device)
        bases, aliases = _separate_aliases(tensors)
        self.manifest = manifest_of(((name, tensors[name]) for name in bases), aliases)
        travelling = {id(tensor) for tensor in (*self._parameters.values(), *self._buffers.values())}
        others = [(name, tensor) for name, tensor in _all_tensors(model) if id(tensor) not in travelling]
        aliased = [((self._parameters | self._buffers)[alias.name], alias) for alias in aliases]
        self._followers = [*aliased, *_views_of([tensors[name] for name in bases], others)]

    def allocate(self) -> Memory:
        """Memory for all of it. Raises UnsupportedModel where there is none, or NoRoom."""
        return allocate(self.manifest)

    def bind(self, memory: Memory) -> None:
        """Makes the parameters views of `memory`, which holds all bytes, and copies the buffers out of it."""
        for spec in self.manifest.tensors:
            view = tensor_in(memory, spec)
            if spec.name in self._buffers:
                flat(self._buffers[spec.name]).copy_(flat(view))
            else:
                self._parameters[spec.name].data = view
        self._bind_aliases()

    def move_into(self, memory: Memory) -> None:
        """Makes the parameters views of the empty `memory`, keeping what the model has initialised so far.

        Memory that was never touched is not copied: it holds nothing.
        """
        files = list(_mapped_files())
        for spec in self.manifest.tensors:
            view = tensor_in(memory, spec)
            if spec.name in self._parameters:
                _copy_touched_pages(view, self._parameters[spec.name].data, files)
                self._parameters[spec.name].data = view
        self._bind_aliases()

    def collect_into(self, model: nn.Module, memory: Memory) -> None:
        """Brings into `memory` what a weight loader put elsewhere, and the buffers. Call it after loading.

        Raises UnsupportedModel where loading replaced parameters, changed a type or shape, or parted shared memory.
        """
        for spec, tensor in self._loaded(model):
            view = tensor_in(memory, spec)
            if tensor.data_ptr() != view.data_ptr():
                if tensor.stride() == view.stride():
                    flat(view).copy_(flat(tensor.data))
                else:
                    view.copy_(tensor.data)
                if spec.name in self._parameters:
                    tensor.data = view
        self._bind_aliases()

    def _loaded(self, model: nn.Module) -> Iterator[tuple[TensorSpec, torch.Tensor]]:
        """The tensors that own their memory. Raises as `collect_into`."""
        tensors, loaded = self._parameters | self._buffers, current_tensors(model)
        for name in tensors.keys() | loaded.keys():
            if tensors.get(name) is not loaded.get(name):
                raise UnsupportedModel(f"loading replaced, added or removed {name}")
        for alias in self.manifest.aliases:
            base = tensors[self.manifest.tensors[alias.base].name]
            if tensors[alias.name].data_ptr() != base.data_ptr() + alias.start:
                raise UnsupportedModel(f"loading parted {alias.name} from the memory that it shared")
        for spec in self.manifest.tensors:
            tensor = tensors[spec.name]
            if tensor.data.dtype != DTYPES[spec.dtype] or tensor.shape != spec.shape:
                raise UnsupportedModel(
                    f"loading changed {spec.name} from {spec.dtype} {list(spec.shape)} "
                    f"to {tensor.dtype} {list(tensor.shape)}"
                )
            yield spec, tensor

    def _bind_aliases(self) -> None:
        for follower, alias in self._followers:
            base = self.manifest.tensors[alias.base].name
            if base in self._parameters:  # a buffer stays where it is, and so does what lies in it
                follower.data = bind_alias(self._parameters[base].data, alias)


class LiveWeights(ModelWeights):
    """Those of a model on an accelerator: `allocate` takes the parameters and buffers as they are."""

    def allocate(self) -> LiveMemory:
        return LiveMemory(self.manifest, self._parameters | self._buffers, self.device)

    def bind(self, memory: Memory) -> None:
        """What arrives is in its place already."""

    def move_into(self, memory: Memory) -> None:
        """It is loaded where it is."""

    def collect_into(self, model: nn.Module, memory: Memory) -> None:
        """Notes where a weight loader has put tensors. Raises as that of ModelWeights."""
        assert isinstance(memory, LiveMemory)
        loaded = dict(self._loaded(model))
        for spec, tensor in loaded.items():
            if tensor.stride() != spec.strides:
                raise UnsupportedModel(f"loading changed the strides of {spec.name} to {tensor.stride()}")
            _require_plain_memory(spec.name, tensor, self.device)
        memory.hold({spec.name: tensor for spec, tensor in loaded.items()})


def current_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """What `model` holds as its weights by now, by name."""
    return dict(model.named_parameters()) | dict(_persistent_buffers(model))


def changed_tensors(model: nn.Module, manifest: Manifest, arena: Arena, names: Sequence[str] | None) -> list[str]:
    """Weights whose contents, type or shape in `model` are no longer those of the sealed `arena`, by name.

    `names` restricts it to tensors whose name contains one of them.
    """
    current = current_tensors(model)
    wanted = (spec for spec in manifest.tensors if names is None or any(name in spec.name for name in names))
    original = numpy.frombuffer(arena.reader(), numpy.uint8)
    return [spec.name for spec in wanted if not _holds(current.get(spec.name), spec, original[spec.offset : spec.end])]


def _holds(tensor: torch.Tensor | None, spec: TensorSpec, contents: numpy.typing.NDArray[numpy.uint8]) -> bool:
    if tensor is None or tensor.device.type != "cpu" or tensor.layout is not torch.strided:
        return False
    if (dtype_name(tensor), tuple(tensor.shape), tensor.stride()) != (spec.dtype, spec.shape, spec.strides):
        return False
    return numpy.array_equal(flat(tensor.data).numpy(), contents)


def _persistent_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for prefix, module in model.named_modules():
        for name, tensor in own_tensors(module):
            if name in module._buffers:
                yield qualified(prefix, name), tensor


def _all_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Buffers of every kind and tensors that modules hold as plain attributes, also in lists."""
    for prefix, module in model.named_modules():
        for name, value in (*module._buffers.items(), *vars(module).items()):
            for tensor in value if isinstance(value, list | tuple) else (value,):
                if isinstance(tensor, torch.Tensor):
                    yield qualified(prefix, name), tensor


def _views_of(
    bases: list[torch.Tensor], others: list[tuple[str, torch.Tensor]]
) -> Iterator[tuple[torch.Tensor, Alias]]:
    """Those of `others` that lie in the memory of one of `bases`: they have to go where it goes.

    A Mamba mixer, for example, computes with a view of its convolution's weight.
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


def _require_plain_memory(name: str, tensor: torch.Tensor, device: torch.device) -> None:
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


def _separate_aliases(tensors: dict[str, torch.Tensor]) -> tuple[list[str], list[Alias]]:
    """Names of the tensors that own their memory, in order, and the tensors that lie within the memory of those."""
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


def _copy_touched_pages(destination: torch.Tensor, source: torch.Tensor, files: list[tuple[int, int]]) -> None:
    begin, end = source.data_ptr(), source.data_ptr() + source.numel() * source.itemsize
    for first, last in _touched_pages(begin, end, files):
        start, stop = max(first, begin), min(last, end)
        ctypes.memmove(destination.data_ptr() + start - begin, start, stop - start)


def _touched_pages(begin: int, end: int, files: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Address ranges around [begin, end) whose pages exist in memory or swap.

    Reads the table that Linux describes in Documentation/admin-guide/mm/pagemap.rst. Where that is not readable, and in
    `files`, whose pages hold contents before anybody touches them, every page counts as touched.
    """
    first, last = begin // mmap.PAGESIZE, -(-end // mmap.PAGESIZE)
    if first == last:
        return
    following = bisect.bisect_right(files, begin, key=lambda file: file[1])
    if following < len(files) and files[following][0] < end:
        yield first * mmap.PAGESIZE, last * mmap.PAGESIZE
        return
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            entries = numpy.frombuffer(os.pread(pagemap.fileno(), (last - first) * 8, first * 8), dtype=numpy.uint64)
    except OSError:
        yield first * mmap.PAGESIZE, last * mmap.PAGESIZE
        return
    present = (entries >> numpy.uint64(62)) != 0
    edges = numpy.flatnonzero(numpy.diff(present, prepend=False, append=False)).tolist()
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        yield (first + start) * mmap.PAGESIZE, (first + stop) * mmap.PAGESIZE


def _mapped_files() -> Iterator[tuple[int, int]]:
    """Address ranges of this process that show files, ascending; proc(5), /proc/pid/maps."""
    with contextlib.suppress(OSError), open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        for line in maps:
            addresses, _, _, _, inode, *_ = line.split(maxsplit=5)
            if inode != "0":
                start, stop = addresses.split("-")
                yield int(start, 16), int(stop, 16)
