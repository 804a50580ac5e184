"""Netloader's half of measurements with synthetic weights: what is served, and one fetch that is ready to go."""

from __future__ import annotations

import contextlib
import gc
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from benchmarks.harness.memory import touch
from benchmarks.harness.tables import MEGABYTE
from support.synthetic import publication_of, request_of, sealed_arena
from vllm_ascend.model_loader.netloader.client.fetch import Client
from vllm_ascend.model_loader.netloader.client.options import FetchOptions
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.server.publications import Publication
from vllm_ascend.model_loader.netloader.transport.base import Timeouts
from vllm_ascend.model_loader.netloader.transport.tcp import TcpTransport
from vllm_ascend.model_loader.netloader.weights.arena import Arena
from vllm_ascend.model_loader.netloader.wire.access import Access


@dataclass(frozen=True)
class Way:
    """How Netloader fetches in one measurement."""

    verify: bool = True
    memory_ahead: bool = False
    """Whether the pages of the arena are made before the clock starts."""


def synthetic_arena(nbytes: int) -> Arena:
    """A sealed arena of arbitrary bytes. The caller closes it, or publishes it."""
    return sealed_arena(nbytes, random.Random(0).randbytes(MEGABYTE))


def digested_publication(arena: Arena) -> Publication:
    """What a server publishes, with all digests made, as they are in an instance that has run for a while."""
    publication = publication_of(arena)
    publication.store.root()
    return publication


@contextlib.contextmanager
def prepared_fetch(
    nbytes: int, source: Endpoint, way: Way, access: Access | None = None
) -> Iterator[Callable[[], None]]:
    """A function that fetches synthetic weights once, by `tcp`. What it has fetched is freed in the end."""
    options = FetchOptions(request_of(nbytes), Timeouts(), access or Access(), verify=way.verify)
    if way.memory_ahead:
        arena = _touched_arena(nbytes)
        options = replace(options, allocate=lambda _: arena)
    fetched = []
    client = Client(options, (TcpTransport(),))
    yield lambda: fetched.append(client.fetch([source]))
    for each in fetched:
        each.memory.close()
    fetched.clear()
    gc.collect()


def _touched_arena(nbytes: int) -> Arena:
    arena = Arena.create(nbytes)
    with arena.writable() as data:
        touch(data)
    return arena
