from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import mmap
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from vllm_ascend.model_loader.netloader.errors import TransportError, UnsupportedModel
from vllm_ascend.model_loader.netloader.model.device_memory import tensor_in
from vllm_ascend.model_loader.netloader.model.views import DTYPES, bind_alias, manifest_of
from vllm_ascend.model_loader.netloader.weights.arena import Arena, allocate
from vllm_ascend.model_loader.netloader.weights.manifest import Alias, Manifest, TensorSpec
from vllm_ascend.model_loader.netloader.weights.unsealed import UnsealedArena

PAGE = mmap.PAGESIZE
F_ADD_SEALS = 1033
F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_WRITE = 0x2, 0x4, 0x8


def floats(count: int, *, offset: int = 0) -> TensorSpec:
    return TensorSpec("w", "float32", (count,), (1,), offset)


def pages(count: int, *, offset: int = 0) -> TensorSpec:
    """A tensor over `count` pages, the first at byte `offset`."""
    return TensorSpec("w", "uint8", (count * PAGE,), (1,), offset)


def sealed(content: bytes) -> Arena:
    arena = Arena.create(len(content))
    with arena.writable() as bytes_:
        bytes_[:] = content
    arena.seal()
    return arena


def read(arena: Arena) -> bytes:
    with arena.reader() as bytes_:
        return bytes(bytes_)


class Mapping(NamedTuple):
    """One mapping of a file into this process; sizes in bytes."""

    permissions: str
    resident: int
    private_copies: int


def mappings(descriptor: int) -> list[Mapping]:
    """All mappings of the file behind `descriptor`, from what Linux describes in proc_pid_smaps(5)."""
    inode = str(os.fstat(descriptor).st_ino)
    found: list[Mapping] = []
    ours = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head, *rest = line.split()
        if not head.endswith(":"):
            ours = rest[3] == inode and "netloader-arena" in line
            if ours:
                found.append(Mapping(rest[0], 0, 0))
        elif ours and head == "Rss:":
            found[-1] = found[-1]._replace(resident=int(rest[0]) * 1024)
        elif ours and head == "Anonymous:":
            found[-1] = found[-1]._replace(private_copies=int(rest[0]) * 1024)
    return found


def private_copies(descriptor: int) -> int:
    return sum(mapping.private_copies for mapping in mappings(descriptor))


def memory_of_file(descriptor: int) -> int:
    return os.fstat(descriptor).st_blocks * 512


