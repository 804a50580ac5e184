"""Tests of the operators: small devices, and processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

os.environ.setdefault("CANN_SIM_MACHINE", f"operators {os.getpid()}")
os.environ.setdefault("CANN_SIM_MEMORY", "512M")  # read when a device is first used

import torch
from torch.utils._pytree import tree_map

if not hasattr(torch.ops.cann_sim, "install"):
    pytest.exit("the simulator is not there: run `make check-operators PYTHON=...`", returncode=2)

RunScript = Callable[..., subprocess.CompletedProcess[str]]


def on_meta(value: object) -> object:
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def shape_of(value: object) -> object:
    return (value.shape, value.dtype) if isinstance(value, torch.Tensor) else value


@pytest.fixture
def require_meta_shapes() -> Callable[..., None]:
    """Fails unless an operator's results have the shapes and dtypes that the wheel's meta kernel promises for them."""

    def require(operator: Callable[..., object], positional: tuple[object, ...], named: dict[str, object]) -> None:
        expected = operator(*tree_map(on_meta, positional), **tree_map(on_meta, named))
        assert tree_map(shape_of, operator(*positional, **named)) == tree_map(shape_of, expected)

    return require


@pytest.fixture(autouse=True)
def first_device() -> Iterator[None]:
    torch.npu.set_device(0)
    yield
    torch.npu.synchronize()


@pytest.fixture
def errors_told_at_once() -> None:
    """Skips a test of an error that torch-npu's queue would tell later, and after which the queue is of no more use."""
    if os.environ.get("TASK_QUEUE_ENABLE") != "0":
        pytest.skip("torch-npu's queue is on")


@pytest.fixture
def run_script() -> RunScript:
    """Runs Python in a process of its own, with these variables set, or unset where they are None."""

    def run(script: str, **variables: str | None) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if name not in variables}
        environment |= {name: value for name, value in variables.items() if value is not None}
        command = [sys.executable, "-W", "ignore", "-c", script]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)

    return run
