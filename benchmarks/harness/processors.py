"""What the processors of this machine do while something is measured, so that a disturbed measurement is noticed."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_TICKS: Final = os.sysconf("SC_CLK_TCK")


@dataclass
class Use:
    """Shares of all processors. `others` is what processes had that do not belong to the measurement."""

    busy: float = 0.0
    others: float = 0.0


@contextmanager
def watched(pids: Iterable[int]) -> Iterator[Use]:
    """A scope whose use is known when it ends. `pids` are those of the processes that are measured beside this one.

    What the kernel does for the network belongs to nobody and counts as that of the measurement.
    """
    use, pids = Use(), tuple(pids)
    total, busy, network = _machine()
    own = _own(pids)
    yield use
    total_then, busy_then, network_then = _machine()
    elapsed = max(total_then - total, 1.0)
    use.busy = (busy_then - busy) / elapsed
    use.others = max(busy_then - busy - (network_then - network) - (_own(pids) - own), 0.0) / elapsed


def _machine() -> tuple[float, float, float]:
    """Seconds of all processors since the start, those in which they had something to do, and those of interrupts."""
    line = Path("/proc/stat").read_text().splitlines()[0]
    user, nice, system, idle, iowait, irq, softirq, steal = (int(each) / _TICKS for each in line.split()[1:9])
    busy = user + nice + system + irq + softirq + steal
    return busy + idle + iowait, busy, irq + softirq


def _own(pids: Iterable[int]) -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    seconds = usage.ru_utime + usage.ru_stime
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except FileNotFoundError:  # it was killed
            continue
        seconds += (int(fields[11]) + int(fields[12])) / _TICKS
    return seconds
