"""What all processes of a soak know: where the servers are, what they serve, who may have it, and what a task is."""

from __future__ import annotations

import faulthandler
import logging
import os
import secrets
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TextIO

import numpy

from support.certificates import Authority, Identification
from vllm_ascend.model_loader.netloader.transport.base import Timeouts
from vllm_ascend.model_loader.netloader.wire.access import Access

HOST: Final = "127.0.0.4"
"""The servers' address. Nobody connects from there, so no outgoing connection can take the port of a killed server."""
STRANGERS_HOST: Final = "127.0.0.2"
FAULTY_HOST: Final = "127.0.0.3"
"""Where strangers and floods, and where broken connections come from. A server stops listening for a while to an
address from which it is not greeted properly, and faultless fetches must not feel that."""
LISTENERS: Final = ("open", "token", "tls")
TIMEOUTS: Final = Timeouts(connect=5.0, stall=5.0)

Kind = str
SHARES: Final[dict[Kind, int]] = {
    "fetch": 8,
    "killed": 2,
    "cut": 4,
    "corrupted": 4,
    "slow": 1,
    "stranger": 2,
    "flood": 1,
    "clinging": 1,
}
"""How often each kind of task is chosen."""
FETCHING: Final = ("fetch", "cut", "corrupted", "slow")


@dataclass(frozen=True)
class Setting:
    """The size of the weights, and what the servers and their clients show each other."""

    nbytes: int
    token: bytes
    identification: Identification

    @classmethod
    def new(cls, nbytes: int, directory: Path) -> Setting:
        """With a token and certificates of its own, of which the latter are files in `directory`."""
        return cls(nbytes, secrets.token_bytes(32), Authority(directory, "soak").identify("instance"))

    def access(self, listener: str) -> Access:
        """What a client of that listener needs, and what the listener asks for."""
        match listener:
            case "token":
                return Access(self.token)
            case "tls":
                return self.identification.access()
        return Access()

    def contents(self, edition: int) -> bytes:
        """The weights of an edition, which are random and differ from those of every other one."""
        return numpy.random.default_rng(edition).bytes(self.nbytes)


@dataclass(frozen=True)
class Task:
    """One thing for a worker to do. `sources` are ports of servers' listeners, in the order in which to ask them."""

    kind: Kind
    seed: int
    listener: str
    sources: tuple[int, ...]
    verify: bool = True


@dataclass(frozen=True)
class Result:
    """What came of a task. `wrong` says what must not happen; `failures` has one entry per attempt that failed."""

    kind: Kind
    succeeded: bool = False
    failures: tuple[str, ...] = ()
    damaged: int = 0
    wrong: str = ""


def prepare_process() -> None:
    """For servers and workers: keeps the warnings about faults out of the output, and ends the process on an error.

    SIGUSR1 prints the stacks of all threads, which shows where a process hangs.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    log = logging.getLogger("vllm_ascend")
    log.propagate = False
    log.addHandler(_Fatal())
    threading.excepthook = _die_of


class _Fatal(logging.StreamHandler[TextIO]):
    """An error of Netloader's own ends the process, which fails the run."""

    def __init__(self) -> None:
        super().__init__()
        self.setLevel(logging.ERROR)

    def emit(self, record: logging.LogRecord) -> None:
        super().emit(record)
        self.flush()
        os._exit(70)


def _die_of(failure: threading.ExceptHookArgs) -> None:
    threading.__excepthook__(failure)
    sys.stderr.flush()
    os._exit(70)
