"""What sleep takes from a model on an NPU, by the worker's own choice of tensors. vLLM's runner is a stand-in here."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import nn

from vllm_ascend.worker.worker import NPUWorker


def worker(target: nn.Module, draft: nn.Module) -> NPUWorker:
    worker: Any = object.__new__(NPUWorker)
    worker.model_config = types.SimpleNamespace(enable_sleep_mode=True)
    worker.model_runner = types.SimpleNamespace(
        get_model=lambda: target, get_draft_model=lambda: draft, kv_caches=[torch.ones(4, device="npu:0")]
    )
    worker._sleep_mode_backend = None
    sleeper: NPUWorker = worker
    return sleeper


def model(value: float) -> Any:
    layers = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)).to("npu:0").requires_grad_(False)
    for parameter in layers.parameters():
        parameter.fill_(value)
    return layers


def test_level_2_drops_no_more_than_a_reload_brings_back() -> None:
    """`reload_weights` is for the target: a draft that was dropped too would stay empty (vllm #52487)."""
    target, draft = model(1.0), model(2.0)
    draft[0] = target[0]  # as drafts share the target's embedding
    backend = worker(target, draft).sleep_mode_backend
    backend.suspend(level=2)
    assert target[1].weight.untyped_storage().nbytes() == 0
    backend.resume()
    assert [layer.weight.unique().tolist() for layer in target] == [[0.0], [0.0]]
    assert draft[1].weight.unique().tolist() == [2.0]
    assert draft[0].weight is target[0].weight
