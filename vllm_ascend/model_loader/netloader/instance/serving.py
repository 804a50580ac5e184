"""What this process serves: each engine has a listener, and behind it every model of that engine.

The listener is opened before anything is loaded. A port that cannot be had is then known at once, nobody else takes it
in the meantime, and clients that come early are told that there is nothing yet.

Engines that live in one process one after another may use the same port in turn. Engines that live at the same time
each need a port of their own, so that the weights of one never replace those of another.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from vllm_ascend.model_loader.netloader.config import NetLoaderConfig
from vllm_ascend.model_loader.netloader.server.publications import Publication
from vllm_ascend.model_loader.netloader.server.requests import Settings
from vllm_ascend.model_loader.netloader.server.server import WeightServer
from vllm_ascend.model_loader.netloader.traits import Exposure
from vllm_ascend.model_loader.netloader.transport.base import Timeouts, Transport
from vllm_ascend.model_loader.netloader.transport.digests import StoreDigests
from vllm_ascend.model_loader.netloader.transport.store import Request, WeightStore
from vllm_ascend.model_loader.netloader.weights.memory import Memory
from vllm_ascend.model_loader.netloader.wire.access import Access
from vllm_ascend.model_loader.netloader.wire.messages import AttributeValue

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedWeights:
    """What a load has brought: the requested bytes in servable memory, and whatever else it set on the model.

    `digests` are those of the chunks, by which the bytes were verified on their way here. None if they were not.
    """

    request: Request
    memory: Memory
    attributes: Mapping[str, AttributeValue]
    digests: tuple[bytes, ...] | None = None
    relayed: Publication | None = None
    """Under what these weights were offered while they were loaded, None if they were not."""


@dataclass(frozen=True, eq=False)
class ServeOptions:
    """How the weights of one load are served.

    `engine` is an object that all loads of one engine share and that lives exactly as long as the engine.
    """

    config: NetLoaderConfig
    access: Access
    transports: tuple[Transport, ...]
    rank: int
    engine: object

    @property
    def address(self) -> tuple[str | None, int]:
        """The host and port to listen on, as for `WeightServer`. Raises ConfigError."""
        return self.config.listen_host, self.config.listen_port_for(self.rank)

    @property
    def settings(self) -> Settings:
        timeouts = Timeouts(self.config.connect_timeout, self.config.stall_timeout)
        return Settings(self.transports, timeouts, self.access, self.config.max_clients, self.config.max_bandwidth)


@dataclass(eq=False)
class _Service:
    """A server and the engine it works for. Its users are the loads under way (their options) and the models."""

    engine: weakref.ref[Any]
    address: tuple[str | None, int]
    server: WeightServer
    users: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)


_services: Final[list[_Service]] = []
"""One for each engine, or several if a configuration file has named another address between two loads."""
_lock: Final = threading.RLock()
"""Reentrant because a garbage collection may run anything while it is held."""


def open_listener(role: str, options: ServeOptions) -> None:
    """Takes the port, where clients are told from now on that nothing is served yet; call `serve` or `abandon` next.

    Raises ConfigError if the port cannot be had as configured, or if another model of this engine is served there under
    another token or other certificates. Raises OSError if somebody else has the port.
    """
    with _lock:
        service = _service_of(options)
        if service is not None:
            service.server.require_access(options.access, role)
        else:
            _close_unused(options.address)
            _require_unused(options.address)
            service = _start(options)
        service.users.add(options)


def abandon(options: ServeOptions) -> None:
    """Closes the listener of a load that failed, unless something else still uses it."""
    with _lock:
        service = _service_of(options)
        if service is not None:
            service.users.discard(options)
            _close_unused(options.address)


def listener_of(options: ServeOptions) -> WeightServer | None:
    """The server that was opened for `options`, None if there is none."""
    with _lock:
        service = _service_of(options)
        return None if service is None else service.server


def serve(model: object, weights: LoadedWeights, options: ServeOptions) -> WeightServer:
    """Publishes `weights` for as long as `model` lives, in place of what the engine has served in their role."""
    server = _server_for(model, options)
    role = weights.request.identity.role
    server.publish(weights.relayed or _publication(weights, server, options))
    withdraw(role, options.engine, unless=server)
    weakref.finalize(model, server.withdraw, role, weakref.ref(weights.memory)).atexit = False
    return server


def _publication(weights: LoadedWeights, server: WeightServer, options: ServeOptions) -> Publication:
    request = weights.request
    generation = server.next_generation(request.identity.role)
    digests = _digests(weights) if options.config.verify else None
    store = WeightStore(request.manifest, weights.memory, generation, weights.attributes, digests)
    return Publication(request.identity, request.coordinates, store)


def _digests(weights: LoadedWeights) -> StoreDigests:
    digests = StoreDigests(weights.memory.reader(), weights.digests or (), weights.memory.is_as_loaded)
    digests.make_ahead()
    return digests


def decline(model: object, role: str, reason: str, options: ServeOptions) -> WeightServer:
    """Serves nothing in `role` for as long as `model` lives, and answers clients that ask for it with `reason`."""
    server = _server_for(model, options)
    server.decline(role, reason)
    withdraw(role, options.engine, unless=server)
    return server


def withdraw(role: str, engine: object, *, unless: WeightServer | None = None) -> None:
    """Stops serving `role`, because the engine has other weights now. A server given as `unless` goes on."""
    for server in servers_of(engine):
        if server is not unless:
            server.withdraw(role)


def suspend(engine: object, reason: str) -> Callable[[], None]:
    """Ends all that is served of an engine whose weights are about to move or change. Clients are told `reason`.

    Nothing reads the weights any more when this returns. `resume` serves them again; so does the function that is
    returned, but only what this very call has suspended. Raises TimeoutError, and serves everything as before, if
    something still reads the weights.
    """
    with contextlib.ExitStack() as undo:
        for server in servers_of(engine):
            undo.callback(server.resume, server.suspend(reason))
        return undo.pop_all().close


def resume(engine: object) -> None:
    """Serves again whatever `suspend` has ended and nothing has replaced. Its contents must be what they were."""
    for server in servers_of(engine):
        server.resume()


def give_up(engine: object, reason: str) -> None:
    """Declines all roles of an engine whose weights are about to become others. Clients are told `reason`.

    Raises TimeoutError, and serves everything as before, if something still reads the weights.
    """
    suspend(engine, reason)
    for server in servers_of(engine):
        server.give_up(reason)


def decline_all(role: str, engine: object, reason: str) -> None:
    """Serves nothing in `role` any more, whatever is served or suspended, and answers clients with `reason`."""
    for server in servers_of(engine):
        server.decline(role, reason)


def servers_of(engine: object) -> list[WeightServer]:
    """The servers that were started for `engine`."""
    with _lock:
        return [each.server for each in _services if each.engine() is engine]


def _service_of(options: ServeOptions) -> _Service | None:
    mine = (each for each in _services if each.engine() is options.engine and each.address == options.address)
    return next(mine, None)


def _server_for(model: object, options: ServeOptions) -> WeightServer:
    with _lock:
        service = _service_of(options)
        assert service is not None, "its listener was not opened"
        service.users.add(model)
        service.server.configure(options.settings)
        return service.server


def _close_unused(address: tuple[str | None, int]) -> None:
    """Closes servers whose engines are gone, so that a new engine inherits nothing from them."""
    there = [each for each in _services if each.address == address]
    if any(each.users for each in there):
        gc.collect()  # models refer to themselves, so they die only when they are collected
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


def _start(options: ServeOptions) -> _Service:
    if options.rank == 0:
        _warn_of_strangers(options)
    server = WeightServer(*options.address, options.settings)
    server.start()
    service = _Service(weakref.ref(options.engine), options.address, server)
    _services.append(service)
    return service


def _warn_of_strangers(options: ServeOptions) -> None:
    """Logs who can read the weights without being entitled to, as far as the configuration shows it."""
    config, access = options.config, options.access
    if not access.restricted:
        reachable = f"the listener on {config.listen_host}" if config.listen_host is not None else "this host"
        logger.warning(
            "whoever can reach %s can read the weights: to keep others out, set TOKEN_FILE, or TLS_CERT, TLS_KEY and "
            "TLS_CA",
            reachable,
        )

    for traits in (transport.traits for transport in options.transports):
        if traits.exposure is Exposure.PROCESS:
            logger.warning(
                "the transport %s opens a port of %s's for each client: whoever can reach it can read the weights, "
                "without token and TLS, and can end this process",
                traits.name,
                traits.library.capitalize(),
            )
        elif traits.exposure is Exposure.BYTES and access.restricted:
            logger.warning(
                "the transport %s opens ports of %s's, which know neither token nor TLS: its bytes travel unencrypted",
                traits.name,
                traits.library,
            )
