"""What a client wants, and how it wants it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from vllm_ascend.model_loader.netloader.transport.base import Timeouts
from vllm_ascend.model_loader.netloader.transport.store import Request
from vllm_ascend.model_loader.netloader.weights.arena import allocate
from vllm_ascend.model_loader.netloader.weights.manifest import Manifest
from vllm_ascend.model_loader.netloader.weights.memory import Memory
from vllm_ascend.model_loader.netloader.wire.access import Access
from vllm_ascend.model_loader.netloader.wire.messages import AttributeValue


@dataclass(frozen=True)
class FetchOptions:
    """What a client wants, and how it wants it from every source.

    `allocate` makes the memory to fill, or raises UnsupportedModel; `check_attributes` raises SourceRefused for
    attributes that the model cannot take. `min_bandwidth` is in bytes per second, times are in seconds;
    `disk_remains` says that there is another way if no source delivers.
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
