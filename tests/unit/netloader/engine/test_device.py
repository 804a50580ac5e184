"""On which devices weights can be, of all that vLLM may compute with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_ascend.model_loader.netloader.errors import ConfigError


def device_of(kind: str, device: torch.device | None) -> torch.device:
    from vllm_ascend.model_loader.netloader.engine.device import device_of as device_for

    configured: Any = SimpleNamespace(device_config=SimpleNamespace(device_type=kind, device=device))
    return device_for(configured)


def test_weights_are_where_the_rank_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_of("cpu", torch.device("cpu")) == torch.device("cpu")
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 3)
    assert device_of("cuda", torch.device("cuda")) == torch.device("cuda", 3)


@pytest.mark.parametrize(("kind", "device"), [("tpu", None), ("fpga", torch.device("fpga"))])
def test_a_device_that_torch_cannot_use_is_refused_by_name(kind: str, device: torch.device | None) -> None:
    with pytest.raises(ConfigError, match=f"torch has no module for {kind} devices"):
        device_of(kind, device)
