"""The weights of a model, and how they get into the memory that is served.

There are two kinds of memory, and one class for each. On the CPU, `ArenaWeights` makes the parameters views of an arena
before anything is loaded, so that the loader of checkpoints, too, writes straight into it and the bytes exist once.
Persistent buffers are small and stay where they are; their contents are copied. On an accelerator, `LiveWeights` serves
parameters and buffers from where they are.

Either way a load calls the same methods. `allocate` comes first. For what a source delivers, `bind` follows. For a load
from disk, `move_into` comes before it and `collect_into` after it. Then post-processing may change the parameters:
`note_originals` is for before, `find_changes` for after it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar, Final

import numpy
import numpy.typing
import torch
from torch import nn

from vllm_ascend.model_loader.netloader.errors import UnsupportedModel
from vllm_ascend.model_loader.netloader.model.device_memory import tensor_in
from vllm_ascend.model_loader.netloader.model.live import LiveMemory
from vllm_ascend.model_loader.netloader.model.originals import Int8Cache
from vllm_ascend.model_loader.netloader.model.pages import copy_touched, mapped_files
from vllm_ascend.model_loader.netloader.model.tensors import (
    current_tensors,
    further_names,
    held_tensors,
    persistent_buffers,
    require_plain_memory,
    separate_aliases,
    views_of,
)
from vllm_ascend.model_loader.netloader.model.views import DTYPES, bind_alias, dtype_name, flat, manifest_of
from vllm_ascend.model_loader.netloader.weights.arena import Arena, allocate
from vllm_ascend.model_loader.netloader.weights.manifest import Alias, TensorSpec, chunks
from vllm_ascend.model_loader.netloader.weights.memory import Memory

PIECE_BYTES: Final = 4 << 20
"""Bytes that are copied to an accelerator at a time, by way of a bucket of that size."""
_CPU: Final = torch.device("cpu")
_NO_CACHE: Final = Int8Cache()


class ModelWeights(ABC):
    """The weights of one model before post-processing, in the order in which the model names them."""

    keeps_originals: ClassVar[bool]
    """Whether the memory keeps what was loaded, whatever post-processing does to the model."""

    def __init__(self, model: nn.Module, device: torch.device, cache: Int8Cache) -> None:
        """`cache` says which originals are to be kept when post-processing changes them.

        Raises UnsupportedModel, naming the tensor, if a manifest cannot describe where the weights lie.
        """
        self.device = device
        self.cache = cache
        self._parameters = dict(model.named_parameters())
        self._buffers = persistent_buffers(model)
        tensors = {name: tensor.data for name, tensor in self._tensors.items()}
        for name, tensor in tensors.items():
            require_plain_memory(name, self._parameters.get(name, tensor), device)

        bases, self._aliases = separate_aliases(tensors)
        further = further_names(model, bases, self._aliases, tensors)
        self.manifest = manifest_of(((name, tensors[name]) for name in bases), [*self._aliases, *further])

        travelling = {id(tensor) for tensor in self._tensors.values()}
        others = [(name, tensor) for name, tensor in held_tensors(model) if id(tensor) not in travelling]
        self._followers: list[tuple[torch.Tensor, Alias]] = [
            *((self._tensors[alias.name], alias) for alias in self._aliases),
            *views_of([tensors[name] for name in bases], others),
        ]

    @property
    def _tensors(self) -> dict[str, torch.Tensor]:
        return self._parameters | self._buffers

    @abstractmethod
    def allocate(self) -> Memory:
        """Memory for all weights. Whoever calls it closes it.

        Raises UnsupportedModel if there is none, and NoRoom if this process would be killed for filling it.
        """

    @abstractmethod
    def memory_from(self, pages: Arena) -> Memory:
        """Memory with the contents of sealed `pages`, which it takes over, also if it fails. The caller closes it.

        Raises UnsupportedModel if there is none.
        """

    @abstractmethod
    def bind(self, memory: Memory) -> None:
        """Gives the model the contents of `memory`, which must be complete."""

    @abstractmethod
    def move_into(self, memory: Memory) -> None:
        """Makes a load from disk fill the empty `memory`, without losing what the model has initialised so far."""

    @abstractmethod
    def collect_into(self, model: nn.Module, memory: Memory) -> None:
        """Completes `memory` after a load from disk.

        Raises UnsupportedModel if loading replaced parameters, changed a type or shape, or parted shared memory.
        """

    @abstractmethod
    def note_originals(self, memory: Memory) -> None:
        """Prepares `memory` for post-processing, which may change what it serves.

        Raises UnsupportedModel if it cannot be served afterwards.
        """

    @abstractmethod
    def find_changes(self, model: nn.Module, memory: Memory) -> list[str] | None:
        """The names of the weights that post-processing has changed in `model`, None if nobody wants to know.

        `model` need not be the one that was filled. Raises UnsupportedModel, naming the tensors, if an original that is
        to be served cannot be had.
        """

    def _loaded(self, model: nn.Module) -> Iterator[tuple[TensorSpec, torch.Tensor]]:
        """The tensors that own their memory, after a load from disk. Raises as `collect_into`."""
        tensors, loaded = self._tensors, current_tensors(model)
        for name in tensors.keys() | loaded.keys():
            if tensors.get(name) is not loaded.get(name):
                raise UnsupportedModel(f"loading replaced, added or removed {name}")

        for alias in self._aliases:
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


class ArenaWeights(ModelWeights):
    """The weights of a model in host memory, served from an arena."""

    keeps_originals = True

    def __init__(self, model: nn.Module, cache: Int8Cache = _NO_CACHE) -> None:
        """Raises UnsupportedModel, naming the tensor, if a manifest cannot describe where the weights lie."""
        super().__init__(model, _CPU, cache)

    def allocate(self) -> Memory:
        """An empty arena, whose pages are being made in the background. Raises UnsupportedModel or NoRoom."""
        return allocate(self.manifest)

    def memory_from(self, pages: Arena) -> Memory:
        """The pages themselves."""
        return pages

    def bind(self, memory: Memory) -> None:
        """Makes the parameters views of `memory`, which must be complete, and copies the buffers out of it."""
        for spec in self.manifest.tensors:
            view = tensor_in(memory, spec)
            if spec.name in self._buffers:
                flat(self._buffers[spec.name]).copy_(flat(view))
            else:
                self._parameters[spec.name].data = view
        self._bind_followers()

    def move_into(self, memory: Memory) -> None:
        """Makes the parameters views of the empty `memory`, and copies what the model has initialised so far."""
        files = mapped_files()
        for spec in self.manifest.tensors:
            view = tensor_in(memory, spec)
            if spec.name in self._parameters:
                copy_touched(view, self._parameters[spec.name].data, files)
                self._parameters[spec.name].data = view
        self._bind_followers()

    def collect_into(self, model: nn.Module, memory: Memory) -> None:
        """Brings into `memory` the buffers, and the parameters that a weight loader has put elsewhere.

        Raises UnsupportedModel if loading replaced parameters, changed a type or shape, or parted shared memory.
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
        self._bind_followers()

    def note_originals(self, memory: Memory) -> None:
        """Does nothing: a sealed arena keeps the originals of all weights."""

    def find_changes(self, model: nn.Module, memory: Memory) -> list[str] | None:
        """The names of the weights that differ in `model` from the sealed arena in contents, type, shape or strides.

        INT8_CACHE_NAME restricts it to some names. None if INT8_CACHE is off, and for a model on an accelerator, whose
        weights are all elsewhere.
        """
        current = current_tensors(model)
        if self.cache.place == "no" or not all(tensor.device.type in ("cpu", "meta") for tensor in current.values()):
            return None
        original = numpy.frombuffer(memory.reader()[0 : memory.nbytes], numpy.uint8)
        return [
            spec.name
            for spec in self.manifest.tensors
            if self.cache.may_cover(spec.name)
            and not _is_original(current.get(spec.name), spec, original[spec.offset : spec.end])
        ]

    def _bind_followers(self) -> None:
        for follower, alias in self._followers:
            base = self.manifest.tensors[alias.base].name
            if base in self._parameters:  # a buffer stays where it is, and so does what lies in it
                follower.data = bind_alias(self._parameters[base].data, alias)


