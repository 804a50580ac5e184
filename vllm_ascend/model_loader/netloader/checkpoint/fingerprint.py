"""The fingerprint of a checkpoint's files, by which its weights are recognised wherever they are.

Of a checkpoint of any size it takes only kilobytes: the names and sizes of the files, what each file says about its
contents, and small samples. A safetensors file lists the names, types and shapes of its tensors. The archive that
`torch.save` writes keeps a CRC-32 of each tensor, so there any change shows.

Samples are shared out by kind of tensor, such as `layers.*.self_attn.q_proj.weight`; in an archive, which has no names,
tensors of one size are a kind. Each kind gets the same number of samples, spread over its tensors. So a fine-tune of
one kind in all layers shows, however few bytes it touches. Two checkpoints of one layout have the same fingerprint only
if they are equal wherever a sample was taken.
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
"""Bytes that are read of a file's own description of its contents. In known models it is smaller than 1 MiB."""
SAMPLES_PER_CHECKPOINT: Final = 1024
"""Shared by the kinds of tensors. Each kind gets at least one, so there may be more if there are more kinds."""
SAMPLE_BYTES: Final = 256
OPEN_FILES: Final = 16
"""Files that are open at a time: a checkpoint may have hundreds, and a process few descriptors left."""
_NUMBERS: Final = re.compile(r"[0-9]+")


class File(NamedTuple):
    """A file of a checkpoint: its name within the checkpoint, and its path on this host."""

    name: str
    path: str


def where_they_are(folder: str, paths: Iterable[str]) -> tuple[str, list[str]]:
    """`folder` and the `paths` in it, by the real path of the folder, since a link to it may soon lead elsewhere.

    Links within the folder are kept. In the cache of the hub they lead to names without a suffix, which loaders need.
    """
    real_folder = os.path.realpath(folder)
    return real_folder, [os.path.join(real_folder, os.path.relpath(path, folder)) for path in paths]


def files_in(folder: str | os.PathLike[str], paths: Iterable[str | os.PathLike[str]]) -> list[File]:
    """The files at `paths`, which are somewhere in `folder`, in the order of their names."""
    return sorted(File(os.path.relpath(path, folder), os.fspath(path)) for path in paths)


def require_complete(folder: str | os.PathLike[str], files: Sequence[File]) -> None:
    """Raises FileNotFoundError if `files` lack some that the index of a checkpoint in torch's format names.

    That is what an interrupted download leaves. For safetensors vLLM itself compares the files with the index.
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
    """The fingerprint of the checkpoint that `files` make up in this order, in hexadecimal; empty if there are none.

    Raises OSError if a file cannot be read.
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
    """Opens `file` for reading and gives its descriptor. Raises OSError if it cannot, or if it is no regular file."""
    descriptor = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # else a pipe waits for its writer
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "no regular file", file.path)
        yield descriptor
    finally:
        os.close(descriptor)


class _Middle(NamedTuple):
    """The middle of a tensor: the tensor's kind, and the offset in the file."""

    kind: str
    offset: int


def _outline(file: File, descriptor: int, size: int) -> tuple[bytes, Iterable[_Middle]]:
    """What a file says about its contents, and the middles of its tensors; both are empty if it says nothing."""
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
    """The middles of the tensors that the header lists; none if it is not the header of a safetensors file."""
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
"""End of central directory record: the directory's size and place. https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT"""
_LOCATOR: Final = struct.Struct("<4s4xQ4x")
"""Zip64 end of central directory locator: the place of the Zip64 end of central directory record."""
_END_64: Final = struct.Struct("<4s36xQQ")
"""Zip64 end of central directory record: the size and place of the central directory."""
_ENTRY: Final = struct.Struct("<4s16xLLHHH8xL")
"""Central directory header: compressed size, size, lengths of name, extra field and comment, place of the entry."""
_LOCAL_HEADER_BYTES: Final = 30
_TOO_LARGE: Final = 0xFFFFFFFF
"""Stands in for a value that is in the Zip64 extra field."""


def _archive_directory(descriptor: int, size: int) -> bytes:
    """The central directory of a zip file without a comment, as torch writes it; empty if the file is not one."""
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
    """About the middle of each record. The directory does not say by how much the beginning of a record is padded."""
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
    """The `values` of a directory entry, where those that are too large for it are taken from the Zip64 extra field."""
    large: Iterator[tuple[int]] = iter(())
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<HH", extra)
        if kind == 1:
            field = extra[4 : 4 + length]
            large = struct.iter_unpack("<Q", field[: len(field) // 8 * 8])
        extra = extra[4 + length :]
    return [next(large, (value,))[0] if value == _TOO_LARGE else value for value in values]


class _Place(NamedTuple):
    """A place for a sample: the middle of a tensor, or of a part of a file that does not say where its tensors are."""

    kind: str
    file: int
    offset: int


def _places(file: int, middles: Iterable[_Middle], size: int) -> list[_Place]:
    """The middle of each tensor, or places spread evenly over the file if there are no `middles`."""
    places = [_Place(kind, file, offset) for kind, offset in middles if offset < size]
    if places:
        return sorted(places, key=lambda place: place.offset)
    parts = SAMPLES_PER_CHECKPOINT
    return [_Place("file", file, size * position // parts) for position in range(parts)]


def _chosen(places: list[_Place]) -> list[_Place]:
    """As many places of each kind, spread evenly over its tensors, in the order in which they lie in the files."""
    kinds: dict[str, list[_Place]] = {}
    for place in places:
        kinds.setdefault(place.kind, []).append(place)

    chosen: list[_Place] = []
    left = SAMPLES_PER_CHECKPOINT
    for done, members in enumerate(sorted(kinds.values(), key=len)):  # small kinds first: the others share what is left
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
            for descriptor, offset in offsets:  # so that the storage works on all of them at once
                os.posix_fadvise(descriptor, offset, SAMPLE_BYTES, os.POSIX_FADV_WILLNEED)
            for descriptor, offset in offsets:
                yield os.pread(descriptor, SAMPLE_BYTES, offset)
