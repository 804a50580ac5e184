"""How an operator of torch-npu gets an implementation: as the CPU's kernel of the genuine schema.

The library then carries it to the device in the same way as ATen's operators. The functions `require...` demand of
arguments what the documentation demands, so that what works here has a chance on a device.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import torch

FP32_SWITCH = "CANN_SIM_FP32"
Function = TypeVar("Function", bound=Callable[..., object])

_DTYPES = {1: torch.int8, 3: torch.int32, 5: torch.float16, 6: torch.float32, 12: torch.qint8, 15: torch.bfloat16}
"""By torch's numbers, which torch-npu's operators take for dtypes."""

_libraries: dict[str, torch.library.Library] = {}  # a registration lives as long as its library


def implements(name: str, *, takes_fractal: bool = False) -> Callable[[Function], Function]:
    """Makes the decorated function the implementation of the operator `name`, for example "npu::npu_rms_norm".

    Tensors in FRACTAL_NZ are refused, as torch-npu does for most of its operators, unless it `takes_fractal`: then it
    must look at each of its arguments.

    It is called with host tensors that alias the device's memory. Arguments that have their default are not passed, so
    it needs parameters only for those that it supports, and `**others` to refuse the rest.
    """

    def register(function: Function) -> Function:
        namespace, operator = name.split("::")
        library = _libraries.setdefault(namespace, torch.library.Library(namespace, "IMPL"))
        library.impl(operator, function, "CPU")
        torch.ops.cann_sim.carry(name, takes_fractal)
        return function

    return register


def require(holds: bool, operator: str, argument: str, found: object, expected: str) -> None:
    """Raises RuntimeError, naming operator and argument, unless the condition holds."""
    if not holds:
        raise RuntimeError(f"{operator}: {argument} is {found}, but must be {expected}")


def require_defaults(operator: str, others: dict[str, object]) -> None:
    """Raises RuntimeError if any argument was passed of which only the default is simulated."""
    for argument, value in others.items():
        found = f"a tensor of {tuple(value.shape)}" if isinstance(value, torch.Tensor) else value
        raise RuntimeError(f"{operator}: {argument}={found} is not simulated")


def require_dtype(operator: str, argument: str, tensor: torch.Tensor, *allowed: torch.dtype) -> None:
    """Raises RuntimeError unless the tensor has one of the allowed dtypes."""
    names = ", ".join(str(each).removeprefix("torch.") for each in allowed)
    require(tensor.dtype in allowed, operator, f"the dtype of {argument}", tensor.dtype, f"one of {names}")


def is_fractal(tensor: torch.Tensor) -> bool:
    """Returns whether a device holds this argument of the running operator in FRACTAL_NZ; its values are plain here."""
    return block_width(tensor) > 0


def block_width(tensor: torch.Tensor) -> int:
    """Returns the bytes in a row of the blocks in which a device holds this argument, or 0 if it is not in blocks."""
    return int(torch.ops.cann_sim.block_width(tensor))


def require_plain(operator: str, **tensors: torch.Tensor | None) -> None:
    """Raises RuntimeError if any of the tensors, given by the names of their arguments, is in FRACTAL_NZ."""
    for argument, tensor in tensors.items():
        require(tensor is None or not is_fractal(tensor), operator, f"the format of {argument}", "FRACTAL_NZ", "ND")


def require_whole(operator: str, argument: str, tensor: torch.Tensor) -> None:
    """Raises RuntimeError if the tensor is a view of its storage, which nobody can read in FRACTAL_NZ."""
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    found = "transposed" if tensor.mT.is_contiguous() else "a part"
    require(whole, operator, f"{argument}, which is in FRACTAL_NZ,", found, "a whole tensor")


def require_shape(operator: str, argument: str, tensor: torch.Tensor, *allowed: tuple[int, ...]) -> None:
    """Raises RuntimeError unless the tensor has one of the allowed shapes."""
    found, expected = tuple(tensor.shape), " or ".join(str(each) for each in dict.fromkeys(allowed))
    require(found in allowed, operator, f"the shape of {argument}", found, expected)


def require_output_dtype(operator: str, number: int | None, default: torch.dtype, *allowed: torch.dtype) -> torch.dtype:
    """Returns the dtype that torch-npu passes as a number; raises RuntimeError unless it is one of the allowed ones."""
    dtype = default if number is None else _DTYPES.get(number)
    names = ", ".join(str(each).removeprefix("torch.") for each in allowed)
    require(dtype in allowed, operator, "the output dtype", number if dtype is None else dtype, f"one of {names}")
    return dtype  # type: ignore[return-value]  # None is never allowed


def require_contiguous(operator: str, **tensors: torch.Tensor) -> None:
    """Raises RuntimeError unless all tensors, given by the names of their arguments, are contiguous."""
    for argument, tensor in tensors.items():
        require(tensor.is_contiguous(), operator, argument, f"strided {tensor.stride()}", "contiguous")


def undefined(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Returns what an operator leaves undefined: NaN, or the largest integer, so that nobody can rely on it."""
    return torch.full(shape, torch.nan if dtype.is_floating_point else torch.iinfo(dtype).max, dtype=dtype)


def fp32() -> tuple[torch.dtype, ...]:
    """Returns float32 where CANN_SIM_FP32=1 adds it to what fused and quantised operators compute, else nothing."""
    return (torch.float32,) if os.environ.get(FP32_SWITCH) == "1" else ()
