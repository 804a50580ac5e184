"""Weights of any size that belong to no model: to be served and fetched without torch."""

from __future__ import annotations

import os
from collections.abc import Mapping

from vllm_ascend.model_loader.netloader.server.publications import Publication
from vllm_ascend.model_loader.netloader.transport.digests import StoreDigests
from vllm_ascend.model_loader.netloader.transport.store import Request, WeightStore
from vllm_ascend.model_loader.netloader.weights.arena import Arena
from vllm_ascend.model_loader.netloader.weights.identity import ModelIdentity, RankCoordinates
from vllm_ascend.model_loader.netloader.weights.manifest import Manifest, TensorSpec, chunks
from vllm_ascend.model_loader.netloader.wire.messages import AttributeValue

IDENTITY = ModelIdentity(name="synthetic", architecture="Synthetic", config_digest="", dtype="uint8")
TENSOR_BYTES = 8_000_000


def manifest_of(nbytes: int) -> Manifest:
    places = enumerate(chunks(nbytes, TENSOR_BYTES))
    return Manifest(TensorSpec(f"w{number}", "uint8", (length,), (1,), offset) for number, (offset, length) in places)


def request_of(nbytes: int) -> Request:
    """What a client asks for that wants `nbytes` of synthetic weights."""
    return Request(IDENTITY, RankCoordinates(), manifest_of(nbytes))


def sealed_arena(nbytes: int, block: bytes) -> Arena:
    """An arena that holds `block` over and over, with all its pages made. The caller closes it, or publishes it."""
    arena = Arena.create(nbytes)
    with arena.writable() as data:
        for offset, length in chunks(nbytes, len(block)):
            data[offset : offset + length] = block[:length]
    arena.seal()
    return arena


def shared(arena: Arena) -> Arena:
    """Another arena over the pages of a sealed one, for another server to publish and close."""
    return Arena.adopt(os.dup(arena.descriptor), arena.nbytes)


def publication_of(
    arena: Arena, generation: int = 1, attributes: Mapping[str, AttributeValue] | None = None
) -> Publication:
    """What a server publishes of a sealed arena. Digests are made when they are asked for first."""
    store = WeightStore(
        manifest_of(arena.nbytes), arena, generation, attributes or {}, digests=StoreDigests(arena.reader())
    )
    return Publication(IDENTITY, RankCoordinates(), store)
