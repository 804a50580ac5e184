"""How an operator of torch-npu gets an implementation: on the CPU's key of the genuine schema, by its name.

The library then carries it to the device as it carries ATen. What documentation demands of arguments is demanded here,
so that what works has a chance on a device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., object])

_libraries: dict[str, torch.library.Library] = {}  # a registration lives as long as its library


def implements(name: str) -> Callable[[Function], Function]:
    """For a function that takes what `name` takes, host tensors only; arguments at their default may be left out."""

    def register(function: Function) -> Function:
        namespace, operator = name.split("::")
        library = _libraries.setdefault(namespace, torch.library.Library(namespace, "IMPL"))
        library.impl(operator, function, "CPU")
        torch.ops.cann_sim.carry([name])
        return function

    return register


def require(holds: bool, operator: str, argument: str, found: object, expected: str) -> None:
    if not holds:
        raise RuntimeError(f"{operator}: {argument} is {found}, but must be {expected}")


def require_defaults(operator: str, others: dict[str, object]) -> None:
    """For arguments of which only the default is simulated: those that are given are not."""
    for argument, value in others.items():
        found = f"a tensor of {tuple(value.shape)}" if isinstance(value, torch.Tensor) else value
        raise RuntimeError(f"{operator}: {argument}={found} is not simulated")


def require_dtype(operator: str, argument: str, tensor: torch.Tensor, *allowed: torch.dtype) -> None:
    names = ", ".join(str(each).removeprefix("torch.") for each in allowed)
    require(tensor.dtype in allowed, operator, f"the dtype of {argument}", tensor.dtype, f"one of {names}")


def require_contiguous(operator: str, **tensors: torch.Tensor) -> None:
    for argument, tensor in tensors.items():
        require(tensor.is_contiguous(), operator, argument, f"strided {tensor.stride()}", "contiguous")
