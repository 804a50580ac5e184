"""Memory that is there before something is measured, and memory that is not."""

from __future__ import annotations

import mmap
import multiprocessing
import os

_spawn = multiprocessing.get_context("spawn")


def condition_memory(nbytes: int) -> None:
    """Touches and frees memory in a process of its own.

    A virtual machine whose host gives it memory only at first touch then has it when the measurement begins.
    """
    process = _spawn.Process(target=_touch_new, args=(nbytes,))
    process.start()
    process.join()


def anonymous_memory(nbytes: int) -> mmap.mmap:
    """Private memory without pages, which the kernel makes at first touch."""
    return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def memory_file(nbytes: int) -> mmap.mmap:
    """A mapping without pages of a new memfd, which is what an arena is made of."""
    descriptor = os.memfd_create("raw-sockets")
    try:
        os.truncate(descriptor, nbytes)
        return mmap.mmap(descriptor, nbytes)
    finally:
        os.close(descriptor)


def touch(memory: mmap.mmap | memoryview) -> None:
    """Makes all pages."""
    for offset in range(0, len(memory), mmap.PAGESIZE):
        memory[offset] = 1


def _touch_new(nbytes: int) -> None:
    touch(anonymous_memory(nbytes))
