"""How post-processing on an NPU rearranges matrices, on tensors of any device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch.nn.functional import pad


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` with each of its matrices transposed in memory."""
    return tensor.transpose(-2, -1).contiguous()


def fractal(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of `tensor` in FRACTAL_NZ: strips of 32 bytes in width, filled up with zeros to 16 rows."""
    rows, columns = tensor.shape[-2:]
    width = 32 // tensor.itemsize
    whole = pad(tensor, (0, -columns % width, 0, -rows % 16))
    strips = whole.view(*whole.shape[:-1], -1, width).transpose(-3, -2)
    return strips.contiguous().flatten()


def as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of `tensor`."""
    return tensor.clone()


ARRANGED: Final[dict[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "as it is": as_it_is,
    "transposed": transposed,
    "in FRACTAL_NZ": fractal,
    "transposed and in FRACTAL_NZ": lambda tensor: fractal(transposed(tensor)),
}
"""By a name for each, what returns the memory of a tensor that was arranged like that."""
