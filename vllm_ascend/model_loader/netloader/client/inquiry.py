"""Conversations that take no weights: what a source holds, and that its weights are served elsewhere now, too."""

from __future__ import annotations

from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import PeerError, SourceFailed
from vllm_ascend.model_loader.netloader.wire.access import Access
from vllm_ascend.model_loader.netloader.wire.channel import Deadline
from vllm_ascend.model_loader.netloader.wire.greeting import greet
from vllm_ascend.model_loader.netloader.wire.messages import Announce, Inquire, Status


def inquire(source: Endpoint, timeout: float, access: Access | None = None) -> Status:
    """What `source` holds and whom it serves. Each step may take `timeout` seconds.

    Raises SourceError, or TransportError where this process cannot connect.
    """
    return inquire_where(source, timeout, access)[0]


def inquire_where(source: Endpoint, timeout: float, access: Access | None = None) -> tuple[Status, Endpoint]:
    """As `inquire`, with the address at which `source` was reached: its name may stand for several."""
    with greet(source, access or Access(), timeout) as channel:
        try:
            address = channel.peer
            channel.send(Inquire(), timeout)
            status = channel.receive(Deadline(timeout))
        except PeerError as error:
            raise SourceFailed(str(error)) from error
    assert isinstance(status, Status)
    return status, address


def announce(source: Endpoint, session: bytes, port: int, timeout: float, access: Access) -> None:
    """Tells `source` that the weights that were taken from it in `session` are served on `port` of this host now.

    `source` is the address at which it was reached in that session. Each step may take `timeout` seconds. Raises
    SourceError, or TransportError where this process cannot connect.
    """
    with greet(source, access, timeout) as channel:
        try:
            channel.send(Announce(session, port), timeout)
        except PeerError as error:
            raise SourceFailed(str(error)) from error
