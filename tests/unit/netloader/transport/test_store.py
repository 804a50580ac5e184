"""What a server hands out."""

from __future__ import annotations

import torch

from support.models import (
    Layers,
    loaded_from_disk,
    module,
)
from vllm_ascend.model_loader.netloader.model.device_memory import tensor_in
from vllm_ascend.model_loader.netloader.model.views import manifest_of
from vllm_ascend.model_loader.netloader.transport.store import WeightStore
from vllm_ascend.model_loader.netloader.weights.arena import Arena


def test_a_store_carries_what_else_loading_has_set() -> None:
    store = loaded_from_disk(Layers())
    assert store.attributes == {}
    told = WeightStore(store.manifest, store.memory, 2, {"has_own_embed_tokens": True, "layers.0.rank": None})
    assert told.attributes == {"has_own_embed_tokens": True, "layers.0.rank": None}
    assert WeightStore(store.manifest, store.memory, 3).attributes == {}


def test_a_store_gives_its_bytes_in_the_address_space_of_its_manifest() -> None:
    manifest = manifest_of([("a", torch.empty(3)), ("b", torch.empty(2, dtype=torch.uint8))])
    arena = Arena.create(manifest.nbytes)
    tensor_in(arena, manifest.tensors[0]).copy_(torch.tensor([1.0, 2.0, 3.0]))
    tensor_in(arena, manifest.tensors[1]).fill_(255)
    arena.seal()
    store = WeightStore(manifest, arena, 7)
    assert store.bytes.nbytes == manifest.nbytes == 128
    assert store.bytes[:].readonly
    assert bytes(store.bytes[:12]) == torch.tensor([1.0, 2.0, 3.0]).numpy().tobytes()
    assert bytes(store.bytes[64:67]) == b"\xff\xff\x00"
    assert store.bytes is store.bytes


def test_a_session_that_still_reads_keeps_the_bytes_of_a_closed_store() -> None:
    store = loaded_from_disk(module({"w": torch.ones(4)}))
    reader = store.bytes
    store.close()
    store.close()
    assert bytes(reader[:16]) == torch.ones(4).numpy().tobytes()
