"""Operators and streams, where collectives really run behind the caller's back."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

RunScript = Callable[..., subprocess.CompletedProcess[str]]


def test_operators_run_in_the_stream_that_is_current() -> None:
    stream, x = torch.npu.Stream(), torch.ones(1000, device="npu")
    event = torch.npu.Event()
    stream.wait_stream(torch.npu.current_stream())
    with torch.npu.stream(stream):
        x.mul_(2)
        event.record()
    torch.npu.current_stream().wait_event(event)
    assert bool((x + 1 == 3).all())


def test_threads_work_on_devices_of_their_own() -> None:
    def count(device: int) -> float:
        torch.npu.set_device(device)
        x = torch.zeros(1000, device=f"npu:{device}")
        for _ in range(200):
            x = x + 1
        return x.sum().item()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(count, [0, 1, 0, 1])) == [200_000] * 4


RANK = """
import time, torch, torch.distributed as dist
rank = RANK
torch.npu.set_device(rank)
dist.init_process_group("hccl", init_method="file://STORE", rank=rank, world_size=2)
x = torch.full((1 << 16,), 1.0 + rank, device="npu")
dist.all_reduce(x)
torch.npu.synchronize()
for repetition in range(10):
    if rank == repetition % 2:
        time.sleep(0.05)
    x.fill_(1.0 + rank)
    work = dist.all_reduce(x, async_op=True)
    y = torch.arange(1 << 16, device="npu")          # beside the collective
    work.wait()
    z = x * 2                                        # after it
    host = torch.empty(1 << 16, dtype=torch.float64)
    host[:] = z                                      # a copy that converts
    assert bool((host == 6).all()), host
    gathered = [torch.empty(3, device="npu") for _ in range(2)]
    dist.all_gather(gathered, z[:3] + rank)          # padded by operators that come past the dispatcher
    assert torch.stack(gathered).tolist() == [[6.0] * 3, [7.0] * 3], gathered
flags = torch.tensor([rank == 0, False], device="npu")
dist.all_reduce(flags)                               # converted by an operator that comes past the dispatcher
assert flags.tolist() == [True, False], flags
dist.barrier()
dist.destroy_process_group()
print("done")
"""


@pytest.mark.parametrize("asynchronous", ["0", "1"])
def test_operators_wait_for_collectives_before_them(run_script: RunScript, tmp_path: Path, asynchronous: str) -> None:
    script = RANK.replace("STORE", str(tmp_path / "store"))
    with ThreadPoolExecutor(2) as pool:
        ranks = [
            pool.submit(run_script, script.replace("RANK", str(rank)), CANN_SIM_ASYNC=asynchronous) for rank in (0, 1)
        ]
    for rank in ranks:
        assert rank.result().stdout.strip() == "done", rank.result().stderr


def test_a_failed_collective_fails_what_follows(run_script: RunScript, tmp_path: Path) -> None:
    script = """
import time, torch, torch.distributed as dist
torch.npu.set_device(RANK)
dist.init_process_group("hccl", init_method="file://STORE", rank=RANK, world_size=2)
x = torch.ones(1 << 16, device="npu")
dist.all_reduce(x)
torch.npu.synchronize()
if RANK == 1:
    import os; os._exit(0)
dist.all_reduce(x)
try:
    print((x + 1).sum().item())
except RuntimeError as error:
    print("refused:", error)
import os; os._exit(0)
"""
    script = script.replace("STORE", str(tmp_path / "store"))
    variables = {"CANN_SIM_ASYNC": "1", "TORCH_HCCL_ASYNC_ERROR_HANDLING": "0"}
    with ThreadPoolExecutor(2) as pool:
        survivor, _ = [pool.submit(run_script, script.replace("RANK", str(rank)), **variables) for rank in (0, 1)]
    assert "refused: " in survivor.result().stdout, survivor.result()
    assert "rank 1 is gone" in survivor.result().stdout
