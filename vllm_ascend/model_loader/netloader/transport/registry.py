"""The transports, by the names that TRANSPORT takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from vllm_ascend.model_loader.netloader.transport.base import Transport
from vllm_ascend.model_loader.netloader.transport.shared_memory import SharedMemoryTransport
from vllm_ascend.model_loader.netloader.transport.tcp import TcpTransport


def transports(names: Iterable[str], device: str = "cpu") -> tuple[Transport, ...]:
    """The named transports, in that order, for weights that are computed with on `device`, named as torch does.

    Raises KeyError for a name that the configuration should have refused. Only `process_group` needs torch.
    """
    makers: dict[str, Callable[[], Transport]] = {
        "shared_memory": SharedMemoryTransport,
        "tcp": TcpTransport,
        "process_group": lambda: _process_group(device),
    }
    return tuple(makers[name]() for name in names)


def _process_group(device: str) -> Transport:
    from vllm_ascend.model_loader.netloader.transport.process_group import ProcessGroupTransport

    return ProcessGroupTransport(device)
