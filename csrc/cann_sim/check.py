"""What the unmodified torch-npu does on the simulated CANN, without operators.

Run it after `source build/env.sh`, with a Python that has torch and torch-npu 2.13.0. Each check is a function whose
name is the claim; those of ranks run in processes of their own, once as collectives block and once as they do not.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

DEVICES = 4
MEMORY_MB = 256
TIMEOUT = 3
"""Seconds after which a collective gives up: long enough for a busy machine, short enough for a test."""

os.environ |= {
    "CANN_SIM_DEVICES": str(DEVICES),
    "CANN_SIM_MEMORY": f"{MEMORY_MB}M",
    "CANN_SIM_HCCL_TIMEOUT": str(TIMEOUT),
    # Operators, if installed, would be loaded; torch-npu is imported by name.
    "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    # Otherwise torch-npu's watchdog ends the whole process a second after a collective has failed.
    "TORCH_HCCL_ASYNC_ERROR_HANDLING": "0",
}

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch_npu  # noqa: E402

DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.complex64,
]
REDUCED_DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int32, torch.int64]
"""What HCCL reduces on a device; torch-npu refuses the others itself or converts them with an operator."""
ELEMENTS = 4096
"""torch-npu pads smaller tensors with an operator before some collectives."""


def devices_are_there() -> None:
    assert torch.npu.is_available()
    assert torch.npu.device_count() == DEVICES
    torch.npu.set_device(1)
    assert torch.npu.current_device() == 1
    assert torch.accelerator.current_accelerator() == torch.device("npu")
    assert torch.accelerator.device_count() == DEVICES
    assert raises(RuntimeError, lambda: torch.npu.set_device(DEVICES))


def devices_have_properties() -> None:
    properties = torch.npu.get_device_properties(1)
    assert properties.name == torch.npu.get_device_name(1) == "Ascend910B1"
    assert properties.total_memory == MEMORY_MB << 20
    assert properties.cube_core_num == 24
    assert properties.uuid != torch.npu.get_device_properties(0).uuid


def another_thread_begins_on_device_0() -> None:
    torch.npu.set_device(1)
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(torch.npu.current_device()))
    thread.start()
    thread.join()
    assert seen == [0], "as on hardware: who works on another device must say so in each thread"


def copies_keep_every_bit() -> None:
    for dtype in DTYPES:
        original = sample(dtype)
        on_device = original.to("npu:1")
        beside = torch.empty_like(on_device)
        beside.copy_(on_device)
        elsewhere = beside.to("npu:2")
        assert elsewhere.device == torch.device("npu:2")
        assert torch.equal(elsewhere.cpu(), original), dtype


def pinned_memory_is_known() -> None:
    pinned = torch.arange(1000).pin_memory()
    assert pinned.is_pinned()
    assert not torch.arange(1000).is_pinned()
    on_device = pinned.to("npu", non_blocking=True)
    torch.npu.synchronize()
    assert torch.equal(on_device.cpu(), pinned)
    back = torch.empty(1000, dtype=torch.int64, pin_memory=True)
    back.copy_(on_device, non_blocking=True)
    torch.npu.current_stream().synchronize()
    assert torch.equal(back, pinned)


def streams_and_events_order_work() -> None:
    source, target = torch.arange(1000.0).npu(), torch.empty(1000, device="npu")
    stream = torch.npu.Stream()
    start, end = torch.npu.Event(enable_timing=True), torch.npu.Event(enable_timing=True)
    stream.wait_stream(torch.npu.current_stream())
    with torch.npu.stream(stream):
        assert torch.npu.current_stream() == stream
        start.record()
        target.copy_(source)
        end.record()
    torch.npu.current_stream().wait_event(end)
    end.synchronize()
    assert start.query()
    assert end.query()
    assert stream.query()
    assert start.elapsed_time(end) >= 0
    assert torch.equal(target.cpu(), source.cpu())
    untimed = torch.npu.Event()
    untimed.record()
    assert raises(RuntimeError, lambda: untimed.elapsed_time(end))


def memory_is_counted() -> None:
    torch.npu.empty_cache()
    torch.npu.reset_peak_memory_stats()
    before, (free, total) = torch.npu.memory_allocated(), torch.npu.mem_get_info()
    held = torch.empty(32 << 20, dtype=torch.uint8, device="npu")
    assert total == MEMORY_MB << 20
    assert 0 <= torch.npu.memory_allocated() - before - held.nbytes < 1 << 20  # torch-npu adds a little
    assert free - torch.npu.mem_get_info()[0] >= held.nbytes
    assert torch.npu.memory_stats()["allocated_bytes.all.peak"] >= held.nbytes
    del held
    torch.npu.empty_cache()
    assert torch.npu.memory_allocated() == before
    assert torch.npu.mem_get_info()[0] == free


def too_much_memory_is_an_out_of_memory_error() -> None:
    assert raises(torch.OutOfMemoryError, lambda: torch.empty(MEMORY_MB << 20, dtype=torch.uint8, device="npu"))
    half = torch.empty(MEMORY_MB << 19, dtype=torch.uint8, device="npu")
    assert raises(torch.OutOfMemoryError, lambda: torch.empty(MEMORY_MB << 19, dtype=torch.uint8, device="npu"))
    del half
    torch.npu.empty_cache()


def graphs_repeat_what_was_captured() -> None:
    source, target = torch.arange(8.0).npu(), torch.empty(8, device="npu")
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        target.copy_(source)
    source.copy_(torch.arange(8.0) + 100)
    graph.replay()
    torch.npu.synchronize()
    assert target.cpu().tolist() == [100 + i for i in range(8)]


def a_graph_does_not_let_the_host_wait() -> None:
    source = torch.arange(8.0).npu()
    graph = torch.npu.NPUGraph()

    def wait_in_capture() -> None:
        with torch.npu.graph(graph):
            source.cpu()

    assert raises(RuntimeError, wait_in_capture)
    torch.npu.synchronize()


def operators_fail_by_name() -> None:
    value = torch.arange(8.0).npu()
    assert raises(RuntimeError, lambda: value + value, "operator Add is not simulated")


def collectives_of_ranks(rank: int, size: int) -> None:
    index = torch.arange(ELEMENTS)
    for dtype in REDUCED_DTYPES:
        values = (index % 3 + rank).to(dtype).npu()
        dist.all_reduce(values)
        assert torch.equal(values.cpu(), sum((index % 3 + r) for r in range(size)).to(dtype)), dtype
    values = (index + rank).npu()
    dist.all_reduce(values, dist.ReduceOp.MAX)
    assert torch.equal(values.cpu(), index + size - 1)

    for dtype in DTYPES[:3] + DTYPES[4:10]:
        mine = sample(dtype, rank).npu()
        gathered = [torch.empty_like(mine) for _ in range(size)]
        dist.all_gather(gathered, mine)
        assert all(torch.equal(part.cpu(), sample(dtype, r)) for r, part in enumerate(gathered)), dtype
        dist.broadcast(mine, 1)
        assert torch.equal(mine.cpu(), sample(dtype, 1)), dtype

    part = torch.empty(ELEMENTS, dtype=torch.int64).npu()
    dist.reduce_scatter_single(part, torch.arange(ELEMENTS * size).npu())
    assert torch.equal(part.cpu(), size * torch.arange(ELEMENTS * rank, ELEMENTS * (rank + 1)))
    dist.barrier()


def point_to_point_of_ranks(rank: int, size: int) -> None:
    for dtype in DTYPES[:3] + DTYPES[4:10]:
        mine = sample(dtype, rank).npu()
        theirs = torch.empty_like(mine)
        if rank == 0:
            dist.send(mine, 1)
            dist.recv(theirs, 1)
        else:
            dist.recv(theirs, 0)
            dist.send(mine, 0)
        assert torch.equal(theirs.cpu(), sample(dtype, 1 - rank)), dtype
    received = torch.empty(ELEMENTS).npu()
    sent = torch.full((ELEMENTS,), float(rank)).npu()
    operations = [dist.P2POp(dist.isend, sent, 1 - rank), dist.P2POp(dist.irecv, received, 1 - rank)]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    assert torch.equal(received.cpu(), torch.full((ELEMENTS,), 1.0 - rank))


def a_killed_rank_is_an_exception_of_ranks(rank: int, size: int) -> None:
    values = torch.ones(ELEMENTS).npu()
    dist.all_reduce(values)
    torch.npu.synchronize()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()

    def reduce_and_wait() -> None:
        dist.all_reduce(values)
        torch.npu.synchronize()

    assert raises(RuntimeError, reduce_and_wait, "rank 1 is gone")
    assert time.monotonic() - start < TIMEOUT
    assert torch.equal(torch.arange(8).npu().cpu(), torch.arange(8)), "the device goes on"


def an_absent_rank_is_an_exception_of_ranks(rank: int, size: int) -> None:
    values = torch.ones(ELEMENTS).npu()
    dist.all_reduce(values)
    torch.npu.synchronize()
    if rank == 1:
        time.sleep(TIMEOUT + 1)
        return
    start = time.monotonic()

    def reduce_and_wait() -> None:
        dist.all_reduce(values)
        torch.npu.synchronize()

    assert raises(RuntimeError, reduce_and_wait, f"nothing has moved for {TIMEOUT} s")
    assert TIMEOUT - 0.5 < time.monotonic() - start < TIMEOUT + 5


ALONE: list[Callable[[], None]] = [
    devices_are_there,
    devices_have_properties,
    another_thread_begins_on_device_0,
    copies_keep_every_bit,
    pinned_memory_is_known,
    streams_and_events_order_work,
    memory_is_counted,
    too_much_memory_is_an_out_of_memory_error,
    graphs_repeat_what_was_captured,
    a_graph_does_not_let_the_host_wait,
    operators_fail_by_name,
]
OF_RANKS: dict[Callable[[int, int], None], int] = {
    collectives_of_ranks: 0,
    point_to_point_of_ranks: 0,
    a_killed_rank_is_an_exception_of_ranks: 1,
    an_absent_rank_is_an_exception_of_ranks: 0,
}
"""The checks that run in two ranks, and how many of these ranks do not survive."""


def sample(dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(ELEMENTS, generator=generator) * 3).to(dtype)


def raises(kind: type[Exception], call: Callable[[], object], text: str = "") -> bool:
    try:
        call()
    except kind as error:
        if text not in str(error):
            raise
        return True
    return False


def carry_what_a_barrier_needs() -> torch.library.Library:
    """Makes torch.ones work on the device: torch-npu's barrier reduces a tensor of ones. The library must be kept."""

    def ones(size: list[int], *, device: torch.device, dtype: torch.dtype | None = None, **_: object) -> torch.Tensor:
        return torch.ones(size, dtype=dtype).to(device)

    library = torch.library.Library("aten", "IMPL")
    library.impl("ones", ones, "PrivateUse1", allow_override=True)
    return library


