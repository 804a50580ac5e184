"""What this process serves: one listener per address, and behind it every model of the process."""

from __future__ import annotations

import threading
import weakref
from pathlib import Path
from typing import Final

from torch import nn

from vllm_ascend.model_loader.netloader.arena import Arena
from vllm_ascend.model_loader.netloader.config import NetLoaderConfig
from vllm_ascend.model_loader.netloader.report import write_whole
from vllm_ascend.model_loader.netloader.server import Publication, WeightServer
from vllm_ascend.model_loader.netloader.transport import Timeouts, transports
from vllm_ascend.model_loader.netloader.weights import Request, WeightStore

_servers: Final[dict[tuple[str | None, int], WeightServer]] = {}
_lock: Final = threading.Lock()


def serve(model: nn.Module, request: Request, arena: Arena, config: NetLoaderConfig, rank: int) -> WeightServer:
    """Publishes the sealed `arena` for as long as `model` lives. Raises OSError where no listener can be had."""
    server = _server(config, rank)
    role = request.identity.role
    generation = server.next_generation(role)
    store = WeightStore(request.manifest, arena, generation)
    server.publish(Publication(request.identity, request.coordinates, store))
    weakref.finalize(model, server.withdraw, role, generation).atexit = False
    return server


def announce(prefix: str, rank: int, address: str) -> None:
    """Writes ``{prefix}{rank}.txt`` with the address. Raises OSError."""
    path = Path(f"{prefix}{rank}.txt")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, f"{address}\n".encode())


def _server(config: NetLoaderConfig, rank: int) -> WeightServer:
    address = (config.listen_host, config.listen_port_for(rank))
    with _lock:
        server = _servers.get(address)
        if server is None:
            timeouts = Timeouts(config.connect_timeout, config.stall_timeout)
            server = WeightServer(*address, transports(config.transport), timeouts)
            server.start()
            _servers[address] = server
        return server
