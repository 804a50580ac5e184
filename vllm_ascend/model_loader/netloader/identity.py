"""Which weights these are, and which part of them one rank holds.

Two values decide whether one process may take another's bytes: `ModelIdentity` (the model and everything that
changes its bytes) and `RankCoordinates` (the partition). Both are frozen, travel as they are, and answer
`mismatch(other)` with the fields that differ, so that a refusal can name them.

A model is recognised by its content where possible. Where both sides see the checkpoint files, their fingerprints
decide and paths do not matter. Where one does not (a client may have no weights at all), the names decide: the
configured MODEL, a hub repository, or, as a last resort, the same path.

The fingerprint reads kilobytes of a checkpoint of any size: file names and sizes, safetensors headers (names, types,
shapes), and small samples. Each kind of tensor (`layers.*.self_attn.q_proj.weight`) gets as many samples as any other,
spread over its tensors, so that a fine-tune of one kind in all layers shows, however few bytes it touches. Two
checkpoints of one layout have the same fingerprint only if they differ in no place that a sample touches.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

FINGERPRINT_PATTERNS: Final = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
HEADER_LIMIT: Final = 8 << 20
"""Bytes of a safetensors header that are read; the headers of known models are below 1 MiB."""
SAMPLES_PER_CHECKPOINT: Final = 1024
"""Shared by the kinds of tensors; a kind gets at least one, whatever the sum."""
SAMPLE_BYTES: Final = 256
_NUMBERS: Final = re.compile(r"[0-9]+")


class Difference(msgspec.Struct, frozen=True, array_like=True):
    """One field in which two sides differ, with both values as text."""

    field: str
    ours: str
    theirs: str

    def flipped(self) -> Difference:
        """The same as seen from the other side."""
        return Difference(self.field, self.theirs, self.ours)

    def __str__(self) -> str:
        return f"{self.field} (here {self.ours or 'none'}, there {self.theirs or 'none'})"


class RankCoordinates(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A worker's place in the partition. Data-parallel replicas of one rank hold the same bytes, so dp is absent."""

    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    pcp_rank: int = 0
    pcp_size: int = 1
    ep_rank: int = 0
    ep_size: int = 1
    expert_placement: str = ""

    def mismatch(self, other: RankCoordinates) -> tuple[Difference, ...]:
        return _differing_fields(self, other, self.__struct_fields__)


class ModelIdentity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What decides a model's bytes, as seen by one process.

    `name` is MODEL, a hub repository or a path (`name_is_path`); `fingerprint` is empty where no checkpoint file was
    found. Digests are hexadecimal; `versions` names the software whose layouts must agree.
    """

    name: str
    architecture: str
    config_digest: str
    dtype: str
    name_is_path: bool = False
    revision: str = ""
    quantization: str = ""
    fingerprint: str = ""
    role: str = "target"
    load_options: str = ""
    versions: Mapping[str, str] = {}

    def mismatch(self, other: ModelIdentity) -> tuple[Difference, ...]:
        """The fields in which `other` differs, `self` being "here"."""
        exempt = {"name_is_path", *self._fields_without_evidence(other)}
        return _differing_fields(self, other, [field for field in self.__struct_fields__ if field not in exempt])

    def _fields_without_evidence(self, other: ModelIdentity) -> set[str]:
        if not (self.fingerprint and other.fingerprint):
            return {"fingerprint"}
        if self.name_is_path or other.name_is_path:
            return {"name", "revision"}
        return set()


def canonical_digest(value: Any) -> str:
    """SHA-256 of `value` as JSON with sorted keys; what JSON lacks is represented by its text, a set in order."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), default=_as_json)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _as_json(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)


