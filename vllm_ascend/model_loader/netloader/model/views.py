"""Tensors as the bytes that they lie in, and bytes as tensors. Nothing here copies: both are the same memory.

A manifest describes tensors without torch, by names of types, shapes and strides. This module is where these names
become torch's own types, and where a description becomes a tensor.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, Final

import torch

from vllm_ascend.model_loader.netloader.weights.dtypes import ITEM_BYTES
from vllm_ascend.model_loader.netloader.weights.manifest import Alias, Manifest, TensorSpec

DTYPES: Final[dict[str, torch.dtype]] = {name: getattr(torch, name) for name in ITEM_BYTES}
"""torch's type for each name that a manifest may use."""
_PLAIN_FORMATS: Final = (-1, 0, 2, 30)
"""Formats of torch-npu's tensors whose bytes lie as torch's do: undefined, NCHW, ND, NCDHW (CANN, aclFormat)."""


def dtype_name(tensor: torch.Tensor) -> str:
    """The type of `tensor` as a manifest names it, such as ``bfloat16``."""
    return str(tensor.dtype).removeprefix("torch.")


def manifest_of(tensors: Iterable[tuple[str, torch.Tensor]], aliases: Iterable[Alias] = ()) -> Manifest:
    """The manifest that places dense `tensors` one after another, and `aliases` within them.

    Raises ProtocolError, naming the tensor, if one cannot be described.
    """
    described = ((name, dtype_name(tensor), tuple(tensor.shape), tensor.stride()) for name, tensor in tensors)
    return Manifest.layout(described, aliases)


def view_of(memory: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """A tensor of the type, shape and strides of `spec` over `memory`, the uint8 tensor of all its bytes."""
    dtype = DTYPES[spec.dtype]
    if spec.nbytes == 0:
        return torch.empty_strided(spec.shape, spec.strides, dtype=dtype, device=memory.device)
    view = torch.empty(0, dtype=dtype, device=memory.device)
    return view.set_(memory.untyped_storage(), memory.storage_offset() // dtype.itemsize, spec.shape, spec.strides)


def bind_alias(base: torch.Tensor, alias: Alias) -> torch.Tensor:
    """The tensor that `alias` describes, in the storage of `base`, which must begin with its storage."""
    dtype = DTYPES[alias.dtype]
    view = torch.empty(0, dtype=dtype, device=base.device)
    view.set_(base.untyped_storage(), alias.start // dtype.itemsize, alias.shape, alias.strides)
    return view


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """All bytes of a dense tensor as a one-dimensional uint8 tensor, in the order in which they lie in memory."""
    start, nbytes = tensor.storage_offset() * tensor.itemsize, tensor.numel() * tensor.itemsize
    empty = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return empty.set_(tensor.data.untyped_storage(), start, (nbytes,), (1,))


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a one-dimensional tensor in host memory, as Python sees it."""
    contents: Any = tensor.numpy()
    return memoryview(contents)


def as_tensor(memory: memoryview) -> torch.Tensor:
    """A one-dimensional uint8 tensor over host memory. Do not write to it if `memory` is read-only."""
    if not memory.nbytes:
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch knows no read-only tensors, and warns
        return torch.frombuffer(memory, dtype=torch.uint8)


def has_plain_format(tensor: torch.Tensor) -> bool:
    """Whether the bytes lie as shape and strides say. On an NPU they may have a private format such as FRACTAL_NZ."""
    return tensor.device.type != "npu" or torch.ops.npu.get_npu_format(tensor) in _PLAIN_FORMATS