class LiveWeights(ModelWeights):
    """The weights of a model on an accelerator, served from where they are."""

    keeps_originals = False

    def __init__(self, model: nn.Module, device: torch.device, cache: Int8Cache = _NO_CACHE) -> None:
        """Raises UnsupportedModel, naming the tensor, if a manifest cannot describe where the weights lie."""
        super().__init__(model, device, cache)

    def allocate(self) -> LiveMemory:
        """The parameters and buffers as they are."""
        return LiveMemory(self.manifest, self._tensors, self.device)

    def memory_from(self, pages: Arena) -> Memory:
        """The parameters and buffers as they are, with one copy of the pages in them.

        Raises UnsupportedModel if the device fails at it.
        """
        memory = self.allocate()
        try:
            data = pages.reader()
            for offset, length in chunks(self.manifest.nbytes, PIECE_BYTES):
                landing = memory.landing(offset, length)
                landing.host[:] = data[offset : offset + length]
                landing.settle()
        except (OSError, RuntimeError) as error:
            raise UnsupportedModel(f"{self.device} failed when weights were copied to it: {error}") from error
        finally:
            pages.close()
        return memory

    def bind(self, memory: Memory) -> None:
        """Does nothing: what has arrived is in its place already."""

    def move_into(self, memory: Memory) -> None:
        """Does nothing: a load from disk fills the parameters where they are."""

    def collect_into(self, model: nn.Module, memory: Memory) -> None:
        """Notes where a weight loader has put tensors.

        Raises UnsupportedModel if loading replaced parameters, changed a type, shape or strides, or parted shared
        memory.
        """
        loaded = dict(self._loaded(model))
        for spec, tensor in loaded.items():
            if tensor.stride() != spec.strides:
                raise UnsupportedModel(f"loading changed the strides of {spec.name} to {tensor.stride()}")
            require_plain_memory(spec.name, tensor, self.device)
        _live(memory).hold({spec.name: tensor for spec, tensor in loaded.items()})

    def note_originals(self, memory: Memory) -> None:
        """Notes what every tensor holds, and copies the smallest and those that INT8_CACHE covers.

        Nothing holds the tensors themselves from then on, so that post-processing frees what it replaces. Raises
        UnsupportedModel if the device fails at it.
        """
        self._parameters, self._buffers, self._followers = {}, {}, []
        _live(memory).remember(self.cache)

    def find_changes(self, model: nn.Module, memory: Memory) -> list[str]:
        """The names of the weights that post-processing has changed in `model`.

        They are served through proven inverses or from their copies. Raises UnsupportedModel, naming the tensors, if
        one is neither to be had by an inverse nor kept.
        """
        return _live(memory).reconcile(model)


def weights_of(model: nn.Module, device: torch.device, cache: Int8Cache) -> ModelWeights:
    """The weights of `model`, which lie on `device`. `cache` says which originals are to be kept.

    Raises UnsupportedModel, naming the tensor, if a manifest cannot describe where they lie.
    """
    return ArenaWeights(model, cache) if device.type == "cpu" else LiveWeights(model, device, cache)


def _is_original(tensor: torch.Tensor | None, spec: TensorSpec, original: numpy.typing.NDArray[numpy.uint8]) -> bool:
    if tensor is None or tensor.device.type != "cpu" or tensor.layout is not torch.strided:
        return False
    if (dtype_name(tensor), tuple(tensor.shape), tensor.stride()) != (spec.dtype, spec.shape, spec.strides):
        return False
    return numpy.array_equal(flat(tensor.data).numpy(), original)


def _live(memory: Memory) -> LiveMemory:
    """The memory of LiveWeights, which is always what its `allocate` has returned."""
    assert isinstance(memory, LiveMemory)
    return memory
