"""Weights in a file of the directory that is being written: what has arrived lies in its final place on disk.

So no weights are held in memory, and a pull that was interrupted finds in the file what it had. A file that is being
filled has another name than one that is complete. A complete one may be read by anybody at any time, so nothing is ever
written into it: it is only read as long as it is right, and where something has to be fetched, a copy takes its place.
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from vllm_ascend.model_loader.netloader.errors import DirectoryFailed
from vllm_ascend.model_loader.netloader.pull.sharded_state import Layout
from vllm_ascend.model_loader.netloader.transport.chunks.inventory import Inventory
from vllm_ascend.model_loader.netloader.transport.digests import digest_of
from vllm_ascend.model_loader.netloader.weights.memory import Landing, Memory, Readable

PARTIAL = ".part"
"""What the name of a file ends in that is not complete."""
_OPENED: Final = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
_COPY_BYTES: Final = 16 << 20


class FileMemory(Memory):
    """The file `path`, laid out by `layout`, for an address space of `nbytes`. Whoever made it closes it.

    Chunks may settle in several threads.
    """

    def __init__(self, path: Path, layout: Layout, nbytes: int) -> None:
        """Opens or makes the file. Raises DirectoryFailed where that is not possible, or there is no room."""
        self.nbytes = nbytes
        self.path = path
        self._partial = path.with_name(path.name + PARTIAL)
        self._layout = layout
        self._begins = [segment.begin for segment in layout.segments]
        self._lock = threading.Lock()
        self._failure: DirectoryFailed | None = None
        with _translated(path):
            self._is_partial, self._descriptor = self._open()

    @property
    def servable(self) -> bool:
        return False

    @property
    def failure(self) -> DirectoryFailed | None:
        """What has kept a chunk from being written, if anything has."""
        return self._failure

    def landing(self, offset: int, length: int, *, apart: bool = False) -> Landing:
        return _Bucket(self, offset, length)

    def contents(self) -> Readable:
        return _FileContents(self)

    reader = contents

    def seal(self) -> None:
        """Does nothing: others read what has passed, and compare it themselves."""

    def digests(self) -> dict[int, bytes]:
        """The digests of all chunks as they are in the file, by number; none of a file that was just made.

        Raises DirectoryFailed where the file cannot be read.
        """
        if not self._had_contents:
            return {}
        contents = self.contents()
        with _translated(self.path):
            return {
                chunk.number: digest_of(contents[chunk.offset : chunk.offset + chunk.length])
                for chunk in Inventory(self.nbytes).chunks
            }

    def retire(self) -> None:
        """Removes the complete file that this one is to replace, if there is one. Raises DirectoryFailed."""
        with _translated(self.path):
            if self._is_partial:
                self.path.unlink(missing_ok=True)

    def finish(self) -> None:
        """Gives the complete file its name, once its bytes are on the disk. Raises DirectoryFailed."""
        with _translated(self.path), self._lock:
            if self._is_partial:
                os.fsync(self._descriptor)
                os.rename(self._partial, self.path)
                self._is_partial = False

    def close(self) -> None:
        """Leaves the file as it is. Idempotent."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def read(self, begin: int, end: int) -> bytearray:
        """Bytes [begin, end) of the address space. What lies between tensors is zero. Raises OSError."""
        data = bytearray(end - begin)
        view = memoryview(data)
        for start, stop, at in self._pieces(begin, end):
            done = start
            while done < stop:
                count = os.preadv(self._descriptor, [view[done - begin : stop - begin]], at + done - start)
                if not count:
                    raise OSError(errno.EIO, "the file is shorter than it was", str(self.path))
                done += count
        return data

    def write(self, begin: int, data: memoryview) -> None:
        """Puts `data` at `begin` of the address space. Raises OSError."""
        try:
            self._begin_to_write()
            for start, stop, at in self._pieces(begin, begin + data.nbytes):
                done = start
                while done < stop:
                    done += os.pwrite(self._descriptor, data[done - begin : stop - begin], at + done - start)
        except OSError as error:
            self._failure = _failed(self.path, error)
            raise

    def _pieces(self, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
        """The parts of [begin, end) that belong to tensors, each with its place in the file."""
        segments = self._layout.segments
        for number in range(max(bisect.bisect_right(self._begins, begin) - 1, 0), len(segments)):
            segment = segments[number]
            if segment.begin >= end:
                return
            start, stop = max(begin, segment.begin), min(end, segment.end)
            if start < stop:
                yield start, stop, segment.at + start - segment.begin

    def _begin_to_write(self) -> None:
        with self._lock:
            if not self._is_partial:
                complete, self._descriptor = self._descriptor, self._copy()
                os.close(complete)
                self._is_partial = True

    def _open(self) -> tuple[bool, int]:
        """Whether the file is one that is being filled, and its descriptor."""
        self._had_contents = True
        if self._has_layout(self._partial):
            descriptor = os.open(self._partial, _OPENED)
        elif self._has_layout(self.path):
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            if os.fstat(descriptor).st_size == self._layout.nbytes:
                return False, descriptor
            os.close(descriptor)
            descriptor = self._copy()
        else:
            self._had_contents = False
            self._partial.unlink(missing_ok=True)
            descriptor = os.open(self._partial, _OPENED | os.O_CREAT | os.O_EXCL, 0o644)

        try:
            self._prepare(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        return True, descriptor

    def _copy(self) -> int:
        """The descriptor of a copy of the complete file, under the name of one that is being filled."""
        self._partial.unlink(missing_ok=True)
        copy = os.open(self._partial, _OPENED | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            with self.path.open("rb") as complete, os.fdopen(os.dup(copy), "wb") as file:
                shutil.copyfileobj(complete, file, _COPY_BYTES)
        except BaseException:
            os.close(copy)
            raise
        return copy

    def _has_layout(self, path: Path) -> bool:
        """Whether there is a file that begins as this one has to."""
        try:
            with path.open("rb") as file:
                return file.read(len(self._layout.header)) == self._layout.header
        except FileNotFoundError:
            return False

    def _prepare(self, descriptor: int) -> None:
        """Gives the file its size and its header, and the disk a chance to say that it is full."""
        os.ftruncate(descriptor, self._layout.nbytes)
        try:
            os.posix_fallocate(descriptor, 0, self._layout.nbytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
        os.pwrite(descriptor, self._layout.header, 0)


class _Bucket(Landing):
    """Host memory for one chunk, which goes to the file when it has passed."""

    def __init__(self, memory: FileMemory, offset: int, length: int) -> None:
        self._memory = memory
        self._offset = offset
        self._bytes = memoryview(bytearray(length))

    @property
    def host(self) -> memoryview:
        return self._bytes

    def arrived(self, begin: int, end: int) -> memoryview:
        return self._bytes[begin:end]

    def settle(self) -> None:
        self._memory.write(self._offset, self._bytes)


class _FileContents(Readable):
    """The bytes of the address space, read from the file when they are asked for."""

    def __init__(self, memory: FileMemory) -> None:
        self._memory = memory

    @property
    def nbytes(self) -> int:
        return self._memory.nbytes

    def __getitem__(self, part: slice, /) -> memoryview:
        begin, end, _ = part.indices(self.nbytes)
        return memoryview(self._memory.read(begin, end))


@contextlib.contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _failed(path, error) from error


def _failed(path: Path, error: OSError) -> DirectoryFailed:
    return DirectoryFailed(f"{path} cannot be written: {error.strerror or error}")
