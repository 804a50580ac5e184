"""The order, types, shapes and places of all weights of one rank.

A manifest is the address space of a transfer: a range of bytes in it means the same on both sides. Tensors lie in the
order in which the model names them, each at a multiple of `ALIGNMENT`, without overlap. A tensor in the memory of
another one is an alias, whose bytes travel once. A manifest from a peer is validated as a whole before the first byte
of weights arrives, with one error for each way to be wrong.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Annotated, Final

import msgspec

from vllm_ascend.model_loader.netloader.errors import ProtocolError
from vllm_ascend.model_loader.netloader.weights.dtypes import ITEM_BYTES
from vllm_ascend.model_loader.netloader.weights.identity import Difference

ALIGNMENT: Final = 64
"""Bytes. It is the alignment of torch's CPU allocator, to which kernels are used."""

MAX_DIMENSIONS: Final = 64
"""The number that torch allows. It also bounds the arithmetic on a manifest from a peer."""

TENSORS_LIMIT: Final = 1 << 20
"""Tensors, and aliases, of one rank."""

NBYTES_LIMIT: Final = 4 << 40
"""Bytes of all weights of one rank. Whoever has no model prepares for as much as a manifest from a peer says."""

_Sizes = Annotated[tuple[int, ...], msgspec.Meta(max_length=MAX_DIMENSIONS)]


