"""What a client wants, and how it wants it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.transport.base import Timeouts
from vllm_ascend.model_loader.netloader.transport.chunks.log import ChunkLog
from vllm_ascend.model_loader.netloader.transport.claims import Claim
from vllm_ascend.model_loader.netloader.transport.store import Request
from vllm_ascend.model_loader.netloader.weights.arena import allocate
from vllm_ascend.model_loader.netloader.weights.manifest import Manifest
from vllm_ascend.model_loader.netloader.weights.memory import Memory
from vllm_ascend.model_loader.netloader.wire.access import Access
from vllm_ascend.model_loader.netloader.wire.messages import AttributeValue


@dataclass(frozen=True)
class Filling:
    """Weights of which a fetch has some chunks already: those in `passed`, which lie in `memory` for good.

    `digests` are those of all chunks, and `attributes` and `fingerprint` belong to the weights as in Accept. `joined`
    is to be told of clients that relay what they take from here: where they can be reached. `claim` is to tell other
    processes of this host where they can have these weights; it belongs to whoever serves them.
    """

    memory: Memory
    passed: ChunkLog
    digests: tuple[bytes, ...]
    attributes: Mapping[str, AttributeValue]
    fingerprint: str
    joined: Callable[[Endpoint], object] = lambda _: None
    claim: Claim | None = None


class Relay(ABC):
    """Serves to others what a fetch has so far. One thread at a time uses it, and none of its methods raises."""

    @abstractmethod
    def begin(self, filling: Filling) -> int:
        """Serves `filling` from now on. Returns the port at which clients reach it, 0 where that is not possible."""

    @abstractmethod
    def end(self, reason: str) -> None:
        """Serves it no more: clients are told `reason`, and its memory may be given up. Idempotent."""


@dataclass(frozen=True)
class FetchOptions:
    """Which weights a client wants, and what holds for every source that it asks.

    `verify` says whether every chunk must have the digest that its source tells. `wait_timeout` is how many seconds
    may be spent in queues, and `min_bandwidth` the bytes per second below which a source is left. `disk_remains` says
    that there is another way if no source delivers. `relay` serves what has come to others meanwhile, None for nobody.
    `root` is the root digest that the contents must have, empty where any contents of `request` are wanted. `found` are
    the digests of chunks that lie in the memory already, by number: they count if a source has the same.

    `allocate` makes the memory to fill, or raises UnsupportedModel. `check_attributes` raises SourceRefused for
    attributes that the model cannot take. `progress` is called with the number of bytes that have come, negative where
    some have to come again.
    """

    request: Request
    timeouts: Timeouts
    access: Access = field(default_factory=Access)
    verify: bool = True
    wait_timeout: float = 300.0
    min_bandwidth: int = 0
    disk_remains: bool = True
    allocate: Callable[[Manifest], Memory] = allocate
    check_attributes: Callable[[Mapping[str, AttributeValue]], None] = lambda _: None
    progress: Callable[[int], None] = lambda _: None
    relay: Relay | None = None
    root: str = ""
    found: Mapping[int, bytes] = field(default_factory=dict)
