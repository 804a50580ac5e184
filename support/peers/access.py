"""What instances may show to each other, and a line on which everything that they say is recorded."""

from __future__ import annotations

import logging
import ssl
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

from support.certificates import Authority
from support.peers.proxy import Proxy, Stream
from support.sources import IDENTITY, SMALL, fetch
from support.wait import wait_until
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import SourcesExhausted
from vllm_ascend.model_loader.netloader.server.server import WeightServer
from vllm_ascend.model_loader.netloader.transport.in_process import InProcessTransport
from vllm_ascend.model_loader.netloader.transport.registry import transports
from vllm_ascend.model_loader.netloader.wire.access import Access

TOKEN = b"correct horse battery staple"
KNOWS, KNOWS_ANOTHER, OPEN = Access(TOKEN), Access(b"tr0ub4dor&3 tr0ub4dor&3"), Access()
MEMORY = (InProcessTransport(),)
TCP = transports(["tcp"])
PATIENCE = 20.0
"""Seconds that nothing here takes, unless it hangs."""
MODEL = [field.encode() for field in (IDENTITY.name, IDENTITY.architecture, IDENTITY.config_digest)]
"""Words of the model that are said in a handshake."""
WEIGHTS = SMALL.by_name["w0"].numpy().tobytes()[:32]
"""Bytes of the model's weights."""


class Relay(Proxy):
    """A proxy that records what goes either way. `alter` is given every piece with its direction."""

    def __init__(
        self,
        target: Endpoint,
        host: str = "127.0.0.1",
        alter: Callable[[Stream, bytes], bytes] = lambda _, piece: piece,
    ) -> None:
        super().__init__(target, source_host=host)
        self._alter = alter
        self._records: defaultdict[tuple[Stream, int], bytearray] = defaultdict(bytearray)

    def __exit__(self, *_: object) -> None:
        """When this returns, everything that was said is recorded."""
        self.wait_for_ends()
        self.close()

    def passing(self, connection: int, stream: Stream, piece: bytes) -> bytes:
        self._records[stream, connection] += piece
        return self._alter(stream, piece)

    def said(self, stream: Stream) -> list[bytearray]:
        """What each connection has carried in that direction."""
        return [self._records[stream, connection] for connection in range(self.connections)]

    @property
    def overheard(self) -> bytes:
        """What all connections have carried, in either direction."""
        return b"".join(self._records.values())


@dataclass(frozen=True)
class Certified:
    """What instances may show and want, by the certificates that they have."""

    ours: Access
    of_another_authority: Access
    of_another_authority_that_trusts_ours: Access
    expired: Access
    without_a_certificate: Access


def certified_by(ours: Authority, theirs: Authority) -> Certified:
    """Certificates for instances of which `ours` is the authority, and for those that do not belong to them."""
    without = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    without.check_hostname = False
    without.load_verify_locations(ours.file)
    return Certified(
        ours=ours.identify("instance").access(),
        of_another_authority=theirs.identify("stranger").access(),
        of_another_authority_that_trusts_ours=theirs.identify("spy", ca=ours.file).access(),
        expired=ours.identify("retired", days_ago=1).access(),
        without_a_certificate=Access(client_tls=without),
    )


def with_token(access: Access, token: bytes = TOKEN) -> Access:
    """`access` with a token beside its certificates."""
    return replace(access, token=token)


def warnings(log: pytest.LogCaptureFixture) -> list[str]:
    """What servers have logged as warnings or worse."""
    return [
        record.getMessage()
        for record in log.records
        if record.levelno >= logging.WARNING and record.name.endswith(".server")
    ]


def refusal(source: Endpoint, access: Access) -> str:
    """Why a client with `access` gets nothing from `source`, which is the only one that it asks."""
    with pytest.raises(SourcesExhausted) as error:
        fetch(SMALL, MEMORY, source, access=access)
    (reason,) = error.value.reasons
    return reason.removeprefix(f"{source}: ")


def settled(server: WeightServer) -> None:
    """Returns when the server has done with every connection."""
    wait_until(lambda: not server.state().connections)


def assert_no_secret(overheard: bytes, *secret: bytes) -> None:
    """Nothing that is `secret` was said, neither as it is nor in hexadecimal."""
    for each in secret:
        assert each not in overheard
        assert each.hex().encode() not in overheard
