"""The transports, by the names that TRANSPORT takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from vllm_ascend.model_loader.netloader import traits
from vllm_ascend.model_loader.netloader.transport.base import Transport
from vllm_ascend.model_loader.netloader.transport.shared_memory import SharedMemoryTransport
from vllm_ascend.model_loader.netloader.transport.tcp import TcpTransport


def transports(names: Iterable[str], device: str = "cpu") -> tuple[Transport, ...]:
    """The transports of these names, in their order, for weights that `device`, named as torch does, computes with.

    Raises KeyError for a name that the configuration should have refused. Only `process_group` imports torch.
    """
    return tuple(_MAKERS[name](device) for name in names)


def _process_group(device: str) -> Transport:
    from vllm_ascend.model_loader.netloader.transport.process_group import ProcessGroupTransport

    return ProcessGroupTransport(device)


_MAKERS: Final[dict[str, Callable[[str], Transport]]] = {
    "shared_memory": lambda _: SharedMemoryTransport(),
    "tcp": lambda _: TcpTransport(),
    "process_group": _process_group,
}

assert _MAKERS.keys() == set(traits.NAMES), "each row of the table of traits has its transport, and the reverse"
