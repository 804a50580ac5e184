"""A process that fetches weights and relays them meanwhile, as an engine does: `Child(Neighbour, ...)`."""

from __future__ import annotations

import contextlib
import os

import torch

from support.members import CHUNK, members
from support.sources import Tensors
from vllm_ascend.model_loader.netloader.client import neighbours
from vllm_ascend.model_loader.netloader.client.search import search
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.transport import digests
from vllm_ascend.model_loader.netloader.transport.base import Timeouts
from vllm_ascend.model_loader.netloader.transport.registry import transports


def weights(chunks: int, factor: int = 1) -> Tensors:
    return Tensors({"w": torch.arange(chunks * CHUNK // 4, dtype=torch.int32) * factor})


class Neighbour:
    """Fetches `weights(chunks)` by shared memory or tcp, with chunks of the size that tests of swarms have.

    Orders are an endpoint (begin to fetch from there), "held" (how many chunks there are), "sessions" (how many clients
    it has), and "result": the file in which the weights are, and the bytes by source.
    """

    def __init__(self, chunks: int, purpose: bytes) -> None:
        """`purpose` is that of claims in the test."""
        settings = ((digests, "CHUNK_BYTES", CHUNK), (search, "HELP_AFTER", 0.0), (neighbours, "PURPOSE", purpose))
        for module, name, value in settings:
            setattr(module, name, value)
        self._scope = contextlib.ExitStack()
        kinds = transports(["shared_memory", "tcp"])
        (self._member,) = self._scope.enter_context(members(1, weights(chunks), kinds, timeouts=Timeouts(30.0, 30.0)))

    def __call__(self, order: Endpoint | str) -> object:
        member = self._member
        if isinstance(order, Endpoint):
            member.start(order)
            return None
        if order == "held":
            publication = member.relay.publication
            return 0 if publication is None or publication.store.held is None else len(publication.store.held)
        if order == "sessions":
            return len(member.server.state().sessions)
        fetched = member.join()
        return os.fstat(fetched.memory.descriptor or 0).st_ino, dict(member.client.received), dict(member.client.shared)
