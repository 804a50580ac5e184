"""Which operators a piece of code runs on a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Operators(TorchDispatchMode):
    """`names` of those that ran while this was entered, without views and allocations. Use it in inference mode.

    Operators of torch that consist of others are one there, and so is what vLLM hides behind an operator of its own.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func._schema.name.startswith(("aten::empty", "aten::new_empty")) and (
            func._schema.is_mutable or _storages(result) - _storages((args, kwargs))
        ):
            self.names.append(func._schema.name.split("::")[1])
        return result


def _storages(values: Any) -> set[int]:
    return {each.untyped_storage().data_ptr() for each in tree_leaves(values) if isinstance(each, torch.Tensor)}


def operators_of(call: Callable[[], object]) -> list[str]:
    operators = Operators()
    with torch.inference_mode(), operators:
        call()
    return operators.names
