"""What tests of quantised layers compute with, and how they compare results."""

from __future__ import annotations

import torch


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Values on the host, the same each time for one and the same shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float32).to(dtype)


def assert_same(ours: torch.Tensor, expected: torch.Tensor) -> None:
    """That results are those that are expected, in float32: to the bit, or nearly where they are rounded to 16 bits."""
    if ours.dtype == torch.float32:
        assert torch.equal(ours.cpu(), expected)
    else:
        torch.testing.assert_close(ours.cpu().float(), expected, rtol=1e-2, atol=1e-2)
