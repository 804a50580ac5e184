"""What this process serves: a listener for each engine, and behind it every model of that engine.

It is opened before anything is loaded, so that a port that cannot be had is known then, nobody else takes it meanwhile,
and clients that come early are told. Engines that live in one process one after another may use one port in turn. Those
that live at the same time each need their own, so that the weights of one are never replaced by those of another.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from vllm_ascend.model_loader.netloader.config import NetLoaderConfig
from vllm_ascend.model_loader.netloader.server.server import Settings, WeightServer
from vllm_ascend.model_loader.netloader.server.session import Publication
from vllm_ascend.model_loader.netloader.transport.base import Timeouts, Transport
from vllm_ascend.model_loader.netloader.transport.digests import StoreDigests
from vllm_ascend.model_loader.netloader.transport.store import Request, WeightStore
from vllm_ascend.model_loader.netloader.weights.memory import Memory
from vllm_ascend.model_loader.netloader.wire.access import Access
from vllm_ascend.model_loader.netloader.wire.messages import AttributeValue

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Weights:
    """What a load has brought: the bytes asked for in servable memory, and what else it set on the model.

    `digests` are those of the chunks by which they were verified on their way here, None if they were not.
    """

    request: Request
    memory: Memory
    attributes: Mapping[str, AttributeValue]
    digests: tuple[bytes, ...] | None = None


@dataclass(frozen=True, eq=False)
class ServeOptions:
    """How a load is served. `engine` is an object that all loads of one engine share, and that lives as long as it."""

    config: NetLoaderConfig
    access: Access
    transports: tuple[Transport, ...]
    rank: int
    engine: object

    @property
    def address(self) -> tuple[str | None, int]:
        """Raises ConfigError."""
        return self.config.listen_host, self.config.listen_port_for(self.rank)

    @property
    def settings(self) -> Settings:
        timeouts = Timeouts(self.config.connect_timeout, self.config.stall_timeout)
        return Settings(self.transports, timeouts, self.access, self.config.max_clients, self.config.max_bandwidth)


@dataclass(eq=False)
class _Service:
    """A server and the engine that it is for. Its users are loads under way (their terms) and models."""

    engine: weakref.ref[Any]
    address: tuple[str | None, int]
    server: WeightServer
    users: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)


_services: Final[list[_Service]] = []
"""One for each engine, or more where a configuration file has named another address between two loads."""
_lock: Final = threading.RLock()  # collecting garbage within may run anything


def open_listener(role: str, terms: ServeOptions) -> None:
    """Has the port from now on, where clients are told that nothing is served yet; `serve` or `abandon` follows.

    Raises ConfigError where it cannot be had as it is configured, or another model of this engine is served there to
    others, and OSError where somebody else has it.
    """
    with _lock:
        service = _own(terms)
        if service is not None:
            service.server.require_access(terms.access, role)
        else:
            _close_unused(terms.address)
            _require_unused(terms.address)
            service = _started(terms)
        service.users.add(terms)


def abandon(terms: ServeOptions) -> None:
    """After a load that failed: closes its listener unless that is for something else too."""
    with _lock:
        service = _own(terms)
        if service is not None:
            service.users.discard(terms)
            _close_unused(terms.address)


def serve(model: object, weights: Weights, terms: ServeOptions) -> WeightServer:
    """Publishes `weights` for as long as `model` lives, in place of what its engine has served of their role."""
    server = _server(model, terms)
    request, role = weights.request, weights.request.identity.role
    generation = server.next_generation(role)
    digests = _digests(weights) if terms.config.verify else None
    store = WeightStore(request.manifest, weights.memory, generation, weights.attributes, digests)
    server.publish(Publication(request.identity, request.coordinates, store))
    _withdraw(role, [other for other in _servers(terms.engine) if other is not server])
    weakref.finalize(model, server.withdraw, role, weakref.ref(weights.memory)).atexit = False
    return server


def _digests(weights: Weights) -> StoreDigests:
    digests = StoreDigests(weights.memory.reader(), weights.digests or ())
    digests.make_ahead()
    return digests


def decline(model: object, role: str, reason: str, terms: ServeOptions) -> WeightServer:
    """Answers whoever asks for `role` with `reason`."""
    server = _server(model, terms)
    server.decline(role, reason)
    _withdraw(role, [other for other in _servers(terms.engine) if other is not server])
    return server


def withdraw(role: str, engine: object) -> None:
    """Stops serving `role`: the engine has other weights now, which are not to be served."""
    _withdraw(role, _servers(engine))


def _withdraw(role: str, servers: Iterable[WeightServer]) -> None:
    """From addresses, of which there is one unless a configuration file has changed between two loads."""
    for server in servers:
        server.withdraw(role)


def suspend(engine: object, reason: str) -> Callable[[], None]:
    """Ends what it serves, telling clients `reason`, until `resume`; for weights that are about to move or change.

    Returns what serves them again if they do not. Raises TimeoutError, and serves all as before, where something still
    reads them.
    """
    with contextlib.ExitStack() as undo:
        for server in _servers(engine):
            undo.callback(server.resume, server.suspend(reason))
        return undo.pop_all().close


def resume(engine: object) -> None:
    """Serves again what `suspend` has ended and nothing has replaced: its contents are what they were."""
    for server in _servers(engine):
        server.resume()


def give_up(engine: object, reason: str) -> None:
    """Serves nothing any more of what the engine has: its contents are about to be others. Clients are told `reason`.

    Raises as `suspend`.
    """
    suspend(engine, reason)
    for server in _servers(engine):
        server.give_up(reason)


def _servers(engine: object) -> list[WeightServer]:
    with _lock:
        return [each.server for each in _services if each.engine() is engine]


def _own(terms: ServeOptions) -> _Service | None:
    mine = (each for each in _services if each.engine() is terms.engine and each.address == terms.address)
    return next(mine, None)


def _server(model: object, terms: ServeOptions) -> WeightServer:
    with _lock:
        service = _own(terms)
        assert service is not None, "its listener was not opened"
        service.users.add(model)
        service.server.configure(terms.settings)
        return service.server


def _close_unused(address: tuple[str | None, int]) -> None:
    """Ends servers whose engines are gone: a new one begins with nothing of theirs."""
    there = [each for each in _services if each.address == address]
    if any(each.users for each in there):
        gc.collect()  # models die late: they refer to themselves
    for each in there:
        if not each.users:
            _services.remove(each)
            each.server.close()


def _require_unused(address: tuple[str | None, int]) -> None:
    _, port = address
    if port and any(each.address == address for each in _services):
        raise OSError(
            errno.EADDRINUSE,
            f"port {port} is that on which another engine of this process is served: give each engine a LISTEN_PORT "
            f"of its own, or none for a free port",
        )


def _started(terms: ServeOptions) -> _Service:
    if terms.rank == 0:
        _warn_of_strangers(terms)
    server = WeightServer(*terms.address, terms.settings)
    server.start()
    service = _Service(weakref.ref(terms.engine), terms.address, server)
    _services.append(service)
    return service


def _warn_of_strangers(terms: ServeOptions) -> None:
    config, access = terms.config, terms.access
    if not access.restricted:
        reachable = f"the listener on {config.listen_host}" if config.listen_host is not None else "this host"
        logger.warning(
            "whoever can reach %s can read the weights: to keep others out, set TOKEN_FILE, or TLS_CERT, TLS_KEY and "
            "TLS_CA",
            reachable,
        )
    library = next((each.offer().scope for each in terms.transports if each.name == "process_group"), None)
    if library == "gloo":
        logger.warning(
            "the transport process_group opens a port of Gloo's for each client: whoever can reach it can read the "
            "weights, without token and TLS, and can end this process"
        )
    elif library is not None and access.restricted:
        logger.warning(
            "the transport process_group opens ports of %s's, which know neither token nor TLS: its bytes travel "
            "unencrypted",
            library,
        )
