"""vLLM's sharded format: which weights of a rank are in its file, under which name, and where.

`--load-format sharded_state` reads one state dict for each tensor and pipeline parallel rank, as safetensors under
vLLM's own parameter names. Of tensors that share memory it knows only those that cover it, each by the smallest of its
names (`ShardedStateLoader._filter_subtensors`). What it cannot express is refused here by name, before a byte moves.

https://github.com/huggingface/safetensors#format: the length of a header, the header as JSON, and the bytes of all
tensors in C order, one after another without holes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

import msgspec

from vllm_ascend.model_loader.netloader.errors import CannotBeWritten
from vllm_ascend.model_loader.netloader.weights.dtypes import ITEM_BYTES
from vllm_ascend.model_loader.netloader.weights.identity import ModelIdentity, RankCoordinates
from vllm_ascend.model_loader.netloader.weights.manifest import Alias, Manifest, TensorSpec

_TYPES: Final = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "uint32": "U32",
    "int32": "I32",
    "uint64": "U64",
    "int64": "I64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
}
"""The names that safetensors gives to torch's types."""
_HEADER_ALIGNMENT: Final = 8


class Segment(NamedTuple):
    """Bytes [begin, end) of the manifest's address space, and where they are in the file."""

    begin: int
    end: int
    at: int


@dataclass(frozen=True)
class Layout:
    """A file of the format. `segments` are in the order of the manifest."""

    header: bytes
    segments: tuple[Segment, ...]
    nbytes: int
    """The size of the file."""
    tensors: int


def layout_of(manifest: Manifest) -> Layout:
    """The file that holds the weights which `manifest` describes.

    Raises CannotBeWritten, naming the tensor, for what vLLM does not read from this format.
    """
    kept = sorted(_kept(manifest), key=lambda each: (-ITEM_BYTES[each.dtype], each.name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    places: dict[int, int] = {}
    at = 0
    for tensor in kept:
        size = tensor.base.nbytes
        header[tensor.name] = {
            "dtype": _TYPES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": (at, at + size),
        }
        places[tensor.base.offset] = at
        at += size

    encoded = msgspec.json.encode(header)
    encoded += b" " * (-len(encoded) % _HEADER_ALIGNMENT)
    start = len(encoded).to_bytes(8, "little") + encoded
    segments = (
        Segment(spec.offset, spec.end, len(start) + places[spec.offset]) for spec in manifest.tensors if spec.nbytes
    )
    return Layout(start, tuple(segments), len(start) + at, len(kept))


def file_name(coordinates: RankCoordinates) -> str:
    """The name under which vLLM looks for the weights of a rank."""
    if coordinates.pp_size > 1:
        return f"model-pp-{coordinates.pp_rank}-tp-{coordinates.tp_rank}-part-0.safetensors"
    return f"model-rank-{coordinates.tp_rank}-part-0.safetensors"


def require_expressible(identity: ModelIdentity, coordinates: RankCoordinates) -> None:
    """Raises CannotBeWritten for what the format has no place for, whatever the tensors are."""
    if identity.role != "target":
        raise CannotBeWritten(f"the {identity.role} weights: the format holds one model, the target")
    if coordinates.ep_size not in (1, coordinates.tp_size) or coordinates.pcp_size > 1:
        raise CannotBeWritten(
            f"experts that are spread over {coordinates.ep_size} ranks: the format has a file for each of the "
            f"{coordinates.tp_size} tensor parallel ranks, and none for each replica of data or context parallelism"
        )
    if identity.load_options:
        raise CannotBeWritten(f"weights that were loaded with {identity.load_options}: they depend on it")


def require_no_attributes(names: Iterable[str]) -> None:
    """Raises CannotBeWritten for what loading has set on the model beside its tensors."""
    if names := sorted(names):
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise CannotBeWritten(f"{names[0]}{more}, which loading sets on the model beside its tensors")


class _Kept(NamedTuple):
    """A tensor in the file: its own name, type and shape, and the tensor of the manifest that has its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    base: TensorSpec


def _kept(manifest: Manifest) -> Iterator[_Kept]:
    same: dict[int, list[TensorSpec | Alias]] = {number: [spec] for number, spec in enumerate(manifest.tensors)}
    for alias in manifest.aliases:
        if _has_elements(alias):
            _require_readable(alias)
        base = manifest.tensors[alias.base]
        if alias.start == 0 and _nbytes(alias) == base.nbytes:
            same[alias.base].append(alias)

    for number, spec in enumerate(manifest.tensors):
        if spec.nbytes:
            _require_readable(spec)
            first = min(same[number], key=lambda each: each.name)
            if first.dtype not in _TYPES:
                raise CannotBeWritten(f"{first.name} of type {first.dtype}, which safetensors does not know")
            yield _Kept(first.name, first.dtype, first.shape, spec)


def _require_readable(tensor: TensorSpec | Alias) -> None:
    """Raises CannotBeWritten for a tensor over which vLLM's loader stumbles, whether it would be in the file or not.

    It looks for the last element in a flat view of the tensor, which there is only where all dimensions are one
    regular sequence. A tensor that fills its memory is one exactly if it is contiguous.
    """
    dimensions = [(size, stride) for size, stride in zip(tensor.shape, tensor.strides, strict=True) if size > 1]
    pairs = itertools.pairwise(dimensions)
    if any(stride != inner_size * inner for (_, stride), (inner_size, inner) in pairs):
        raise CannotBeWritten(f"{tensor.name}, whose elements lie in another order than that of its dimensions")


def _has_elements(tensor: Alias) -> bool:
    return 0 not in tensor.shape


def _nbytes(tensor: Alias) -> int:
    size = ITEM_BYTES[tensor.dtype]
    for each in tensor.shape:
        size *= each
    return size