class TensorSpec(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A tensor and its place: `shape` and `strides` in elements, `offset` in bytes from the start of the manifest.

    Its memory is dense: every element has a place of its own, and there are no holes.
    """

    name: str
    dtype: str
    shape: _Sizes
    strides: _Sizes
    offset: int

    @property
    def nbytes(self) -> int:
        """The size of the tensor."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    @property
    def end(self) -> int:
        """The offset of the first byte behind the tensor."""
        return self.offset + self.nbytes


class Alias(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A tensor in the memory of the tensor number `base`, `start` bytes from the beginning of that one.

    `shape` and `strides` are in elements.
    """

    name: str
    base: int
    start: int
    dtype: str
    shape: _Sizes
    strides: _Sizes


class _Wire(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    tensors: Annotated[tuple[TensorSpec, ...], msgspec.Meta(max_length=TENSORS_LIMIT)]
    aliases: Annotated[tuple[Alias, ...], msgspec.Meta(max_length=TENSORS_LIMIT)]


_wire_decoder = msgspec.msgpack.Decoder(_Wire)


class Manifest:
    """The tensors of one rank and the aliases in them. Immutable and valid.

    `nbytes` is the size of the address space, up to the next multiple of `ALIGNMENT` behind the last tensor.
    """

    def __init__(self, tensors: Iterable[TensorSpec], aliases: Iterable[Alias] = ()) -> None:
        """Raises ProtocolError, naming the tensor, if the description is not consistent."""
        self.tensors = tuple(tensors)
        self.aliases = tuple(aliases)
        self._validate()
        self.nbytes = _align(self.tensors[-1].end) if self.tensors else 0

    @classmethod
    def layout(
        cls, tensors: Iterable[tuple[str, str, tuple[int, ...], tuple[int, ...]]], aliases: Iterable[Alias] = ()
    ) -> Manifest:
        """Places dense `tensors`, each a name, dtype, shape and strides, one after another. Raises ProtocolError."""
        specs: list[TensorSpec] = []
        offset = 0
        for name, dtype, shape, strides in tensors:
            specs.append(TensorSpec(name, dtype, shape, strides, offset))
            offset = _align(specs[-1].end)
        return cls(specs, aliases)

    @classmethod
    def decode(cls, data: bytes) -> Manifest:
        """Reads a manifest in its encoded form. Raises ProtocolError if it cannot be read or is not consistent."""
        try:
            wire = _wire_decoder.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ProtocolError(f"the manifest cannot be read: {error}") from error
        return cls(wire.tensors, wire.aliases)

    @cached_property
    def encoded(self) -> bytes:
        """The manifest as it travels, the same for equal manifests."""
        return msgspec.msgpack.encode(_Wire(self.tensors, self.aliases))

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of the encoded manifest, in hexadecimal."""
        return hashlib.sha256(self.encoded).hexdigest()

    def mismatch(self, other: Manifest) -> tuple[Difference, ...]:
        """The tensors that differ or that only one side has, or else where their order differs; `self` is "here"."""
        ours, theirs = self._descriptions(), other._descriptions()
        names = [*ours, *(name for name in theirs if name not in ours)]
        differing = tuple(
            Difference(f"tensor {name}", ours.get(name, ""), theirs.get(name, ""))
            for name in names
            if ours.get(name) != theirs.get(name)
        )
        pairs = zip(ours, theirs, strict=False)
        return differing or tuple(Difference("order of tensors", *pair) for pair in pairs if pair[0] != pair[1])

    def _descriptions(self) -> dict[str, str]:
        described = {spec.name: _describe(spec) + f" at byte {spec.offset}" for spec in self.tensors}
        for alias in self.aliases:
            base = self.tensors[alias.base]
            described[alias.name] = f"{_describe(alias)} at byte {base.offset + alias.start}, shared with {base.name}"
        return described

    def _validate(self) -> None:
        names: set[str] = set()
        expected_offset = 0
        for spec in self.tensors:
            _validate_description(spec, names)
            if not is_dense(spec.shape, spec.strides):
                raise ProtocolError(
                    f"tensor {spec.name!r} {list(spec.shape)} is not dense: strides {list(spec.strides)}"
                )
            if spec.offset != expected_offset:
                raise ProtocolError(f"tensor {spec.name!r} lies at byte {spec.offset}: expected {expected_offset}")
            expected_offset = _align(spec.end)
            if expected_offset > NBYTES_LIMIT:
                raise ProtocolError(f"tensor {spec.name!r} ends at byte {spec.end}: at most {NBYTES_LIMIT}")
        for alias in self.aliases:
            _validate_description(alias, names)
            if not 0 <= alias.base < len(self.tensors):
                raise ProtocolError(f"alias {alias.name!r} refers to tensor number {alias.base}, which does not exist")
            if alias.start % ITEM_BYTES[alias.dtype]:
                raise ProtocolError(f"alias {alias.name!r} begins at byte {alias.start}, between two elements")
            extent = span(alias.shape, alias.strides) * ITEM_BYTES[alias.dtype]
            if alias.start < 0 or alias.start + extent > self.tensors[alias.base].nbytes:
                raise ProtocolError(f"alias {alias.name!r} reaches beyond tensor {self.tensors[alias.base].name!r}")


def chunks(nbytes: int, chunk_bytes: int) -> Iterator[tuple[int, int]]:
    """Cuts an address space of `nbytes` into (offset, length) pieces of at most `chunk_bytes`, in order."""
    for offset in range(0, nbytes, chunk_bytes):
        yield offset, min(chunk_bytes, nbytes - offset)


def is_dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether elements of `shape` and `strides` fill a block of memory, each place once, in any order of dimensions."""
    expected = 1
    if 0 in shape:
        return True
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def _align(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """The number of elements from the first to the last one, with the holes between them."""
    if 0 in shape:
        return 0
    return sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1


def _describe(spec: TensorSpec | Alias) -> str:
    strides = "" if spec.strides == contiguous_strides(spec.shape) else f" strides {list(spec.strides)}"
    return f"{spec.dtype} {list(spec.shape)}{strides}"


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides that torch gives a new tensor of `shape`."""
    strides: list[int] = []
    following = 1
    for size in reversed(shape):
        strides.append(following)
        following *= max(size, 1)
    return tuple(reversed(strides))


def _validate_description(spec: TensorSpec | Alias, names: set[str]) -> None:
    if not spec.name or spec.name in names:
        raise ProtocolError(f"tensor name {spec.name!r} is empty or appears twice")
    names.add(spec.name)
    if spec.dtype not in ITEM_BYTES:
        raise ProtocolError(f"tensor {spec.name!r} has the unknown dtype {spec.dtype!r}")
    if len(spec.shape) > MAX_DIMENSIONS:
        raise ProtocolError(f"tensor {spec.name!r} has {len(spec.shape)} dimensions: at most {MAX_DIMENSIONS}")
    if any(size < 0 for size in spec.shape) or math.prod(spec.shape) >= 1 << 60:
        raise ProtocolError(f"tensor {spec.name!r} has the impossible shape {list(spec.shape)}")
    if len(spec.shape) != len(spec.strides) or any(stride < 0 for stride in spec.strides):
        raise ProtocolError(f"tensor {spec.name!r} has strides {list(spec.strides)} for shape {list(spec.shape)}")
