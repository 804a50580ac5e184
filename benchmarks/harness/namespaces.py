"""Hosts that are network namespaces: each is joined to one switch by a cable, whose two ends send at a set rate.

The switch is a bridge in a namespace of its own, in which the program that measures runs (`enter`); a host is a process
that calls `become_host`. Namespaces here have no names, so that nothing of them is left when their processes end,
however they do. Neither root nor anything else is needed where the system lets users make namespaces of their own.

The token buckets of `tc` hold back what each end sends. Where the kernel can delay packets (`netem`), the switch does;
where it cannot, the only delay is that of the queues.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Final

DELAY_MILLISECONDS: Final = 1
"""Of each packet to a host, where the kernel has `netem`."""
_QUEUE_SECONDS: Final = 0.02
"""What waits at the end of a cable at most: enough for TCP to fill it, and as little as a good switch has."""
_BURST_BYTES: Final = 128 << 10
"""Sent at once at most. The largest packet, 64 KiB before it is split for the wire, has to fit."""
_CLONE_NEWNET: Final = 0x40000000
_NETWORK: Final = "10.77.0"
_INSIDE: Final = "NETLOADER_BENCHMARK_NAMESPACE"
"""The variable of the environment that says that this program is in a namespace of its own."""


def enter() -> None:
    """Starts this program again in a namespace of its own, unless that was done. Exits where that is not permitted."""
    if os.environ.get(_INSIDE):
        return
    missing = [each for each in ("unshare", "ip", "tc") if shutil.which(each) is None]
    if missing:
        sys.exit(f"hosts are network namespaces, for which {', '.join(missing)} (util-linux, iproute2) is missing here")
    for rights in ((), ("--user", "--map-root-user")):
        unshare = ("unshare", *rights, "--net", "--")
        if subprocess.run((*unshare, "true"), capture_output=True, check=False).returncode == 0:
            os.environ[_INSIDE] = "yes"
            os.execvp("unshare", [*unshare, *sys.orig_argv])
    sys.exit(
        "network namespaces are not permitted here, neither as this user nor in a user namespace. As root, or in a "
        "container with CAP_SYS_ADMIN, they are; --loopback measures without them"
    )


def become_host() -> None:
    """Gives this process a network of its own, with nothing in it. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare(CLONE_NEWNET)")
    _run("ip", "link", "set", "lo", "up")


class Switch:
    """What the hosts are plugged into. It is in the namespace of this process, which has called `enter`."""

    def __init__(self) -> None:
        _run("ip", "link", "add", "switch", "type", "bridge")
        _run("ip", "link", "set", "switch", "up")
        self.delays = True
        """Whether packets are delayed: not where the kernel has no `netem`."""
        self._ports = 0

    def plug(self, pid: int, rate: float) -> str:
        """Lays a cable to the host that is the process `pid`. Either end sends up to `rate` bytes per second.

        Returns the address of the host. Raises ValueError where the system cannot do that.
        """
        self._ports += 1
        port, address = f"port{self._ports}", f"{_NETWORK}.{self._ports}"
        within = ("nsenter", "--target", str(pid), "--net")
        _run("ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(pid))
        _run("ip", "link", "set", port, "master", "switch", "up")
        _run(*within, "ip", "address", "add", f"{address}/24", "dev", "eth0")
        _run(*within, "ip", "link", "set", "eth0", "up")
        _run(*within, "tc", "qdisc", "add", "dev", "eth0", "root", *_bucket(rate))
        self.delays = self.delays and _can("tc", "qdisc", "add", "dev", port, "root", "handle", "1:", *_DELAY)
        above = ("parent", "1:1", "handle", "10:") if self.delays else ("root",)
        _run("tc", "qdisc", "add", "dev", port, *above, *_bucket(rate))
        return address


_DELAY: Final = ("netem", "delay", f"{DELAY_MILLISECONDS}ms", "limit", "100000")


def _bucket(rate: float) -> Sequence[str]:
    limit = _BURST_BYTES + round(rate * _QUEUE_SECONDS)
    return "tbf", "rate", f"{round(8 * rate)}bit", "burst", str(_BURST_BYTES), "limit", str(limit)


def _can(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{' '.join(command)}: {done.stderr.strip() or f'exit status {done.returncode}'}")
