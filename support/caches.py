"""Caches on sockets of their own, and weights to hand to them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from support.sources import IDENTITY, SHORT, SMALL, Tensors
from support.wait import wait_until
from vllm_ascend.model_loader.netloader.cache import asking, place
from vllm_ascend.model_loader.netloader.cache.asking import Given
from vllm_ascend.model_loader.netloader.cache.contents import Contents
from vllm_ascend.model_loader.netloader.cache.process import Cache, CacheOptions
from vllm_ascend.model_loader.netloader.transport.store import Request
from vllm_ascend.model_loader.netloader.weights.arena import Arena
from vllm_ascend.model_loader.netloader.weights.identity import RankCoordinates
from vllm_ascend.model_loader.netloader.weights.memory import Memory

PLENTY = 1 << 30


@contextlib.contextmanager
def running(directory: Path, max_bytes: int = PLENTY, **options: Any) -> Iterator[Cache]:
    """A cache whose socket is in `directory`, as a part of this process."""
    directory.mkdir(exist_ok=True)
    path = place.prepare(str(socket_of(directory)))
    with Cache(CacheOptions(path, max_bytes, **options)) as cache:
        yield cache


def socket_of(directory: Path) -> Path:
    """Where the socket of `running` is."""
    return directory / "cache" / place.SOCKET_NAME


def request_for(tensors: Tensors = SMALL, coordinates: RankCoordinates | None = None, **identity: Any) -> Request:
    return tensors.request(msgspec.structs.replace(IDENTITY, **identity), coordinates)


def handed(path: Path, tensors: Tensors = SMALL, **values: Any) -> bool:
    """Hands `tensors` to the cache, as an engine does that has just loaded them. Whether it has taken them."""
    store = tensors.store()
    request = values.pop("request", None) or request_for(tensors)
    contents = Contents(request, values.pop("attributes", {}), **values)
    try:
        descriptor = store.memory.descriptor
        assert descriptor is not None
        return asking.hand(path, contents, descriptor, SHORT)
    finally:
        store.close()


def given(path: Path, request: Request | None = None) -> Given | None:
    """What the cache gives to an engine."""
    return asking.ask(path, request or request_for(), SHORT)


def held(cache: Cache) -> list[str]:
    """The names of what a cache holds for certain, the latest used last."""
    return [item.contents.request.identity.name for item in cache.shelf.items() if item.is_whole]


def await_held(cache: Cache, count: int = 1) -> None:
    """Waits until the cache has verified so many weights."""
    wait_until(lambda: len(held(cache)) == count)


def await_name(cache: Cache, name: str) -> None:
    """Waits until the cache has verified weights of that name."""
    wait_until(lambda: name in held(cache))


def same_pages(one: Memory, other: Arena) -> bool:
    """Whether both are one file."""
    assert one.descriptor is not None
    return os.fstat(one.descriptor).st_ino == os.fstat(other.descriptor).st_ino
