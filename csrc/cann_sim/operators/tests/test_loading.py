"""How the operators get into a process, and that they stay out of one without a simulator."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest

RunScript = Callable[..., subprocess.CompletedProcess[str]]

ADD = "import torch; a = torch.arange(8).npu(); print((a + a).tolist())"
SUMS = str([2 * i for i in range(8)])


def test_importing_torch_is_enough(run_script: RunScript) -> None:
    assert run_script(ADD).stdout.strip() == SUMS


def test_importing_torch_npu_afterwards_changes_nothing(run_script: RunScript) -> None:
    assert run_script(ADD.replace("import torch;", "import torch, torch_npu;")).stdout.strip() == SUMS


@pytest.mark.parametrize("names", [("torch_npu", "cann_sim_operators"), ("cann_sim_operators", "torch_npu")])
def test_the_order_of_the_entry_points_does_not_matter(run_script: RunScript, names: tuple[str, str]) -> None:
    script = f"""
import importlib.metadata as metadata
found = {{each.name: each for each in metadata.entry_points(group="torch.backends")}}
metadata.entry_points = lambda group: [found[name] for name in {names}]
{ADD}
"""
    done = run_script(script)
    assert done.stdout.strip() == SUMS, done.stderr


def test_a_process_that_is_spawned_has_them(run_script: RunScript) -> None:
    script = f"""
import concurrent.futures as futures, multiprocessing
with futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
    pool.submit(exec, {ADD!r}).result()
"""
    done = run_script(script)
    assert done.stdout.strip() == SUMS, done.stderr


def test_memory_can_be_asked_for_before_a_device_is_set(run_script: RunScript) -> None:
    done = run_script("import torch; print(torch.npu.mem_get_info())", CANN_SIM_MEMORY="16M")
    assert done.stdout.strip() == f"({16 << 20}, {16 << 20})", done.stderr


def test_without_a_simulator_only_torch_npu_fails(run_script: RunScript) -> None:
    done = run_script("import torch", ASCEND_HOME_PATH=None, LD_LIBRARY_PATH=None)
    assert "Failed to load the backend extension: torch_npu" in done.stderr


def test_without_autoload_nothing_is_loaded(run_script: RunScript) -> None:
    script = "import sys, torch; print('torch_npu' in sys.modules, 'cann_sim_operators' in sys.modules)"
    assert run_script(script, TORCH_DEVICE_BACKEND_AUTOLOAD="0").stdout.split() == ["False", "False"]


@pytest.mark.parametrize("home", [None, "", "lib", "/nowhere"])
def test_it_is_inert_where_no_library_lies(run_script: RunScript, home: str | None) -> None:
    script = "import sys, cann_sim_operators as o; o.autoload(); print('torch' in sys.modules)"
    done = run_script(script, ASCEND_HOME_PATH=home)
    assert done.stdout.split() == ["False"], done.stderr


@pytest.mark.parametrize(("queue", "told"), [("0", "at once"), ("1", "later")])
def test_operators_go_through_torch_npus_queue_if_it_is_on(run_script: RunScript, queue: str, told: str) -> None:
    script = """
import torch
values, index = torch.zeros(4).npu(), torch.tensor([9]).npu()
values.add_(1)  # torch-npu waits for the first operator that it queues
told = "at once"
try:
    values.index_fill_(0, index, 1.0)
    told = "later"
    torch.npu.synchronize()
except (IndexError, RuntimeError):
    print(told)
"""
    done = run_script(script, TASK_QUEUE_ENABLE=queue)
    assert done.stdout.strip() == told, done.stderr
