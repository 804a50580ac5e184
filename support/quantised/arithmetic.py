"""How weights become integers, and what is computed from them for checkpoints."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Rows(NamedTuple):
    """A matrix [out, in] as integers, with a scale for each row."""

    integers: torch.Tensor
    """int8, whatever the number of bits."""
    scales: torch.Tensor
    """float32, [out, 1]."""

    def dequantised(self) -> torch.Tensor:
        return self.integers.float() * self.scales


class Activation(NamedTuple):
    """x is quantised as round(x / scale) + offset, clamped to int8."""

    scale: float
    offset: int


def quantise_rows(weight: torch.Tensor, bits: int = 8) -> Rows:
    """Symmetric: the largest value of each row becomes the largest integer."""
    largest = 2 ** (bits - 1) - 1
    scales = (weight.float().abs().amax(1, keepdim=True) / largest).clamp_min(torch.finfo(torch.float32).tiny)
    return Rows((weight.float() / scales).round().to(torch.int8), scales)


def quantise_range(low: torch.Tensor, high: torch.Tensor) -> Activation:
    """What spreads these values, and 0, over all of int8."""
    least, most = min(float(low.min()), 0.0), max(float(high.max()), 0.0)
    scale = (most - least) / 255 or 1.0
    return Activation(scale, -128 - round(least / scale))


def pack_pairs_of_rows(integers: torch.Tensor) -> torch.Tensor:
    """int8 [out / 2, in]: the lower half of a byte is of the even row, the upper half of the odd row after it."""
    even, odd = integers[0::2], integers[1::2]
    return (odd << 4) | (even & 0xF)


def sums_for_low_halves(rows: Rows, parts: int) -> torch.Tensor:
    """float32 [out, parts]: 8 times the sum of each row, over that many equal parts of it.

    Activations in int8 are multiplied in two halves of 4 bits, of which the lower one counts from 0 to 15. Devices take
    it as -8 to 7, so that this is missing.
    """
    sums: torch.Tensor = rows.dequantised().unflatten(1, (parts, -1)).sum(2)
    return 8 * sums
