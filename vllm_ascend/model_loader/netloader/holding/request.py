"""How a process without a model asks for weights: as whoever has the model would, by what a source has told.

A client asks by identity, coordinates and manifest, and a server compares them with its own. A client without a model
takes all three from what the source says of itself. So the handshake decides as for everybody else, token and TLS
included, and sources beside the first are held to the same: they refuse a client that wants something else.
"""

from __future__ import annotations

from collections.abc import Iterator

from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import (
    PeerError,
    ProtocolError,
    SourceError,
    SourceFailed,
    SourcesExhausted,
    TransportError,
)
from vllm_ascend.model_loader.netloader.holding.survey import Offered
from vllm_ascend.model_loader.netloader.transport.store import Request
from vllm_ascend.model_loader.netloader.weights.manifest import NBYTES_LIMIT, TENSORS_LIMIT, Manifest
from vllm_ascend.model_loader.netloader.wire.access import Access
from vllm_ascend.model_loader.netloader.wire.channel import Deadline
from vllm_ascend.model_loader.netloader.wire.greeting import greet
from vllm_ascend.model_loader.netloader.wire.messages import Describe, Description, Refuse
from vllm_ascend.model_loader.netloader.wire.refusal import refused


def request_for(offered: Offered, timeout: float, access: Access | None = None) -> Request:
    """The request for what is `offered`, with the manifest that the first of its endpoints tells which can.

    Each step of asking may take `timeout` seconds. A manifest is believed only if it has the digest and the sizes that
    were told before, which are limited. Raises SourcesExhausted with the reason of each.
    """
    reasons: list[str] = []
    for endpoint in offered.endpoints:
        try:
            manifest = _manifest_of(offered, endpoint, timeout, access or Access())
        except (SourceError, TransportError) as error:
            reasons.append(f"{endpoint}: {error}")
        else:
            return Request(offered.identity, offered.coordinates, manifest)
    raise SourcesExhausted(reasons)


def _manifest_of(offered: Offered, endpoint: Endpoint, timeout: float, access: Access) -> Manifest:
    """Raises SourceError, or TransportError where this process cannot connect."""
    if offered.nbytes > NBYTES_LIMIT or offered.tensors > TENSORS_LIMIT:
        raise SourceFailed(
            f"it says that it holds {offered.tensors} tensors of {offered.nbytes} bytes: at most {TENSORS_LIMIT} of "
            f"{NBYTES_LIMIT}"
        )
    with greet(endpoint, access, timeout) as channel:
        try:
            channel.send(Describe(offered.manifest), timeout)
            answer = channel.receive(Deadline(timeout))
            if isinstance(answer, Refuse):
                raise refused(answer)
            assert isinstance(answer, Description)
            manifest = Manifest.decode(answer.manifest)
            _require(manifest, offered)
        except PeerError as error:
            raise SourceFailed(str(error)) from error
    return manifest


def _require(manifest: Manifest, offered: Offered) -> None:
    """Raises ProtocolError unless `manifest` is the one that was named."""
    for what, found, expected in _compared(manifest, offered):
        if found != expected:
            raise ProtocolError(f"the manifest that it sent has {what} {found}: expected {expected}, as it said before")


def _compared(manifest: Manifest, offered: Offered) -> Iterator[tuple[str, object, object]]:
    yield "a number of tensors of", len(manifest.tensors), offered.tensors
    yield "a size of", manifest.nbytes, offered.nbytes
    yield "the digest", manifest.digest, offered.manifest
