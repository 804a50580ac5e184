"""The transports, by the names that TRANSPORT takes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import torch

from vllm_ascend.model_loader.netloader.config import TRANSPORTS
from vllm_ascend.model_loader.netloader.transport.base import Timeouts, Transport
from vllm_ascend.model_loader.netloader.transport.process_group import ProcessGroupTransport
from vllm_ascend.model_loader.netloader.transport.shared_memory import SharedMemoryTransport
from vllm_ascend.model_loader.netloader.transport.tcp import TcpTransport

_CPU: Final = torch.device("cpu")


def transports(names: Iterable[str], device: torch.device = _CPU) -> tuple[Transport, ...]:
    """The named transports, in that order, for weights that are computed with on `device`.

    Raises KeyError for a name that the configuration should have refused.
    """
    by_name: dict[str, Transport] = {
        transport.name: transport
        for transport in (SharedMemoryTransport(), TcpTransport(), ProcessGroupTransport(device))
    }
    assert set(by_name) == set(TRANSPORTS), "the configuration must know the transports"
    return tuple(by_name[name] for name in names)


__all__ = ["Timeouts", "Transport", "transports"]
