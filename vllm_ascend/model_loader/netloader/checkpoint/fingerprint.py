"""The fingerprint of a checkpoint's files, by which its weights are recognised wherever they are.

A fingerprint reads kilobytes of a checkpoint of any size: file names and sizes, what each file says of itself, and
small samples. A safetensors file says its tensors' names, types and shapes; the archive that `torch.save` writes keeps
a CRC-32 of each tensor, so that there any change shows. Each kind of tensor (`layers.*.self_attn.q_proj.weight`; in an
archive, which does not tell names, the tensors of one size) gets as many samples as any other, spread over its tensors,
so that a fine-tune of one kind in all layers shows, however few bytes it touches. Two checkpoints of one layout have
the same fingerprint only if they differ in no place that a sample touches.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import re
import stat
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

HEADER_LIMIT: Final = 8 << 20
"""Bytes that are read of what a file says of itself; in known models that is below 1 MiB."""
SAMPLES_PER_CHECKPOINT: Final = 1024
"""Shared by the kinds of tensors; a kind gets at least one, whatever the sum."""
SAMPLE_BYTES: Final = 256
OPEN_FILES: Final = 16
"""Open at a time: a process may have few descriptors left, and a checkpoint hundreds of files."""
_NUMBERS: Final = re.compile(r"[0-9]+")


class File(NamedTuple):
    """A file of a checkpoint: its name in there, and where it is here."""

    name: str
    path: str


def where_they_are(folder: str, paths: Iterable[str]) -> tuple[str, list[str]]:
    """`folder` and `paths` in it, by the real path of the folder: a link to it may lead elsewhere in a moment.

    Links within are kept: those of a hub's cache lead to names without a suffix, and loaders go by that.
    """
    real_folder = os.path.realpath(folder)
    return real_folder, [os.path.join(real_folder, os.path.relpath(path, folder)) for path in paths]


def files_in(folder: str | os.PathLike[str], paths: Iterable[str | os.PathLike[str]]) -> list[File]:
    """`paths`, which are somewhere in `folder`, in the order of their names."""
    return sorted(File(os.path.relpath(path, folder), os.fspath(path)) for path in paths)


def require_complete(folder: str | os.PathLike[str], files: Sequence[File]) -> None:
    """Raises FileNotFoundError where files are missing that an index of torch's format names.

    An interrupted download says nothing about the model. Of safetensors vLLM looks itself.
    """
    if not any(file.name.endswith(".bin") for file in files):
        return
    try:
        named = json.loads(Path(folder, "pytorch_model.bin.index.json").read_bytes())["weight_map"].values()
        missing = sorted({str(name) for name in named} - {file.name for file in files})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return
    if missing:
        raise FileNotFoundError(errno.ENOENT, f"{len(missing)} of its files are missing, among them", missing[0])


def checkpoint_fingerprint(files: Sequence[File]) -> str:
    """Fingerprint of `files`, which make up a checkpoint, in this order; empty where there are none.

    Raises OSError where a file cannot be read.
    """
    if not files:
        return ""
    digest = hashlib.sha256()
    places: list[_Place] = []
    for number, file in enumerate(files):
        with opened_regular(file) as descriptor:
            size = os.fstat(descriptor).st_size
            header, middles = _outline(file, descriptor, size)
        digest.update(f"{file.name}\0{size}\0".encode())
        digest.update(header)
        places += _places(number, middles, size)
    for sample in _read_samples(files, _chosen(places)):
        digest.update(sample)
    return digest.hexdigest()


@contextlib.contextmanager
def opened_regular(file: File) -> Iterator[int]:
    """A descriptor of `file`. Raises OSError."""
    descriptor = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # else a pipe waits for its writer
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "no regular file", file.path)
        yield descriptor
    finally:
        os.close(descriptor)


class _Middle(NamedTuple):
    """The byte of a file that is in the middle of a tensor."""

    kind: str
    offset: int


def _outline(file: File, descriptor: int, size: int) -> tuple[bytes, Iterable[_Middle]]:
    """What a file says of its contents, and where they are; both empty where it does not."""
    if file.name.endswith(".safetensors"):
        header = _safetensors_header(descriptor, size)
        return header, _safetensors_middles(header)
    directory = _archive_directory(descriptor, size)
    return directory, _archive_middles(directory)


def _safetensors_header(descriptor: int, size: int) -> bytes:
    """The length prefix and the JSON after it: https://github.com/huggingface/safetensors#format"""
    prefix = os.pread(descriptor, 8, 0)
    length = min(int.from_bytes(prefix, "little"), HEADER_LIMIT, max(size - 8, 0))
    return prefix + os.pread(descriptor, length, 8)


