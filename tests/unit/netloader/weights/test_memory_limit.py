"""Limits on memory, as files that control groups show, and as the kernel enforces them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from vllm_ascend.model_loader.netloader.weights.memory_limit import room

MIB = 1 << 20

V2 = "30 24 0:26 / {root} rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = "31 24 0:27 / {root} rw,nosuid - cgroup cgroup rw,memory\n32 24 0:28 / /elsewhere rw - cgroup cgroup rw,cpu\n"


def proc(directory: Path, mounts: str, group: str, swap_free_kib: int = 0, **groups: Mapping[str, str]) -> Path:
    """A stand-in for /proc, and for the hierarchy in `directory`/groups; names of groups have `__` for `/`."""
    root = directory / "groups"
    for name, files in {"": {}, **groups}.items():
        path = root / name.replace("__", "/")
        path.mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            (path / file).write_text(text)
    (directory / "self").mkdir()
    (directory / "self" / "mountinfo").write_text(mounts.format(root=root))
    (directory / "self" / "cgroup").write_text(group)
    (directory / "meminfo").write_text(f"MemTotal: 1 kB\nSwapFree: {swap_free_kib} kB\n")
    return directory


def v2(limit: int | str, used: int, swap: str | None = None, **statistics: int) -> dict[str, str]:
    files = {"memory.max": f"{limit}\n", "memory.current": f"{used}\n"}
    if swap is not None:
        files |= {"memory.swap.max": f"{swap}\n", "memory.swap.current": "0\n"}
    return {**files, "memory.stat": "".join(f"{name} {value}\n" for name, value in statistics.items())}


def v1(limit: int, used: int, with_swap: int | None = None, **statistics: int) -> dict[str, str]:
    files = {"memory.limit_in_bytes": f"{limit}\n", "memory.usage_in_bytes": f"{used}\n"}
    if with_swap is not None:
        files |= {"memory.memsw.limit_in_bytes": f"{with_swap}\n", "memory.memsw.usage_in_bytes": f"{used}\n"}
    return {**files, "memory.stat": "".join(f"{name} {value}\n" for name, value in statistics.items())}


def left(directory: Path) -> tuple[int, str] | None:
    """Bytes, and the path of the group that leaves them, within the hierarchy."""
    found = room(directory)
    return found and (found.nbytes, str(found.limit.parent.relative_to(directory / "groups")))


def test_a_group_without_a_limit_leaves_all(tmp_path: Path) -> None:
    assert left(proc(tmp_path, V2, "0::/pod\n", pod=v2("max", 5))) is None


def test_without_control_groups_there_is_no_limit(tmp_path: Path) -> None:
    assert room(tmp_path) is None
    assert left(proc(tmp_path, "24 1 0:25 / / rw - ext4 /dev/vda rw\n", "0::/\n")) is None


def test_a_group_leaves_its_limit_without_what_is_used(tmp_path: Path) -> None:
    assert left(proc(tmp_path, V2, "0::/pod\n", pod=v2(1000, 300))) == (700, "pod")


def test_files_can_be_dropped_and_shared_memory_cannot(tmp_path: Path) -> None:
    statistics: dict[str, Any] = {"anon": 1, "file": 500, "shmem": 200, "slab_reclaimable": 40}
    assert left(proc(tmp_path, V2, "0::/pod\n", pod=v2(1000, 900, **statistics))) == (440, "pod")


def test_a_group_that_is_over_its_limit_leaves_nothing(tmp_path: Path) -> None:
    assert left(proc(tmp_path, V2, "0::/pod\n", pod=v2(100, 300))) == (0, "pod")


def test_the_groups_above_count_too(tmp_path: Path) -> None:
    groups: dict[str, Any] = {"pods": v2(600, 500), "pods__pod": v2("max", 200), "pods__pod__container": v2(1000, 100)}
    assert left(proc(tmp_path, V2, "0::/pods/pod/container\n", **groups)) == (100, "pods")


def test_in_a_namespace_the_group_is_the_top(tmp_path: Path) -> None:
    assert left(proc(tmp_path, V2, "0::/\n", **dict[str, Any]({"": v2(1000, 300)}))) == (700, ".")


@pytest.mark.parametrize(
    ("swap", "expected"), [("0", 700), ("50", 750), ("max", 700 + 100 * 1024), (None, 102400 + 700)]
)
def test_what_may_be_swapped_out_counts(tmp_path: Path, swap: str | None, expected: int) -> None:
    assert left(proc(tmp_path, V2, "0::/pod\n", 100, pod=v2(1000, 300, swap))) == (expected, "pod")


def test_the_first_version_is_read_too(tmp_path: Path) -> None:
    groups: dict[str, Any] = {
        "docker": v1(0x7FFFFFFFFFFFF000, 900),
        "docker__id": v1(1000, 900, total_cache=500, total_shmem=200),
    }
    assert left(proc(tmp_path, V1, "3:cpu:/x\n4:memory:/docker/id\n0::/y\n", **groups)) == (400, "docker/id")


def test_the_first_version_limits_memory_and_swap_together(tmp_path: Path) -> None:
    group = v1(1000, 900, with_swap=1050, total_cache=20)
    assert left(proc(tmp_path, V1, "4:memory:/pod\n", 100, pod=group)) == (170, "pod")


FILL = """
import os, sys
import torch
from support.sources import Tensors
from vllm_ascend.model_loader.netloader.weights.arena import Arena, allocate
from vllm_ascend.model_loader.netloader.errors import NoRoom

