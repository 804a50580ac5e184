"""What this process serves: one listener per address, and behind it every model of the process."""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from torch import nn

from vllm_ascend.model_loader.netloader.access import Access
from vllm_ascend.model_loader.netloader.attributes import Plain
from vllm_ascend.model_loader.netloader.client import announce
from vllm_ascend.model_loader.netloader.config import NetLoaderConfig
from vllm_ascend.model_loader.netloader.digests import Algorithm, Seal, StoreDigests
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import SourceError
from vllm_ascend.model_loader.netloader.memory import Memory
from vllm_ascend.model_loader.netloader.report import write_whole
from vllm_ascend.model_loader.netloader.server import Settings, WeightServer
from vllm_ascend.model_loader.netloader.server_session import Publication
from vllm_ascend.model_loader.netloader.transport import Timeouts, Transport
from vllm_ascend.model_loader.netloader.weights import Request, WeightStore

logger = logging.getLogger(__name__)

_servers: Final[dict[tuple[str | None, int], WeightServer]] = {}
_lock: Final = threading.Lock()


@dataclass(frozen=True)
class Weights:
    """What a load has brought: the bytes asked for in servable memory, and what else it set on the model.

    `seal` is what they were verified by on their way here, if they were.
    """

    request: Request
    memory: Memory
    attributes: Mapping[str, Plain]
    seal: Seal | None = None


@dataclass(frozen=True)
class Terms:
    """How a rank serves."""

    config: NetLoaderConfig
    access: Access
    transports: tuple[Transport, ...]
    rank: int


def serve(model: nn.Module, weights: Weights, terms: Terms) -> WeightServer:
    """Publishes `weights` for as long as `model` lives, in place of what was served of their role.

    Raises OSError where no listener can be had.
    """
    server = _server(terms)
    request, role = weights.request, weights.request.identity.role
    generation = server.next_generation(role)
    digests = _digests(weights, terms.access.token) if terms.config.verify else None
    store = WeightStore(request.manifest, weights.memory, generation, weights.attributes, digests)
    server.publish(Publication(request.identity, request.coordinates, store))
    _withdraw(role, [other for other in _servers.values() if other is not server])
    weakref.finalize(model, server.withdraw, role, weakref.ref(weights.memory)).atexit = False
    return server


def _digests(weights: Weights, token: bytes | None) -> StoreDigests:
    if weights.seal is not None:
        return StoreDigests(weights.memory.reader(), weights.seal.algorithm, weights.seal.digests)
    digests = StoreDigests(weights.memory.reader(), Algorithm.of_new_store(token))
    digests.make_ahead()
    return digests


def decline(role: str, reason: str, terms: Terms) -> WeightServer:
    """Answers whoever asks for `role` with `reason`. Raises OSError where no listener can be had."""
    server = _server(terms)
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


def tell_source(source: Endpoint, session: bytes, port: int, timeout: float, access: Access) -> None:
    """Lets the source refer others to this process, in a thread: whether it is still there does not matter here."""

    def tell() -> None:
        try:
            announce(source, session, port, timeout, access)
        except SourceError as error:
            logger.debug("%s does not hear that its weights are served here too: %s", source, error)

    threading.Thread(target=tell, name="netloader-announce", daemon=True).start()


def write_address(prefix: str, rank: int, address: str) -> None:
    """Writes ``{prefix}{rank}.txt`` with the address. Raises OSError."""
    path = Path(f"{prefix}{rank}.txt")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, f"{address}\n".encode())


def require_same_access(role: str, terms: Terms) -> None:
    """Raises ConfigError where another model of this process is served on the same port to others."""
    server = _servers.get((terms.config.listen_host, terms.config.listen_port_for(terms.rank)))
    if server is not None:
        server.require_access(terms.access, role)


def suspend(reason: str) -> Callable[[], None]:
    """Ends what is served, telling clients `reason`, until `resume`; for weights that are about to move or change.

    Returns what serves them again if they do not. Raises TimeoutError, and serves all as before, where something still
    reads them.
    """
    with contextlib.ExitStack() as undo:
        for server in list(_servers.values()):
            undo.callback(server.resume, server.suspend(reason))
        return undo.pop_all().close


def resume() -> None:
    """Serves again what `suspend` has ended and nothing has replaced: its contents are what they were."""
    for server in list(_servers.values()):
        server.resume()


def give_up(reason: str) -> None:
    """Serves nothing any more of what there is: its contents are about to be others. Clients are told `reason`.

    Raises as `suspend`.
    """
    suspend(reason)
    for server in list(_servers.values()):
        server.give_up(reason)


def _server(terms: Terms) -> WeightServer:
    config, access, rank = terms.config, terms.access, terms.rank
    address = (config.listen_host, config.listen_port_for(rank))
    settings = Settings(
        terms.transports,
        Timeouts(config.connect_timeout, config.stall_timeout),
        access,
        config.max_clients,
        config.max_bandwidth,
    )
    with _lock:
        server = _servers.get(address)
        if server is None:
            if rank == 0:
                _warn_of_strangers(terms)
            server = WeightServer(*address, settings)
            server.start()
            _servers[address] = server
        server.configure(settings)
        return server


def _warn_of_strangers(terms: Terms) -> None:
    config, access = terms.config, terms.access
    if not access.restricted:
        reachable = f"the listener on {config.listen_host}" if config.listen_host is not None else "this host"
        logger.warning(
            "whoever can reach %s can read the weights: to keep others out, set TOKEN_FILE, or TLS_CERT, TLS_KEY and "
            "TLS_CA",
            reachable,
        )
    if access.server_tls is not None and any(each.name == "process_group" for each in terms.transports):
        logger.warning("TLS does not cover the transport process_group: its bytes travel unencrypted")
