"""The transports, by the names that TRANSPORT takes."""

from __future__ import annotations

from collections.abc import Iterable

from vllm_ascend.model_loader.netloader.config import TRANSPORTS
from vllm_ascend.model_loader.netloader.transport.base import Timeouts, Transport
from vllm_ascend.model_loader.netloader.transport.process_group import ProcessGroupTransport
from vllm_ascend.model_loader.netloader.transport.shared_memory import SharedMemoryTransport
from vllm_ascend.model_loader.netloader.transport.tcp import TcpTransport

_TRANSPORTS: dict[str, type[Transport]] = {
    transport.name: transport for transport in (SharedMemoryTransport, TcpTransport, ProcessGroupTransport)
}

assert set(_TRANSPORTS) == set(TRANSPORTS), "the configuration must know the transports"


def transports(names: Iterable[str]) -> tuple[Transport, ...]:
    """The named transports, in that order. Raises KeyError for a name that the configuration should have refused."""
    return tuple(_TRANSPORTS[name]() for name in names)


__all__ = ["Timeouts", "Transport", "transports"]