group, how, nbytes = sys.argv[1], sys.argv[2], int(sys.argv[3])
manifest = Tensors({"w": torch.empty(nbytes, dtype=torch.uint8)}).manifest
small = Tensors({"w": torch.empty(nbytes // 16, dtype=torch.uint8)}).manifest
with open(f"{group}/cgroup.procs", "w") as processes:
    processes.write(str(os.getpid()))
if how == "checked":
    allocate(small).close()
    try:
        allocate(manifest)
    except NoRoom as error:
        sys.exit(str(error))
else:
    Arena.create(nbytes).writable()[:] = bytes(nbytes)
"""
ROOT = Path(__file__).parents[5]


@contextlib.contextmanager
def limited_group(nbytes: int) -> Iterator[Path]:
    """A control group of this machine's kernel with that limit. Skips the test where none can be made."""
    group = _new_group()
    try:
        for name, limit in LIMITS.items():
            if (group / name).exists():
                (group / name).write_text(str(limit(nbytes)))
        yield group
    finally:
        group.rmdir()


LIMITS: dict[str, Callable[[int], int]] = {
    "memory.limit_in_bytes": lambda nbytes: nbytes,
    "memory.memsw.limit_in_bytes": lambda nbytes: nbytes,
    "memory.max": lambda nbytes: nbytes,
    "memory.swap.max": lambda _: 0,
}


def _new_group() -> Path:
    for root in (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")):
        group = root / f"netloader-test-{os.getpid()}"
        with contextlib.suppress(OSError):
            group.mkdir()
            if any((group / name).exists() and os.access(group / name, os.W_OK) for name in LIMITS):
                return group
            group.rmdir()
    pytest.skip("this process may make no control group with a limit on memory")


def fill_within(group: Path, how: str, nbytes: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", FILL, str(group), how, str(nbytes)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
    )


def test_weights_that_do_not_fit_are_refused_where_the_kernel_would_kill() -> None:
    with limited_group(64 * MIB) as group:
        assert fill_within(group, "unchecked", 256 * MIB).returncode == -signal.SIGKILL
        refused = fill_within(group, "checked", 256 * MIB)
    assert refused.returncode == 1
    assert f"the weights need {256 * MIB} bytes of memory, and {group}/memory." in refused.stderr
    assert "the kernel would kill this process while it loads" in refused.stderr