def run_rank(name: str, rank: int, size: int, meeting_place: str) -> None:
    library = carry_what_a_barrier_needs()
    check = {check.__name__: check for check in OF_RANKS}[name]
    torch.npu.set_device(rank)
    dist.init_process_group("hccl", init_method=f"file://{meeting_place}", rank=rank, world_size=size)
    check(rank, size)
    dist.destroy_process_group()
    del library


def run_ranks(name: str, dead: int, asynchronous: bool) -> bool:
    """Returns whether all ranks but the dead succeed; if not, shows what they printed."""
    environment = os.environ | {"CANN_SIM_ASYNC": str(int(asynchronous))}
    with tempfile.TemporaryDirectory() as directory:
        arguments = [sys.executable, __file__, "--check", name, "--meeting-place", str(Path(directory) / "store")]
        ranks = [
            subprocess.Popen(
                [*arguments, "--rank", str(rank)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(2)
        ]
        outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    passed = [rank.returncode for rank in ranks].count(0) == len(ranks) - dead
    if not passed:
        print(*outputs, sep="\n")
    return passed


def run_alone(check: Callable[[], None]) -> bool:
    torch.npu.set_device(1)
    try:
        check()
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", help="one check of ranks, for --rank")
    parser.add_argument("--rank", type=int)
    parser.add_argument("--meeting-place")
    options = parser.parse_args()
    if options.check:
        run_rank(options.check, options.rank, 2, options.meeting_place)
        return 0
    print(f"torch {torch.__version__}, torch-npu {torch_npu.__version__}")
    results = {check.__name__: run_alone(check) for check in ALONE}
    for check, dead in OF_RANKS.items():
        for asynchronous in (False, True):
            name = check.__name__ + (", not blocking" if asynchronous else "")
            results[name] = run_ranks(check.__name__, dead, asynchronous)
    for name, passed in results.items():
        print("ok    " if passed else "FAILED", name.replace("_", " "))
    return 0 if all(results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