@contextlib.contextmanager
def child(run: Callable[[], None]) -> Iterator[None]:
    """Runs `run` in another process beside the block; in the end, it must have succeeded."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            run()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    try:
        yield
    except BaseException:
        os.kill(process, signal.SIGKILL)
        raise
    finally:
        _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == 0, "the other process failed: see its traceback"


def is_open(descriptor: int) -> bool:
    return os.path.exists(f"/proc/self/fd/{descriptor}")


def page_makers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "netloader-pages"]


def test_a_new_arena_is_zero_and_not_servable() -> None:
    arena = Arena.create(1000)
    assert arena.nbytes == 1000
    assert not arena.servable
    assert bytes(arena.writable()) == bytes(1000)
    arena.close()


def test_what_is_written_is_seen_by_tensors_and_descriptor_alike() -> None:
    arena = Arena.create(3 * 64)
    tensor = tensor_in(arena, floats(4, offset=64))
    with arena.writable() as bytes_:
        bytes_[64:68] = b"\x00\x00\x80\x3f"
    assert tensor.tolist() == [1.0, 0.0, 0.0, 0.0]
    tensor[3] = 1.0
    assert os.pread(arena.descriptor, 16, 64) == b"\x00\x00\x80\x3f" + bytes(8) + b"\x00\x00\x80\x3f"
    os.pwrite(arena.descriptor, b"\x00\x00\x80\xbf", 68)
    assert tensor.tolist() == [1.0, -1.0, 0.0, 1.0]
    arena.close()


def test_the_descriptor_is_not_inherited_by_programs_that_are_started() -> None:
    arena = Arena.create(1)
    assert not os.get_inheritable(arena.descriptor)
    arena.close()


def test_a_sealed_arena_has_no_writable_shared_mapping_left() -> None:
    arena = Arena.create(10 * PAGE)
    assert [mapping.permissions for mapping in mappings(arena.descriptor)] == ["rw-s"]
    arena.seal()
    assert arena.servable
    assert [mapping.permissions for mapping in mappings(arena.descriptor)] == ["rw-p"]
    arena.close()


def test_tensors_stay_where_they_are_and_keep_their_values_when_the_arena_is_sealed() -> None:
    arena = Arena.create(3 * PAGE)
    tensor = tensor_in(arena, floats(2000, offset=64))
    tensor.copy_(torch.arange(2000.0))
    address = tensor.data_ptr()
    arena.seal()
    assert tensor.data_ptr() == tensor_in(arena, floats(2000, offset=64)).data_ptr() == address
    assert torch.equal(tensor, torch.arange(2000.0))
    arena.close()


def test_what_is_written_after_sealing_stays_in_this_process() -> None:
    arena = sealed(b"original" * 512)
    tensor = tensor_in(arena, TensorSpec("w", "uint8", (4096,), (1,), 0))
    tensor.fill_(ord("x"))
    assert bytes(arena.writable()) == b"x" * 4096
    assert read(arena) == os.pread(arena.descriptor, 4096, 0) == b"original" * 512
    arena.close()


def test_a_reader_cannot_be_written_through_and_outlives_the_arena() -> None:
    arena = sealed(b"original")
    reader = arena.reader()
    assert reader.readonly
    arena.close()
    del arena
    gc.collect()
    assert bytes(reader) == b"original"


def test_a_sealed_file_can_neither_be_resized_nor_written_nor_unsealed() -> None:
    arena = sealed(b"original" * PAGE)
    size = os.fstat(arena.descriptor).st_size
    for resize in (0, size - PAGE, size + PAGE):
        with pytest.raises(PermissionError):
            os.ftruncate(arena.descriptor, resize)
    with pytest.raises(PermissionError):
        os.pwrite(arena.descriptor, b"x", 0)
    with pytest.raises(PermissionError):
        os.write(arena.descriptor, b"x")
    with pytest.raises(PermissionError):
        mmap.mmap(arena.descriptor, PAGE, flags=mmap.MAP_SHARED)
    with pytest.raises(PermissionError):
        fcntl.fcntl(arena.descriptor, F_ADD_SEALS, 0x10)
    assert read(arena) == b"original" * PAGE
    arena.close()


def test_an_arena_that_somebody_else_can_still_write_is_not_sealed() -> None:
    arena = Arena.create(PAGE)
    other = mmap.mmap(arena.descriptor, PAGE, flags=mmap.MAP_SHARED)
    with pytest.raises(OSError, match="busy"):
        arena.seal()
    assert not arena.servable
    other.close()
    arena.close()


def test_another_process_adopts_the_same_bytes_and_writes_only_its_own() -> None:
    here, there = socket.socketpair()

    def adopt() -> None:
        _, (descriptor,), _, _ = socket.recv_fds(there, 1, 1)
        arena = Arena.adopt(descriptor, 4 * PAGE)
        assert arena.servable
        assert arena.nbytes == 4 * PAGE
        tensor = tensor_in(arena, TensorSpec("w", "uint8", (PAGE,), (1,), 2 * PAGE))
        assert bytes(arena.writable()) == b"original" * (PAGE // 2)
        tensor.fill_(0)
        assert bytes(arena.writable())[2 * PAGE : 3 * PAGE] == bytes(PAGE)
        assert read(arena) == b"original" * (PAGE // 2)
        there.send(b"written")
        there.recv(1)
        arena.close()

    with child(adopt):  # before the arena is made, so that only the descriptor can bring it there
        arena = sealed(b"original" * (PAGE // 2))
        tensor = tensor_in(arena, pages(4))
        socket.send_fds(here, [b"\0"], [arena.descriptor])
        assert here.recv(7) == b"written"
        assert bytes(arena.writable()) == read(arena) == b"original" * (PAGE // 2)
        tensor.fill_(1)
        here.send(b"\0")
    here.close()
    there.close()
    arena.close()


def test_an_adopted_arena_lives_on_when_its_origin_is_gone() -> None:
    here, there = socket.socketpair()

    def origin() -> None:
        arena = sealed(b"original")
        socket.send_fds(there, [b"\0"], [arena.descriptor])

    with child(origin):
        _, (descriptor,), _, _ = socket.recv_fds(here, 1, 1)
    arena = Arena.adopt(descriptor, 8)
    assert bytes(arena.writable()) == read(arena) == b"original"
    here.close()
    there.close()
    arena.close()


def test_adopting_takes_the_descriptor_and_closing_gives_it_up() -> None:
    origin = sealed(b"original")
    descriptor = os.dup(origin.descriptor)
    adopted = Arena.adopt(descriptor, 8)
    assert adopted.descriptor == descriptor
    adopted.close()
    assert not is_open(descriptor)
    origin.close()


def unsealed_file(size: int) -> int:
    descriptor = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, size)
    return descriptor


@pytest.mark.parametrize(
    "seals",
    [0, F_SEAL_SHRINK | F_SEAL_GROW, F_SEAL_GROW | F_SEAL_WRITE, F_SEAL_SHRINK | F_SEAL_WRITE],
    ids=["none", "writable", "may shrink", "may grow"],
)
def test_memory_that_could_still_change_is_not_adopted(seals: int) -> None:
    descriptor = unsealed_file(PAGE)
    fcntl.fcntl(descriptor, F_ADD_SEALS, seals)
    with pytest.raises(TransportError, match="is not sealed against change"):
        Arena.adopt(descriptor, PAGE)
    assert not is_open(descriptor)


def test_a_file_on_disk_is_not_adopted() -> None:
    with tempfile.TemporaryFile() as file:
        os.ftruncate(file.fileno(), PAGE)
        descriptor = os.dup(file.fileno())
    with pytest.raises(TransportError, match="is not sealed against change"):
        Arena.adopt(descriptor, PAGE)
    assert not is_open(descriptor)


@pytest.mark.parametrize("nbytes", [1, PAGE, 3 * PAGE], ids=["one page less", "exactly one page less", "one page more"])
def test_memory_of_another_size_is_not_adopted(nbytes: int) -> None:
    origin = sealed(bytes(2 * PAGE))
    descriptor = os.dup(origin.descriptor)
    with pytest.raises(TransportError, match=f"has {2 * PAGE} bytes: expected {nbytes}"):
        Arena.adopt(descriptor, nbytes)
    assert not is_open(descriptor)
    origin.close()


def test_an_arena_that_nobody_holds_gives_up_its_descriptor() -> None:
    arena = Arena.create(8)
    descriptor = arena.descriptor
    del arena
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_a_closed_arena_has_no_descriptor_and_is_not_servable() -> None:
    arena = sealed(b"original")
    descriptor = arena.descriptor
    arena.close()
    arena.close()
    assert not is_open(descriptor)
    assert not arena.servable
    with pytest.raises(OSError, match="the arena is closed"):
        _ = arena.descriptor
    with pytest.raises(OSError, match="the arena is closed"):
        arena.reader()


@pytest.mark.parametrize("seal", [True, False], ids=["sealed", "not sealed"])
def test_tensors_outlive_their_arena(seal: bool) -> None:
    arena = Arena.create(2 * PAGE)
    tensor = tensor_in(arena, floats(1000, offset=64))
    tensor.fill_(3.0)
    if seal:
        arena.seal()
    arena.close()
    del arena
    gc.collect()
    assert tensor.eq(3.0).all()
    tensor.fill_(4.0)
    view = tensor[500:]
    del tensor
    gc.collect()
    assert view.eq(4.0).all()


def test_no_descriptor_is_left_when_arena_tensors_and_readers_are_gone() -> None:
    gc.collect()
    before = set(os.listdir("/proc/self/fd"))
    arena = sealed(bytes(3 * PAGE))
    adopted = Arena.adopt(os.dup(arena.descriptor), 3 * PAGE)
    kept = [tensor_in(arena, pages(1)), tensor_in(adopted, pages(2, offset=PAGE)), arena.reader()]
    arena.close()
    adopted.close()
    assert kept
    del arena, adopted, kept
    gc.collect()
    assert set(os.listdir("/proc/self/fd")) <= before


def test_the_memory_of_a_tensor_that_died_is_still_there_to_be_served() -> None:
    arena = Arena.create(64 * PAGE)
    tensor_in(arena, pages(64)).fill_(7)
    gc.collect()
    assert set(bytes(arena.writable())) == {7}
    arena.seal()
    tensor_in(arena, pages(64)).fill_(8)
    gc.collect()
    assert set(read(arena)) == {7}
    arena.close()


def test_private_copies_are_freed_when_their_tensor_dies() -> None:
    arena = sealed(bytes([7]) * (64 * PAGE))
    first, second = tensor_in(arena, pages(32)), tensor_in(arena, pages(32, offset=32 * PAGE))
    assert private_copies(arena.descriptor) == 0
    first.fill_(8)
    second.fill_(9)
    assert private_copies(arena.descriptor) == 64 * PAGE
    del first
    assert private_copies(arena.descriptor) == 32 * PAGE
    assert second.eq(9).all()
    assert tensor_in(arena, pages(32)).eq(7).all()
    del second
    assert private_copies(arena.descriptor) == 0
    arena.close()


def test_an_adopted_arena_frees_private_copies_too() -> None:
    origin = sealed(bytes([7]) * (16 * PAGE))
    adopted = Arena.adopt(os.dup(origin.descriptor), 16 * PAGE)
    tensor_in(adopted, pages(16)).fill_(8)
    assert private_copies(adopted.descriptor) == 0
    assert set(bytes(adopted.writable())) == {7}
    adopted.close()
    origin.close()


def test_two_tensors_over_one_block_keep_its_pages_until_the_last_dies() -> None:
    arena = sealed(bytes([7]) * (16 * PAGE))
    one, other = tensor_in(arena, pages(16)), tensor_in(arena, pages(16))
    one.fill_(8)
    assert one.data_ptr() == other.data_ptr()
    del one
    gc.collect()
    assert other.eq(8).all()
    view = other.view(4, -1)[1]
    del other
    gc.collect()
    assert view.eq(8).all()
    del view
    assert private_copies(arena.descriptor) == 0
    arena.close()


def test_neighbours_on_a_shared_page_keep_what_they_hold() -> None:
    arena = sealed(bytes(4 * PAGE))
    half = PAGE // 2
    left = tensor_in(arena, TensorSpec("left", "uint8", (half,), (1,), 0))
    middle = tensor_in(arena, TensorSpec("middle", "uint8", (2 * PAGE,), (1,), half))
    right = tensor_in(arena, TensorSpec("right", "uint8", (half,), (1,), half + 2 * PAGE))
    for value, tensor in enumerate((left, middle, right), start=1):
        tensor.fill_(value)
    del middle
    gc.collect()
    assert left.eq(1).all()
    assert right.eq(3).all()
    arena.close()


def test_an_arena_that_is_not_served_frees_memory_with_its_tensors() -> None:
    arena = Arena.create(64 * PAGE)
    file = os.dup(arena.descriptor)
    first, second = tensor_in(arena, pages(32)), tensor_in(arena, pages(32, offset=32 * PAGE))
    first.fill_(1)
    second.fill_(2)
    assert memory_of_file(file) >= 64 * PAGE
    arena.free_with_tensors()
    arena.close()
    del first
    gc.collect()
    assert memory_of_file(file) <= 32 * PAGE
    assert second.eq(2).all()
    del arena, second
    gc.collect()
    assert memory_of_file(file) == 0
    os.close(file)


def test_what_is_served_is_never_freed_with_its_tensors() -> None:
    arena = sealed(bytes([7]) * (16 * PAGE))
    arena.free_with_tensors()
    tensor_in(arena, pages(16)).fill_(8)
    gc.collect()
    assert set(read(arena)) == {7}
    assert private_copies(arena.descriptor) == 0
    arena.close()


def test_an_empty_tensor_has_its_shape_and_no_memory() -> None:
    arena = Arena.create(64)
    tensor = tensor_in(arena, TensorSpec("w", "bfloat16", (3, 0, 5), (5, 5, 1), 64))
    assert (tensor.shape, tensor.stride(), tensor.dtype) == ((3, 0, 5), (5, 5, 1), torch.bfloat16)
    arena.close()


def test_an_arena_of_no_bytes_is_sealed_and_adopted_like_any_other() -> None:
    arena = Arena.create(0)
    arena.seal()
    adopted = Arena.adopt(os.dup(arena.descriptor), 0)
    assert (read(arena), read(adopted), bytes(adopted.writable())) == (b"", b"", b"")
    adopted.close()
    arena.close()


CRASHING = {"qint8", "quint8", "qint32", "quint4x2", "quint2x4"}


@pytest.mark.parametrize("dtype", sorted(DTYPES.keys() - CRASHING))
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_a_tensor_has_the_type_shape_and_strides_of_its_description(dtype: str) -> None:
    arena = Arena.create(1024)
    with arena.writable() as bytes_:
        bytes_[:] = bytes(range(256)) * 4
    tensor = tensor_in(arena, TensorSpec("w", dtype, (3, 4), (1, 3), 64))
    assert (tensor.dtype, tensor.shape, tensor.stride()) == (DTYPES[dtype], (3, 4), (1, 3))
    assert bytes(tensor.untyped_storage()) == bytes(arena.writable()[64 : 64 + 12 * tensor.itemsize])
    scalar = tensor_in(arena, TensorSpec("w", dtype, (), (), 0))
    assert scalar.shape == ()
    arena.close()


@pytest.mark.parametrize("dtype", sorted(CRASHING))
def test_no_manifest_names_a_type_of_which_no_tensor_can_be_made(dtype: str) -> None:
    assert dtype not in DTYPES


def test_an_alias_is_on_the_memory_of_its_base() -> None:
    arena = Arena.create(128)
    base = tensor_in(arena, TensorSpec("embed", "float32", (4, 6), (6, 1), 0))
    base.copy_(torch.arange(24.0).view(4, 6))
    rows = bind_alias(base, Alias("head", 0, 24, "float32", (2, 6), (6, 1)))
    columns = bind_alias(base, Alias("columns", 0, 8, "float32", (3, 4), (1, 6)))
    raw = bind_alias(base, Alias("raw", 0, 3, "uint8", (4,), (1,)))
    assert torch.equal(rows, base[1:3])
    assert torch.equal(columns, base[:, 2:5].t())
    assert bytes(raw.tolist()) == os.pread(arena.descriptor, 4, 3)
    rows[0, 2] = -1.0
    assert base[1, 2] == columns[0, 1] == -1.0
    arena.close()


def test_an_alias_keeps_the_memory_of_its_base() -> None:
    arena = sealed(bytes(16 * PAGE))
    base = tensor_in(arena, pages(16))
    base.fill_(8)
    alias = bind_alias(base, Alias("head", 0, PAGE, "uint8", (4,), (1,)))
    del base
    gc.collect()
    assert alias.eq(8).all()
    arena.close()


def test_pages_are_made_in_the_background() -> None:
    arena = Arena.create(100 * PAGE)
    assert memory_of_file(arena.descriptor) == 0
    arena.make_pages()
    for thread in page_makers():
        thread.join()
    assert memory_of_file(arena.descriptor) == 100 * PAGE
    assert mappings(arena.descriptor)[0].resident == 100 * PAGE
    assert set(bytes(arena.writable())) == {0}
    arena.close()


def test_filling_while_pages_are_made_loses_nothing() -> None:
    nbytes = 80 << 20
    content = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    arena = Arena.create(nbytes)
    tensor = tensor_in(arena, TensorSpec("w", "uint8", (nbytes,), (1,), 0))
    half = nbytes // 2
    os.pwrite(arena.descriptor, content[half:].numpy().data, half)
    arena.make_pages()
    tensor[:half].copy_(content[:half])
    arena.seal()
    assert torch.equal(tensor, content)
    arena.close()


def test_making_pages_stops_when_nobody_wants_them() -> None:
    arena = Arena.create(100 * PAGE)
    arena.stop_making_pages()
    arena.make_pages()
    arena.stop_making_pages()
    assert page_makers() == []
    assert memory_of_file(arena.descriptor) == 0
    tensor_in(arena, pages(100)).fill_(1)
    assert memory_of_file(arena.descriptor) == 100 * PAGE
    arena.close()


@pytest.mark.parametrize("end", [Arena.seal, Arena.close, Arena.stop_making_pages], ids=lambda end: end.__name__)
def test_no_page_maker_is_left_behind(end: Callable[[Arena], None]) -> None:
    arena = Arena.create(256 << 20)
    arena.make_pages()
    end(arena)
    assert page_makers() == []
    arena.close()


def test_memory_for_a_manifest_is_being_made_when_it_is_handed_out() -> None:
    manifest = manifest_of([("w", torch.empty(50 * PAGE, dtype=torch.uint8)), ("b", torch.empty(3))])
    arena = allocate(manifest)
    for thread in page_makers():
        thread.join()
    assert arena.nbytes == manifest.nbytes == 50 * PAGE + 64
    assert memory_of_file(arena.descriptor) == 51 * PAGE
    arena.close()


@contextlib.contextmanager
def at_most_further(nbytes: int) -> Iterator[None]:
    """This process may map so many bytes more, and no others."""
    earlier = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
    resource.setrlimit(resource.RLIMIT_AS, (mapped + nbytes, earlier[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, earlier)


def test_a_model_that_the_host_has_no_memory_for_is_unsupported() -> None:
    manifest = Manifest([floats(1 << 30)])
    gc.collect()
    before = set(os.listdir("/proc/self/fd"))
    with (
        at_most_further(1 << 31),
        pytest.raises(UnsupportedModel, match=f"no arena for {1 << 32} bytes .*no more memory"),
    ):
        allocate(manifest)
    assert set(os.listdir("/proc/self/fd")) <= before


def test_the_size_of_dev_shm_does_not_matter() -> None:
    """It is a file system of its own; the memory of an arena belongs to none that is mounted."""
    with contextlib.closing(Arena.create(PAGE)) as arena:
        assert os.fstat(arena.descriptor).st_dev != os.stat("/dev/shm").st_dev


FILL_BESIDE_A_SMALL_DEV_SHM = """
import os
from vllm_ascend.model_loader.netloader.weights.arena import Arena
assert os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize == 65536
arena = Arena.create(8 << 20)
arena.writable()[:] = bytes(8 << 20)
arena.seal()
assert arena.servable
"""


def test_an_arena_is_filled_and_served_beside_a_dev_shm_of_64_kib() -> None:
    small = "mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "
    command = ["unshare", "--mount", "sh", "-c", f'{small}"$0" "$@"']
    if (
        shutil.which("unshare") is None
        or subprocess.run([*command, "true"], check=False, capture_output=True).returncode
    ):
        pytest.skip("this process may mount nothing, not even for itself")
    subprocess.run([*command, sys.executable, "-c", FILL_BESIDE_A_SMALL_DEV_SHM], check=True, timeout=100)


def write(descriptor: int) -> None:
    os.pwrite(descriptor, b"x", 0)


def map_to_write(descriptor: int) -> None:
    mmap.mmap(descriptor, PAGE, flags=mmap.MAP_SHARED)


def seal(descriptor: int) -> None:
    fcntl.fcntl(descriptor, F_ADD_SEALS, F_SEAL_WRITE)


def shrink(descriptor: int) -> None:
    os.ftruncate(descriptor, 0)


def punch(descriptor: int) -> None:
    if ctypes.CDLL(None, use_errno=True).fallocate(descriptor, 3, ctypes.c_long(0), ctypes.c_long(PAGE)):
        raise OSError(ctypes.get_errno(), "fallocate")


@pytest.mark.parametrize("change", [write, map_to_write, seal, shrink, punch])
@pytest.mark.parametrize("reopened", [False, True])
def test_who_waits_for_an_arena_cannot_change_it(change: Callable[[int], None], reopened: bool) -> None:
    """Not even where the same user opens the file anew, to write; that one can only keep it from being sealed."""
    arena = Arena.create(PAGE)
    descriptor = arena.descriptor_for_waiting()
    if reopened:
        given, descriptor = descriptor, os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR)
        os.close(given)
    with pytest.raises(OSError, match=r"\[Errno"):
        change(descriptor)
    with arena.writable() as bytes_:  # whoever fills it still can
        bytes_[:] = b"a" * PAGE
    with contextlib.closing(UnsealedArena(descriptor, PAGE)) as pages:
        copy = bytearray(PAGE)
        assert pages.read(0, memoryview(copy)) == PAGE
        assert copy == b"a" * PAGE
        with pytest.raises(TransportError, match="not sealed"):
            pages.adopt()
        arena.seal()
        adopted = pages.adopt()
    arena.close()
    assert read(adopted) == b"a" * PAGE
    assert adopted.servable


def test_an_arena_of_another_size_is_not_waited_for() -> None:
    with contextlib.closing(Arena.create(3 * PAGE)) as arena, pytest.raises(TransportError, match="expected"):
        UnsealedArena(arena.descriptor_for_waiting(), PAGE)


def test_chunks_that_arrive_apart_settle_also_while_others_wait() -> None:
    arena = Arena.create(2 * PAGE)
    os.close(arena.descriptor_for_waiting())
    landing = arena.landing(PAGE // 2, PAGE, apart=True)
    landing.host[:] = b"b" * PAGE
    with arena.writable() as bytes_:
        assert bytes(bytes_) == bytes(2 * PAGE)
        landing.settle()
        assert bytes(bytes_) == bytes(PAGE // 2) + b"b" * PAGE + bytes(PAGE // 2)
    del landing
    arena.seal()
