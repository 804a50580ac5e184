"""What this process serves: one listener per address, and behind it every model of the process."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from torch import nn

from vllm_ascend.model_loader.netloader.arena import Arena
from vllm_ascend.model_loader.netloader.attributes import Plain
from vllm_ascend.model_loader.netloader.config import NetLoaderConfig
from vllm_ascend.model_loader.netloader.report import write_whole
from vllm_ascend.model_loader.netloader.server import Publication, WeightServer
from vllm_ascend.model_loader.netloader.transport import Timeouts, transports
from vllm_ascend.model_loader.netloader.weights import Request, WeightStore

_servers: Final[dict[tuple[str | None, int], WeightServer]] = {}
_lock: Final = threading.Lock()


@dataclass(frozen=True)
class Weights:
    """What a load has brought: the bytes asked for in a sealed arena, and what else it set on the model."""

    request: Request
    arena: Arena
    attributes: Mapping[str, Plain]


def serve(model: nn.Module, weights: Weights, config: NetLoaderConfig, rank: int) -> WeightServer:
    """Publishes `weights` for as long as `model` lives, in place of what was served of their role.

    Raises OSError where no listener can be had.
    """
    server = _server(config, rank)
    request, role = weights.request, weights.request.identity.role
    generation = server.next_generation(role)
    store = WeightStore(request.manifest, weights.arena, generation, weights.attributes)
    server.publish(Publication(request.identity, request.coordinates, store))
    _withdraw(role, [other for other in _servers.values() if other is not server])
    weakref.finalize(model, server.withdraw, role, generation).atexit = False
    return server


def decline(role: str, reason: str, config: NetLoaderConfig, rank: int) -> WeightServer:
    """Answers whoever asks for `role` with `reason`. Raises OSError where no listener can be had."""
    server = _server(config, rank)
    server.decline(role, reason)
    _withdraw(role, [other for other in _servers.values() if other is not server])
    return server


def withdraw(role: str) -> None:
    """Stops serving `role`: the process has other weights now, which are not to be served."""
    _withdraw(role, list(_servers.values()))


def _withdraw(role: str, servers: Iterable[WeightServer]) -> None:
    """From addresses, of which there is one unless a configuration file has changed between two loads."""
    for server in servers:
        server.withdraw(role)


def announce(prefix: str, rank: int, address: str) -> None:
    """Writes ``{prefix}{rank}.txt`` with the address. Raises OSError."""
    path = Path(f"{prefix}{rank}.txt")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, f"{address}\n".encode())


def _server(config: NetLoaderConfig, rank: int) -> WeightServer:
    address = (config.listen_host, config.listen_port_for(rank))
    usable = transports(config.transport)
    timeouts = Timeouts(config.connect_timeout, config.stall_timeout)
    with _lock:
        server = _servers.get(address)
        if server is None:
            server = WeightServer(*address, usable, timeouts)
            server.start()
            _servers[address] = server
        server.configure(usable, timeouts)
        return server
