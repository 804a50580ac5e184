"""The run of a soak, in rounds: one thread drives each process until the round is over, and then all must be quiet."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from typing import Any, Final

from support.child import Child
from tools.soak.servers import LASTING, MORTAL, SERVERS, TIMEOUTS, Server, Setting
from tools.soak.tasks import FETCHING, SHARES, Task, Worker
from tools.soak.watching import Counts, Level, SoakFailed
from vllm_ascend.model_loader.netloader.client.inquiry import inquire

WORKERS: Final = tuple(f"worker {number}" for number in range(5))
PATIENCE: Final = 120.0
"""Seconds after which a task or a server counts as hung: more than all timeouts and pauses of a task come to."""
SETTLING: Final = 30.0
"""Seconds that processes have to let go of everything that has ended."""
ROUND_SECONDS: Final = 30.0
FIRST_ROUNDS: Final = 2
"""The level after these rounds is that with which the later ones are compared."""


class Conductor:
    """Runs one soak. `counts` says what has happened so far."""

    def __init__(self, setting: Setting, seed: int) -> None:
        self.counts = Counts()
        self._lock = threading.Lock()  # of the counts
        self._setting = setting
        self._chances = {name: random.Random(f"{seed} {name}") for name in (*SERVERS, *WORKERS)}
        self._children: dict[str, Child] = {}
        self._bases: dict[Child, Level] = {}
        self._over = threading.Event()

    def run(self, seconds: float) -> None:
        """Returns after so many seconds and the pauses between the rounds.

        Raises SoakFailed, ChildFailed for a process that has failed, or SourceError if the lasting server does not
        answer.
        """
        rounds = max(FIRST_ROUNDS + 1, round(seconds / ROUND_SECONDS))
        with ThreadPoolExecutor(len(self._chances)) as threads:
            try:
                list(threads.map(self._start, self._chances))
                for number in range(rounds):
                    self._over.clear()
                    driven = [threads.submit(self._drive, name) for name in self._chances]
                    wait_for(driven, seconds / rounds, return_when=FIRST_EXCEPTION)
                    self._over.set()
                    for each in driven:
                        each.result()

                    self._be_quiet(first=number < FIRST_ROUNDS)
                    print(f"\nround {number + 1} of {rounds}\n{self.counts}", flush=True)
            finally:
                self._over.set()
                for child in self._children.values():
                    child.kill()

        for kind in FETCHING:
            if self.counts.begun[kind] >= 3 and not self.counts.succeeded[kind]:
                raise SoakFailed(f"of {self.counts.begun[kind]} tasks of the kind {kind!r}, none succeeded")

    def _start(self, name: str) -> None:
        """Starts the process of that name, and waits until it is ready. Raises ChildFailed."""
        if name in SERVERS:
            child = Child(Server, self._setting, name, self._edition(name), name=name, patience=PATIENCE)
        else:
            child = Child(Worker, self._setting, name=name, patience=PATIENCE)
        self._children[name] = child
        child.answer()

    def _edition(self, server: str) -> int:
        return self._chances[server].randrange(1 << 32)

    def _drive(self, name: str) -> None:
        """Keeps a process busy until the round is over. Raises ChildFailed."""
        chance = self._chances[name]
        if name in SERVERS:
            while not self._over.wait(chance.uniform(1, 8)):
                reloaded = self._do(name, self._edition(name), doomed=name == MORTAL and chance.random() < 0.5)
                with self._lock:
                    self.counts.reloads += reloaded is not None
        else:
            while not self._over.is_set():
                (kind,) = chance.choices(list(SHARES), list(SHARES.values()))
                self._do_task(name, Task(kind, chance.randrange(1 << 32)))

    def _do_task(self, worker: str, task: Task) -> None:
        with self._lock:
            self.counts.begun[task.kind] += 1
        result = self._do(worker, task, doomed=task.kind == "killed")
        if result is not None:
            with self._lock:
                self.counts.succeeded[task.kind] += result.succeeded
                self.counts.failures.update(f"{task.kind}: {failure}" for failure in result.failures)
                self.counts.damaged_chunks += result.damaged_chunks

    def _do(self, name: str, order: Any, *, doomed: bool) -> Any:
        """The answer to an order. If it is doomed and takes long, the process is killed instead, and a new one started.

        Raises ChildFailed.
        """
        child = self._children[name]
        child.ask(order)
        if not doomed or child.answers_within(self._chances[name].uniform(0, 1)):
            return child.answer()

        child.kill()
        with self._lock:
            self.counts.killed["servers" if name in SERVERS else "workers"] += 1
        self._start(name)
        return None

    def _be_quiet(self, *, first: bool) -> None:
        """Waits until nothing is left of the round, and notes the levels. Raises SoakFailed and SourceError."""
        end = time.monotonic() + SETTLING
        time.sleep(1)  # in which threads and connections end
        while left := self._left_behind():
            if time.monotonic() > end:
                raise SoakFailed(left)
            time.sleep(0.5)

        for name in (LASTING, *WORKERS):
            child = self._children[name]
            level = Level.of(child)
            if first or child not in self._bases:
                self._bases[child] = level
            if name == LASTING:
                self.counts.quiet = level

    def _left_behind(self) -> str:
        """What there should not be when nothing runs. Empty if there is nothing of it."""
        for listener, address in self._setting.addresses[LASTING].items():
            status = inquire(address, TIMEOUTS.connect, self._setting.access(listener))
            if status.sessions or status.waiting:
                return f"{LASTING} has clients when quiet: {status}"
        for name in (LASTING, *WORKERS):
            child = self._children[name]
            level, base = Level.of(child), self._bases.get(child)
            if base is not None and level.above(base):
                return f"{child.name} has grown: {level} when quiet, after the first rounds {base}"
        return ""
