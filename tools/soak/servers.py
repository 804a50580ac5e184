"""The servers of a soak: where they are, what they serve, and who may have it."""

from __future__ import annotations

import contextlib
import gc
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy

from support.certificates import Authority, Identification
from support.ports import free_ports
from support.synthetic import IDENTITY, publication_of, sealed_arena, shared
from tools.soak.watching import NetloaderLog
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.server.requests import Settings
from vllm_ascend.model_loader.netloader.server.server import WeightServer
from vllm_ascend.model_loader.netloader.transport.base import Timeouts
from vllm_ascend.model_loader.netloader.transport.tcp import TcpTransport
from vllm_ascend.model_loader.netloader.wire.access import Access

HOST: Final = "127.0.0.4"
"""The servers' address. Nobody connects from there, so no outgoing connection can take the port of a killed server."""
LASTING: Final = "the lasting server"
MORTAL: Final = "the mortal server"
SERVERS: Final = (LASTING, MORTAL)
LISTENERS: Final = ("open", "token", "tls")
NBYTES: Final = 64 << 20
TIMEOUTS: Final = Timeouts(connect=5.0, stall=5.0)
MAX_CLIENTS: Final = 1
"""Of each listener: few, so that workers wait for their turn."""


@dataclass(frozen=True)
class Setting:
    """What all processes of a soak know: the listeners of each server, and what it takes to be let in there."""

    addresses: dict[str, dict[str, Endpoint]]
    token: bytes
    identification: Identification

    @classmethod
    def new(cls, directory: Path) -> Setting:
        """With free ports, a new token, and new certificates, which are files in `directory`."""
        ports = iter(free_ports(len(SERVERS) * len(LISTENERS), HOST))
        addresses = {server: {each: Endpoint(HOST, next(ports)) for each in LISTENERS} for server in SERVERS}
        return cls(addresses, secrets.token_bytes(32), Authority(directory, "soak").identify("instance"))

    def access(self, listener: str) -> Access:
        """What a client of that listener needs, and what the listener asks for."""
        match listener:
            case "token":
                return Access(self.token)
            case "tls":
                return self.identification.access()
        return Access()


def weights(edition: int) -> bytes:
    """The weights of an edition, which are random and differ from those of every other one."""
    return numpy.random.default_rng(edition).bytes(NBYTES)


class Server:
    """Serves an edition of the weights on all listeners, until it is called with the number of another one."""

    def __init__(self, setting: Setting, name: str, edition: int) -> None:
        NetloaderLog()
        self._servers: list[WeightServer] = []
        for listener, (host, port) in setting.addresses[name].items():
            settings = Settings((TcpTransport(),), TIMEOUTS, setting.access(listener), max_clients=MAX_CLIENTS)
            server = WeightServer(host, port, settings)
            server.start()
            self._servers.append(server)
        self(edition)

    def __call__(self, edition: int) -> int:
        """Publishes the same pages behind all listeners, after suspending serving if the edition is an odd one."""
        if edition % 2:
            for server in self._servers:
                server.suspend("its weights are being replaced")
        with contextlib.closing(sealed_arena(NBYTES, weights(edition))) as arena:
            for server in self._servers:
                generation = server.next_generation(IDENTITY.role)
                publication = publication_of(shared(arena), generation, {"edition": edition})
                assert publication.store.digests is not None
                publication.store.digests.make_ahead()
                server.publish(publication)
        gc.collect()
        return edition
