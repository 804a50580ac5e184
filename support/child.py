"""Processes that do what this one tells them, an order at a time over a pipe."""

from __future__ import annotations

import contextlib
import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Self

_spawn = multiprocessing.get_context("spawn")


class ChildFailed(Exception):
    """A child has ended by itself, or could not do what it was asked to; its traceback is in its standard error."""


class Child:
    """A new process that makes `doer(*arguments)` and calls it with each order; what that returns is the answer.

    The first answer is None: the doer is made. An exception of the doer answers its order, and raises ChildFailed here;
    the process goes on. It ends with this process at the latest. Use it with `with`, or call `kill`.
    """

    def __init__(self, doer: Callable[..., Callable[[Any], Any]], *arguments: Any, name: str = "a process") -> None:
        self.name = name
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

    def ask(self, order: Any) -> None:
        """Gives an order, whose answer is to be taken before the next one. A process that is gone shows there."""
        with contextlib.suppress(BrokenPipeError):
            self.connection.send(order)

    def answer(self) -> Any:
        """Waits for the next answer. Raises ChildFailed."""
        try:
            done, value = self.connection.recv()
        except (EOFError, ConnectionError):
            raise ChildFailed(f"{self.name} has ended by itself; its error is above") from None
        if not done:
            raise ChildFailed(f"{self.name} failed: {value}")
        return value

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
