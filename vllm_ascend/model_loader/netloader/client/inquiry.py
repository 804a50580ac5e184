"""The two short conversations of a client that takes no weights: what a source holds, and who serves them now too."""

from __future__ import annotations

from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import PeerError, SourceFailed
from vllm_ascend.model_loader.netloader.wire.access import Access
from vllm_ascend.model_loader.netloader.wire.channel import Deadline
from vllm_ascend.model_loader.netloader.wire.greeting import greet
from vllm_ascend.model_loader.netloader.wire.messages import Announce, Inquire, Status


def inquire(source: Endpoint, timeout: float, access: Access | None = None) -> Status:
    """What `source` holds. Raises SourceError, or TransportError where this process cannot connect."""
    with greet(source, access or Access(), timeout) as channel:
        try:
            channel.send(Inquire(), timeout)
            status = channel.receive(Deadline(timeout))
        except PeerError as error:
            raise SourceFailed(str(error)) from error
    assert isinstance(status, Status)
    return status


def announce(source: Endpoint, session: bytes, port: int, timeout: float, access: Access) -> None:
    """Tells `source` that what was taken from it in `session` is served on `port` now.

    `source` is the address at which it was reached. Raises as `inquire`.
    """
    with greet(source, access, timeout) as channel:
        try:
            channel.send(Announce(session, port), timeout)
        except PeerError as error:
            raise SourceFailed(str(error)) from error
