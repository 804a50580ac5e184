"""What is true of each transport, in one table that can be read without importing any of them.

The configuration reads here which transports carry weights for a device, and which of them are used by default. The
server reads how many descriptors a session takes, whether it needs a turn, and what to warn the operator of. A
transport that uses another library on another kind of device has a row for each of them.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

ANY: Final = "any"
"""Stands for every kind of device that torch may know."""


class Exposure(enum.Enum):
    """What a transport exposes beside the listener, which alone knows token and TLS."""

    NOTHING = enum.auto()
    """It opens no port, or none that can be reached from another host."""
    BYTES = enum.auto()
    """Its bytes travel unencrypted, so it is not used by default under TLS."""
    PROCESS = enum.auto()
    """Whoever reaches its ports can read the weights and end this process, so it is used only where it is asked for."""


@dataclass(frozen=True)
class Traits:
    """One way to bring weights to a kind of device.

    `name` is what TRANSPORT calls it, and `device` the type of device, as torch names it, that computes with the
    weights. `copies` says whether bytes move, so that they need memory of their own, a turn, time, and verification.
    `peers` is from how many peers beside its sources a client takes at once at most, None where that is up to it.
    `descriptors` is how many a session takes on the server, beside its connections to the listener. `library` is the
    communication library that opens the ports by which it is exposed, and `ports` is how many it has on the host for
    all sessions of a process, one for each, unless it is told otherwise by its environment; None where that is no
    limit. `relays` says whether weights are passed on by default while they are loaded.
    """

    name: str
    device: str
    copies: bool = True
    peers: int | None = None
    descriptors: int = 0
    exposure: Exposure = Exposure.NOTHING
    library: str = ""
    ports: int | None = None
    relays: bool = True

    @property
    def used_in_clear(self) -> bool:
        """Whether it is used by default where there is no TLS."""
        return self.exposure is not Exposure.PROCESS

    @property
    def used_under_tls(self) -> bool:
        """Whether it is used by default where peers speak TLS."""
        return self.exposure is Exposure.NOTHING


SHARED_MEMORY: Final = Traits("shared_memory", "cpu", copies=False, descriptors=3)
"""A session takes its socket, the connection, and a duplicate of the arena's descriptor."""
HCCL: Final = Traits(
    "process_group",
    "npu",
    peers=3,
    descriptors=9,
    exposure=Exposure.BYTES,
    library="hccl",
    ports=16,
    relays=False,
)
"""Its ports are on the NPUs' own network, beside those of the host. Each session takes buffers on the device. A relay
has groups in both directions at once, which no NPU has shown yet to go well.
"""
TCP: Final = Traits("tcp", ANY, descriptors=2)
"""Moves bytes by way of host memory. A session takes a duplicate of the arena's descriptor, and one to be woken by."""
GLOO: Final = Traits("process_group", "cpu", descriptors=9, exposure=Exposure.PROCESS, library="gloo")
"""A session takes about that many descriptors for Gloo's listener and pairs."""

TABLE: Final = (SHARED_MEMORY, HCCL, TCP, GLOO)
"""All rows, in the order of preference."""

NAMES: Final = tuple(dict.fromkeys(row.name for row in TABLE))
"""All that TRANSPORT may name."""


PORT_RANGE: Final = "HCCL_HOST_SOCKET_PORT_RANGE"
"""The variable that gives HCCL other ports on the host: numbers and ranges such as 60000-60050, or "auto" for any."""


def ports_in(row: Traits, environment: Mapping[str, str]) -> int | None:
    """How many ports the library of a transport has on this host; None for no limit, or where that cannot be told."""
    ranges = environment.get(PORT_RANGE)
    if row.ports is None or not ranges:
        return row.ports
    found = [re.fullmatch(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", part.strip()) for part in ranges.split(",")]
    if not all(found):
        return None
    return sum(int(each[2] or each[1]) - int(each[1]) + 1 for each in found if each is not None)


def rows_for(device: str) -> tuple[Traits, ...]:
    """What can carry weights for a device of that type, best first."""
    return tuple(row for row in TABLE if row.device in (device, ANY))


def traits_of(name: str, device: str) -> Traits:
    """The row of the transport `name` for a device of that type. Raises KeyError where there is none."""
    rows = {row.name: row for row in rows_for(device)}
    return rows[name]