def checkpoint_fingerprint(directory: str | os.PathLike[str]) -> str:
    """Fingerprint of the weight files directly in `directory`, empty where there are none.

    Only the first pattern of `FINGERPRINT_PATTERNS` that matches counts, as vLLM's loader reads only that one.
    Raises OSError where a file cannot be read.
    """
    files = next(filter(None, (sorted(Path(directory).glob(pattern)) for pattern in FINGERPRINT_PATTERNS)), [])
    if not files or not _complete(Path(directory), files[0].suffix):
        return ""
    digest = hashlib.sha256()
    with contextlib.ExitStack() as opened:
        descriptors = [opened.enter_context(open(file, "rb", buffering=0)).fileno() for file in files]
        places: list[_Place] = []
        for number, (file, descriptor) in enumerate(zip(files, descriptors, strict=True)):
            size = os.fstat(descriptor).st_size
            header = _safetensors_header(descriptor, size) if file.suffix == ".safetensors" else b""
            digest.update(f"{file.name}\0{size}\0".encode())
            digest.update(header)
            places += _places(number, header, size)
        for sample in _read_samples(descriptors, _chosen(places)):
            digest.update(sample)
    return digest.hexdigest()


def _complete(directory: Path, suffix: str) -> bool:
    """Whether all files are there that an index names: an interrupted download says nothing about the model."""
    for index in directory.glob(f"*{suffix}.index.json"):
        try:
            named = set(json.loads(index.read_bytes())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
        if not all((directory / str(name)).is_file() for name in named):
            return False
    return True


def _safetensors_header(descriptor: int, size: int) -> bytes:
    """The length prefix and the JSON after it: https://github.com/huggingface/safetensors#format"""
    prefix = os.pread(descriptor, 8, 0)
    length = min(int.from_bytes(prefix, "little"), HEADER_LIMIT, max(size - 8, 0))
    return prefix + os.pread(descriptor, length, 8)


class _Place(NamedTuple):
    """Where one tensor, or one part of a file that names none, may be sampled."""

    kind: str
    file: int
    offset: int


def _places(file: int, header: bytes, size: int) -> list[_Place]:
    """The middle of each tensor; evenly over the file if it names none."""
    places = [
        _Place(_NUMBERS.sub("*", name), file, middle) for name, middle in _tensor_middles(header) if middle < size
    ]
    if places:
        return sorted(places, key=lambda place: place.offset)
    parts = SAMPLES_PER_CHECKPOINT
    return [_Place("file", file, size * position // parts) for position in range(parts)]


def _chosen(places: list[_Place]) -> list[_Place]:
    """Equally many of each kind, evenly over its tensors from the first to the last, in the order of the files."""
    kinds: dict[str, list[_Place]] = {}
    for place in places:
        kinds.setdefault(place.kind, []).append(place)
    chosen: list[_Place] = []
    left = SAMPLES_PER_CHECKPOINT
    for done, members in enumerate(sorted(kinds.values(), key=len)):  # what small kinds leave goes to the large ones
        count = min(len(members), max(1, left // (len(kinds) - done)))
        steps = max(count - 1, 1)
        chosen += (members[position * (len(members) - 1) // steps] for position in range(count))
        left -= count
    return sorted(chosen, key=lambda place: (place.file, place.offset))


def _read_samples(descriptors: list[int], places: list[_Place]) -> Iterator[bytes]:
    for place in places:  # so that the storage works on all at once
        os.posix_fadvise(descriptors[place.file], place.offset, SAMPLE_BYTES, os.POSIX_FADV_WILLNEED)
    for place in places:
        yield os.pread(descriptors[place.file], SAMPLE_BYTES, place.offset)


def _tensor_middles(header: bytes) -> Iterator[tuple[str, int]]:
    """Names of tensors and the byte of the file in the middle of each; nothing where the header is none."""
    try:
        entries = msgspec.json.decode(header[8:])
        for name, entry in entries.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                if isinstance(begin, int) and isinstance(end, int) and 0 <= begin <= end:
                    yield name, len(header) + (begin + end) // 2
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return


def _differing_fields(ours: msgspec.Struct, theirs: msgspec.Struct, names: Any) -> tuple[Difference, ...]:
    pairs = ((name, getattr(ours, name), getattr(theirs, name)) for name in names)
    return tuple(Difference(name, _text(here), _text(there)) for name, here, there in pairs if here != there)


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {value[key]}" for key in sorted(value))
    return str(value)
