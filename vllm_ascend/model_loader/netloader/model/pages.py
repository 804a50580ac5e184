"""Copies only such memory of this process as somebody has written to. Reading the rest would give it pages for nothing.

vLLM makes parameters with `torch.empty`, and loading fills them later. Until then their pages do not exist, and Linux
says which ones do: in its page map, and for memory that shows a file, in the list of mappings.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import mmap
import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy
import torch


class Range(NamedTuple):
    """The addresses from `begin` to before `end`."""

    begin: int
    end: int


def copy_touched(destination: torch.Tensor, source: torch.Tensor, files: list[Range]) -> None:
    """Copies the bytes of `source` that exist in memory or swap to `destination`, which has the same size.

    Both are dense and in host memory. `files` are the `mapped_files` of this process.
    """
    place = Range(source.data_ptr(), source.data_ptr() + source.numel() * source.itemsize)
    for touched in _touched(place, files):
        begin, end = max(touched.begin, place.begin), min(touched.end, place.end)
        ctypes.memmove(destination.data_ptr() + begin - place.begin, begin, end - begin)


def mapped_files() -> list[Range]:
    """Where this process has mapped files, in ascending order; see proc(5), /proc/pid/maps. Empty if unknown."""
    ranges: list[Range] = []
    with contextlib.suppress(OSError), open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        for line in maps:
            addresses, _, _, _, inode, *_ = line.split(maxsplit=5)
            if inode != "0":
                begin, end = addresses.split("-")
                ranges.append(Range(int(begin, 16), int(end, 16)))
    return ranges


def _touched(place: Range, files: list[Range]) -> Iterator[Range]:
    """Runs of pages that exist in memory or swap, and together cover all of `place` that does.

    In a file, pages have contents before anybody touches them, so there every page counts. So does every page where the
    page map, described in Linux's Documentation/admin-guide/mm/pagemap.rst, cannot be read.
    """
    first, last = place.begin // mmap.PAGESIZE, -(-place.end // mmap.PAGESIZE)
    if first == last:
        return
    whole = Range(first * mmap.PAGESIZE, last * mmap.PAGESIZE)
    if _is_in_a_file(place, files):
        yield whole
        return

    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            entries = numpy.frombuffer(os.pread(pagemap.fileno(), (last - first) * 8, first * 8), dtype=numpy.uint64)
    except OSError:
        yield whole
        return

    exists = (entries >> numpy.uint64(62)) != 0
    edges = numpy.flatnonzero(numpy.diff(exists, prepend=False, append=False)).tolist()
    for begin, end in zip(edges[::2], edges[1::2], strict=True):
        yield Range((first + begin) * mmap.PAGESIZE, (first + end) * mmap.PAGESIZE)


def _is_in_a_file(place: Range, files: list[Range]) -> bool:
    following = bisect.bisect_right(files, place.begin, key=lambda file: file.end)
    return following < len(files) and files[following].begin < place.end
