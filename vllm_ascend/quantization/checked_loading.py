"""Loading that checks what it loads: torch would turn the integers of a quantised weight into floats, or the reverse.

A description that does not fit its checkpoint would give such weights, and answers without sense. The arguments of a
loader have vLLM's names, as it passes some of them by name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch

Loader = Callable[..., Any]


def wrapped(load: Loader, body: Callable[..., Any]) -> Loader:
    """A loader that calls `body` with `load` and the arguments.

    If `load` is a method of a layer, so is the result. vLLM remembers loaders for a reload, and takes the layer out of
    methods; within anything else it would keep every layer that was ever made.
    """
    if not isinstance(load, MethodType):
        return functools.partial(body, load)
    function = load.__func__

    @functools.wraps(function)
    def method(layer: Any, *args: Any, **kwargs: Any) -> Any:
        return body(functools.partial(function, layer), *args, **kwargs)

    return MethodType(method, load.__self__)


def checked(load: Loader, layer: str, *, integers: bool) -> Loader:
    """vLLM's weight loader of a parameter of `layer`, for tensors that must hold integers, or must not.

    It raises ValueError for another tensor.
    """

    def body(load: Loader, param: torch.nn.Parameter, loaded_weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if loaded_weight.is_floating_point() == integers:
            expected = "integers" if integers else "floats"
            found = f"{loaded_weight.dtype} {tuple(loaded_weight.shape)}"
            raise ValueError(f"{layer}: the checkpoint has {found} where {expected} are described")
        return load(param, loaded_weight, *args, **kwargs)

    return wrapped(load, body)


def symmetric(load: Loader, layer: str) -> Loader:
    """For the offsets of weights, which must be 0. It raises ValueError for others."""

    def body(load: Loader, param: torch.nn.Parameter, loaded_weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if bool(loaded_weight.any()):
            raise ValueError(
                f"{layer} has weights with offsets, which are not supported on NPUs: quantise symmetrically"
            )
        return load(param, loaded_weight, *args, **kwargs)

    return wrapped(load, body)


def scales_in_bits(load: Loader) -> Loader:
    """For scales in float32, which ModelSlim writes as int64 that holds their bits if the model is in float16."""

    def body(load: Loader, param: torch.nn.Parameter, loaded_weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        in_bits = loaded_weight.dtype == torch.int64
        scales = loaded_weight.to(torch.int32).view(torch.float32) if in_bits else loaded_weight
        return load(param, scales, *args, **kwargs)

    return wrapped(load, body)