def _safetensors_middles(header: bytes) -> Iterator[_Middle]:
    """Nothing where the header is none."""
    try:
        entries = msgspec.json.decode(header[8:])
        for name, entry in entries.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                if isinstance(begin, int) and isinstance(end, int) and 0 <= begin <= end:
                    yield _Middle(_NUMBERS.sub("*", name), len(header) + (begin + end) // 2)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return


_END: Final = struct.Struct("<4s4x4xLL2x")
"""End of central directory record: its size and place. https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT"""
_LOCATOR: Final = struct.Struct("<4s4xQ4x")
"""Zip64 end of central directory locator: the place of the next one."""
_END_64: Final = struct.Struct("<4s36xQQ")
"""Zip64 end of central directory record."""
_ENTRY: Final = struct.Struct("<4s16xLLHHH8xL")
"""Central directory header: sizes (compressed, as it is), lengths of name, extra field and comment, and place."""
_LOCAL_HEADER_BYTES: Final = 30
_TOO_LARGE: Final = 0xFFFFFFFF
"""Stands where the value is in the Zip64 extra field."""


def _archive_directory(descriptor: int, size: int) -> bytes:
    """The central directory of a zip file without a comment, as torch writes it; empty where there is none."""
    tail = os.pread(descriptor, _LOCATOR.size + _END.size, max(size - _LOCATOR.size - _END.size, 0))
    if len(tail) < _LOCATOR.size + _END.size:
        return b""
    signature, length, place = _END.unpack_from(tail, _LOCATOR.size)
    if signature != b"PK\5\6":
        return b""
    signature, place_of_end = _LOCATOR.unpack_from(tail)
    if signature == b"PK\6\7" and place_of_end < size:
        end = os.pread(descriptor, _END_64.size, place_of_end)
        if len(end) < _END_64.size or end[:4] != b"PK\6\6":
            return b""
        _, length, place = _END_64.unpack(end)
    return os.pread(descriptor, min(length, HEADER_LIMIT), place) if place + length <= size else b""


def _archive_middles(directory: bytes) -> Iterator[_Middle]:
    """About the middle of each record: what pads the beginning of one is not told."""
    at = 0
    while at + _ENTRY.size <= len(directory):
        signature, packed, size, name_length, extra_length, comment_length, place = _ENTRY.unpack_from(directory, at)
        if signature != b"PK\1\2":
            return
        at += _ENTRY.size
        name = directory[at : at + name_length].decode(errors="replace")
        extra = directory[at + name_length : at + name_length + extra_length]
        _, packed, place = _large_values(extra, (size, packed, place))
        at += name_length + extra_length + comment_length
        yield _Middle(f"{_NUMBERS.sub('*', name)} of {packed}", place + _LOCAL_HEADER_BYTES + name_length + packed // 2)


def _large_values(extra: bytes, values: tuple[int, ...]) -> list[int]:
    """`values` of a directory header, with those that are kept in the Zip64 extra field."""
    large: Iterator[tuple[int]] = iter(())
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<HH", extra)
        if kind == 1:
            field = extra[4 : 4 + length]
            large = struct.iter_unpack("<Q", field[: len(field) // 8 * 8])
        extra = extra[4 + length :]
    return [next(large, (value,))[0] if value == _TOO_LARGE else value for value in values]


class _Place(NamedTuple):
    """Where one tensor, or one part of a file that tells none, may be sampled."""

    kind: str
    file: int
    offset: int


def _places(file: int, middles: Iterable[_Middle], size: int) -> list[_Place]:
    """The middle of each tensor; evenly over the file if it tells none."""
    places = [_Place(kind, file, offset) for kind, offset in middles if offset < size]
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


def _read_samples(files: Sequence[File], places: list[_Place]) -> Iterator[bytes]:
    by_file = [(files[number], list(members)) for number, members in itertools.groupby(places, lambda each: each.file)]
    for begin in range(0, len(by_file), OPEN_FILES):
        with contextlib.ExitStack() as opened:
            batch = by_file[begin : begin + OPEN_FILES]
            descriptors = [opened.enter_context(opened_regular(file)) for file, _ in batch]
            offsets = [
                (descriptor, place.offset)
                for descriptor, (_, members) in zip(descriptors, batch, strict=True)
                for place in members
            ]
            for descriptor, offset in offsets:  # so that the storage works on all at once
                os.posix_fadvise(descriptor, offset, SAMPLE_BYTES, os.POSIX_FADV_WILLNEED)
            for descriptor, offset in offsets:
                yield os.pread(descriptor, SAMPLE_BYTES, offset)
