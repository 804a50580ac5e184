"""Processes that do what this one tells them, an order at a time over a pipe."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

_spawn = multiprocessing.get_context("spawn")


class ChildFailed(Exception):
    """A child ended by itself, hangs, or could not do what it was asked to; its standard error has a traceback."""


class Child:
    """A new process that makes `doer(*arguments)` and calls it with each order; what that returns is the answer.

    The first answer is None: the doer is made. An exception of the doer answers its order, and raises ChildFailed here;
    the process goes on. It ends with this process at the latest. Use it with `with`, or call `kill`.

    An answer that takes longer than `patience` seconds, if that is given, is an error.
    """

    def __init__(
        self,
        doer: Callable[..., Callable[[Any], Any]],
        *arguments: Any,
        name: str = "a process",
        patience: float | None = None,
    ) -> None:
        self.name = name
        self._patience = patience
        self.connection, theirs = _spawn.Pipe()
        self.process = _spawn.Process(target=_obey, args=(theirs, doer, arguments), name=name, daemon=True)
        self.process.start()
        theirs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()
        self.process.join(2)
        self.kill()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def anonymous_bytes(self) -> int:
        """Memory that is its own and in no file; an arena is a file. Raises OSError once the process is gone."""
        lines = Path(f"/proc/{self.pid}/smaps_rollup").read_text().splitlines()
        (kibibytes,) = (int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))
        return kibibytes << 10

    def ask(self, order: Any) -> None:
        """Gives an order, whose answer is to be taken before the next one. A process that is gone shows there."""
        with contextlib.suppress(BrokenPipeError):
            self.connection.send(order)

    def answer(self) -> Any:
        """Waits for the next answer. Raises ChildFailed."""
        if not self.connection.poll(self._patience):
            os.kill(self.pid, signal.SIGUSR1)
            time.sleep(1)  # while it prints the stacks of its threads
            raise ChildFailed(f"{self.name} has not answered for {self._patience:.0f} s; its stacks are above")
        try:
            done, value = self.connection.recv()
        except (EOFError, ConnectionError):
            raise ChildFailed(f"{self.name} has ended by itself; its error is above") from None
        if not done:
            raise ChildFailed(f"{self.name} failed: {value}")
        return value

    def answers_within(self, seconds: float) -> bool:
        """Whether `answer` returns or raises at once, after waiting for up to `seconds`."""
        return self.connection.poll(seconds)

    def do(self, order: Any) -> Any:
        """Gives an order and waits for the answer. Raises ChildFailed."""
        self.ask(order)
        return self.answer()

    def kill(self) -> None:
        """Ends the process at once, as a crash does. Idempotent."""
        self.process.kill()
        self.process.join()
        self.connection.close()


def _obey(connection: Connection, make: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...]) -> None:
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    doer = make(*arguments)
    with contextlib.suppress(EOFError, ConnectionError, KeyboardInterrupt):
        connection.send((True, None))
        while True:
            order = connection.recv()
            try:
                answer = True, doer(order)
            except Exception as error:
                traceback.print_exc()
                answer = False, repr(error)
            connection.send(answer)
