"""One block of host memory that holds all weights of a rank, laid out by its manifest.

It is a `memfd`, filled through a shared mapping. Before it is served it is sealed: the file gets the seals against
writing, shrinking and growing, and the mapping of this process is replaced in place by a private one. From then on
nobody can change what is served, neither a peer nor post-processing that writes into parameters, and no truncation can
raise SIGBUS in a peer. A peer on the same host adopts the descriptor and maps the very same pages privately, so nothing
is copied until somebody writes. It may have the descriptor before that and wait for the seal; then nothing but the
mapping that this process has already can write to the file any more.

To make pages costs more than to fill them, so `make_pages` runs beside the work that brings the bytes, and ahead of it.

The mapping lives as long as the arena, and as any tensor over a `block` of it. When the last tensor over a block dies,
the private copies that this process has of the block's pages are freed; after `free_with_tensors`, so are the pages
themselves.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import threading
import weakref
from typing import Final

from vllm_ascend.model_loader.netloader.errors import NoRoom, TransportError, UnsupportedModel
from vllm_ascend.model_loader.netloader.weights.manifest import Manifest
from vllm_ascend.model_loader.netloader.weights.memory import Landing, Memory
from vllm_ascend.model_loader.netloader.weights.memory_limit import room

_MAP_FIXED: Final = 0x10
_MAP_NORESERVE: Final = 0x4000
_MADV_POPULATE_WRITE: Final = 23
_F_ADD_SEALS: Final = 1033
_F_GET_SEALS: Final = 1034
_F_SEAL_SEAL: Final = 0x1
_F_SEAL_SHRINK: Final = 0x2
_F_SEAL_GROW: Final = 0x4
_F_SEAL_WRITE: Final = 0x8
_F_SEAL_FUTURE_WRITE: Final = 0x10
_KEEP_SIZE: Final = 0x1
_PUNCH_HOLE: Final = 0x2
_REQUIRED_SEALS: Final = _F_SEAL_SHRINK | _F_SEAL_GROW | _F_SEAL_WRITE
PAGES_STEP: Final = 32 << 20
"""Bytes whose pages are made by one system call, so that the thread that makes them can stop soon."""

# ctypes calls release the GIL; the mmap module's own madvise does not.
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Arena(Memory):
    """Host memory of `nbytes`, made by `create` or `adopt`. Closing it gives up the file; tensors stay valid."""

    def __init__(self, nbytes: int, descriptor: int, mapping: mmap.mmap) -> None:
        """Takes over `descriptor`, whose file `mapping` shows."""
        self.nbytes = nbytes
        self._descriptor = descriptor
        self._give_up_descriptor = weakref.finalize(self, os.close, descriptor)
        self._mapping = mapping
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        self._blocks: weakref.WeakValueDictionary[tuple[int, int], ctypes.Array[ctypes.c_char]]
        self._blocks = weakref.WeakValueDictionary()
        self._not_needed_without_tensors = threading.Event()
        self._stop_page_maker = threading.Event()
        self._page_maker: threading.Thread | None = None
        self._buckets: list[bytearray] = []
        """Memory of chunks that have arrived apart, for the next ones."""

    @classmethod
    def create(cls, nbytes: int) -> Arena:
        """An empty arena, without pages. Raises OSError if this process cannot have a file or mapping of that size."""
        size = _whole_pages(nbytes)
        descriptor = os.memfd_create("netloader-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, size)
            mapping = mmap.mmap(descriptor, size, flags=mmap.MAP_SHARED)
        except BaseException:
            os.close(descriptor)
            raise
        return cls(nbytes, descriptor, mapping)

    @classmethod
    def adopt(cls, descriptor: int, nbytes: int) -> Arena:
        """Maps a sealed arena of another process, and takes over `descriptor`, also if it fails.

        Raises TransportError if the arena is not sealed, has another size, or cannot be mapped by this process.
        """
        try:
            _check_adoptable(descriptor, nbytes)
            mapping = mmap.mmap(descriptor, _whole_pages(nbytes), flags=mmap.MAP_PRIVATE | _MAP_NORESERVE)
        except OSError as error:
            os.close(descriptor)
            raise TransportError(
                f"this process cannot map {nbytes} bytes of shared memory: {why_no_memory(error)}"
            ) from error
        except BaseException:
            os.close(descriptor)
            raise
        return cls(nbytes, descriptor, mapping)

    @property
    def servable(self) -> bool:
        """Whether the arena is sealed and not closed, so that others may have its bytes."""
        return self._give_up_descriptor.alive and _seals(self._descriptor) & _REQUIRED_SEALS == _REQUIRED_SEALS

    @property
    def descriptor(self) -> int:
        """The descriptor of the file that holds the bytes. Raises OSError after `close`."""
        if not self._give_up_descriptor.alive:
            raise OSError(errno.EBADF, "the arena is closed")
        return self._descriptor

    def descriptor_for_waiting(self) -> int:
        """A descriptor for another process, which waits until the arena is sealed. The caller closes it.

        From now on the file can be written to by the mapping of this process only. Raises OSError.
        """
        if not self.servable:
            fcntl.fcntl(self.descriptor, _F_ADD_SEALS, _F_SEAL_SHRINK | _F_SEAL_GROW | _F_SEAL_FUTURE_WRITE)
        # Whoever can write to a file can also seal it, and so keep others from doing that.
        return os.open(f"/proc/self/fd/{self.descriptor}", os.O_RDONLY | os.O_CLOEXEC)

    def make_pages(self) -> None:
        """Starts a thread that makes the pages, in order, until `stop_making_pages`. Call it at most once."""
        maker = threading.Thread(target=self._make_pages, name="netloader-pages", daemon=True)
        with contextlib.suppress(RuntimeError):  # without a thread, pages are made at first touch
            maker.start()
            self._page_maker = maker

    def stop_making_pages(self) -> None:
        """Waits until the thread has stopped. Filling may go on, and makes the remaining pages at first touch."""
        self._stop_page_maker.set()
        if self._page_maker is not None:
            self._page_maker.join()

    def writable(self) -> memoryview:
        """All bytes, to be filled. The view keeps the mapping alive until it is released."""
        return memoryview(self._mapping)[: self.nbytes]

    contents = writable

    def landing(self, offset: int, length: int, *, apart: bool = False) -> Landing:
        assert not self.servable, "what is sealed is not filled"
        if apart:
            return _Apart(self.writable()[offset : offset + length], self._buckets)
        return _InPlace(self.writable()[offset : offset + length])

    def reader(self) -> memoryview:
        """The sealed bytes by a mapping of its own, which does not show what this process writes into its tensors."""
        mapping = mmap.mmap(
            self.descriptor, _whole_pages(self.nbytes), flags=mmap.MAP_PRIVATE | _MAP_NORESERVE, prot=mmap.PROT_READ
        )
        return memoryview(mapping)[: self.nbytes]

    def seal(self) -> None:
        """Makes the bytes immutable. Raises OSError if the system does not allow it.

        Tensors stay valid. Whatever is written to them later is seen by this process only.
        """
        self.stop_making_pages()
        self._buckets.clear()
        descriptor, size = self.descriptor, _whole_pages(self.nbytes)
        fcntl.fcntl(descriptor, _F_ADD_SEALS, _F_SEAL_SHRINK | _F_SEAL_GROW | _F_SEAL_FUTURE_WRITE)
        protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | _MAP_FIXED | _MAP_NORESERVE
        address = _libc.mmap(self._address, size, protection, flags, descriptor, 0)
        if address != self._address:
            raise OSError(ctypes.get_errno(), "replacing the arena's shared mapping failed")
        # The seal against writing comes last. It is refused while there is a writable shared mapping, so that it also
        # proves that none is left.
        fcntl.fcntl(descriptor, _F_ADD_SEALS, _F_SEAL_WRITE | _F_SEAL_SEAL)

    def block(self, offset: int, nbytes: int) -> ctypes.Array[ctypes.c_char]:
        """The memory of one tensor, which keeps the mapping alive. All who ask for it share one object.

        When the last user of the object dies, the private pages in it are given back.
        """
        block = self._blocks.get((offset, nbytes))
        if block is None:
            block = (ctypes.c_char * nbytes).from_buffer(self._mapping, offset)
            weakref.finalize(
                block, _give_back_pages, self._address + offset, nbytes, self._not_needed_without_tensors
            ).atexit = False
            self._blocks[offset, nbytes] = block
        return block

    def free_with_tensors(self) -> None:
        """Lets the memory of a tensor be freed with the tensor. Does nothing to an arena that is sealed."""
        if not self.servable:
            self._not_needed_without_tensors.set()

    def discard(self) -> None:
        """Closes the arena and frees its pages at once, even if the mapping is still in use.

        The pages of a sealed arena are not freed, because other processes may have them.
        """
        self.stop_making_pages()
        if self._give_up_descriptor.alive and not self.servable:
            _libc.fallocate(self._descriptor, _PUNCH_HOLE | _KEEP_SIZE, 0, _whole_pages(self.nbytes))
        self.close()

    def close(self) -> None:
        """Gives up the descriptor, which also happens when the arena dies. Tensors stay valid. Idempotent."""
        self.stop_making_pages()
        self._buckets.clear()
        self._give_up_descriptor()

    def _make_pages(self) -> None:
        size = _whole_pages(self.nbytes)
        for offset in range(0, size, PAGES_STEP):
            length = min(PAGES_STEP, size - offset)
            if self._stop_page_maker.is_set() or _libc.fallocate(self.descriptor, 0, offset, length):
                return  # there is no memory left, and whoever fills the arena gets the error
            if _libc.madvise(self._address + offset, length, _MADV_POPULATE_WRITE):
                return  # kernels before 5.14 cannot do it, so pages are mapped at first touch


class _InPlace(Landing):
    """A part of an arena that nobody reads yet."""

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory

    @property
    def host(self) -> memoryview:
        return self._memory

    def arrived(self, begin: int, end: int) -> memoryview:
        return self._memory[begin:end]

    def settle(self) -> None:
        return


class _Apart(Landing):
    """A bucket beside the arena, from which a chunk is copied to its place."""

    def __init__(self, place: memoryview, buckets: list[bytearray]) -> None:
        """`buckets` gives the memory, and gets it back for the next one."""
        self._place = place
        self._buckets = buckets
        bucket = buckets.pop() if buckets else bytearray()
        self._bucket = bucket if len(bucket) >= place.nbytes else bytearray(place.nbytes)
        self._memory = memoryview(self._bucket)[: place.nbytes]

    @property
    def host(self) -> memoryview:
        return self._memory

    def arrived(self, begin: int, end: int) -> memoryview:
        return self._memory[begin:end]

    def settle(self) -> None:
        # Others may wait for the seal already, so the file takes no write. A call by ctypes releases the GIL.
        place, bucket = ctypes.c_char.from_buffer(self._place), ctypes.c_char.from_buffer(self._memory)
        ctypes.memmove(ctypes.addressof(place), ctypes.addressof(bucket), self._place.nbytes)
        self._buckets.append(self._bucket)


def allocate(manifest: Manifest) -> Arena:
    """An empty arena for `manifest`, whose pages are being made in the background. Whoever calls it closes it.

    Raises UnsupportedModel if this process cannot have one, and NoRoom if it would be killed for filling it.
    """
    _require_room(manifest.nbytes)
    try:
        arena = Arena.create(manifest.nbytes)
    except OSError as error:
        raise UnsupportedModel(f"no arena for {manifest.nbytes} bytes of weights: {why_no_memory(error)}") from error
    arena.make_pages()
    return arena


def _require_room(nbytes: int) -> None:
    left = room()
    if left is not None and nbytes > left.nbytes:
        raise NoRoom(
            f"the weights need {nbytes} bytes of memory, and {left.limit} leaves {left.nbytes}, with swap and files "
            f"that can be dropped: the kernel would kill this process while it loads. Raise the limit of the container"
        )


def why_no_memory(error: OSError) -> str:
    """What keeps this process from having or mapping memory, with the limits to look at."""
    match error.errno:
        case errno.ENOMEM:
            return (
                "this process may have no more memory (RLIMIT_AS, RLIMIT_DATA, vm.overcommit_memory, or none is left)"
            )
        case errno.EPERM | errno.EACCES | errno.ENOSYS:
            return f"this process may not make or map memory files ({error.strerror}; seccomp or another sandbox?)"
        case errno.EMFILE | errno.ENFILE:
            return f"this process has no file descriptor left ({error.strerror}; ulimit -n)"
        case _:
            return error.strerror or str(error)


def _give_back_pages(address: int, nbytes: int, free: threading.Event) -> None:
    """Frees the private copies of the whole pages within a block, and the pages of the file too if `free` is set."""
    begin = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (address + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > begin:
        _libc.madvise(begin, end - begin, mmap.MADV_REMOVE if free.is_set() else mmap.MADV_DONTNEED)


def _check_adoptable(descriptor: int, nbytes: int) -> None:
    if _seals(descriptor) & _REQUIRED_SEALS != _REQUIRED_SEALS:
        raise TransportError("the shared memory offered by the source is not sealed against change")
    require_size(descriptor, nbytes)


def require_size(descriptor: int, nbytes: int) -> None:
    """Raises TransportError if the file of `descriptor` is not as large as an arena of `nbytes`."""
    size = os.fstat(descriptor).st_size
    if size != _whole_pages(nbytes):
        raise TransportError(f"the shared memory offered by the source has {size} bytes: expected {nbytes}")


def _seals(descriptor: int) -> int:
    try:
        return fcntl.fcntl(descriptor, _F_GET_SEALS)
    except OSError:
        return 0


def _whole_pages(nbytes: int) -> int:
    return max(-(-nbytes // mmap.PAGESIZE), 1) * mmap.PAGESIZE
