"""The run of a soak. All decisions are made here, in one thread."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import wait
from typing import Any, Final, Self

from support.child import Child
from support.ports import free_ports
from support.wait import wait_until
from tools.soak.levels import Counts, Level
from tools.soak.server import Server
from tools.soak.setting import FETCHING, HOST, LISTENERS, SHARES, TIMEOUTS, Result, Setting, Task
from tools.soak.worker import Worker
from vllm_ascend.model_loader.netloader.client.inquiry import inquire
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import SourceError
from vllm_ascend.model_loader.netloader.wire.access import Access

WORKERS: Final = 5
PATIENCE: Final = 120.0
"""Seconds after which a task or a server counts as hung: more than all timeouts and pauses of a task come to."""
SETTLING: Final = 30.0
"""Seconds that the lasting server has to let go of everything that has ended."""
REPORT_INTERVAL: Final = 30.0
FIRST_MOMENTS: Final = 2
"""Quiet moments, one REPORT_INTERVAL apart, that give the levels with which the later ones are compared."""
STARTING: Final = "to start"


class SoakFailed(Exception):
    """Something has happened that must not."""


class Patient(Child):
    """A child that is waited for, but not forever. `waiting_for` says what it has been asked for, if anything."""

    def __init__(self, name: str, doer: Callable[..., Callable[[Any], Any]], *arguments: Any) -> None:
        super().__init__(doer, *arguments, name=name)
        self.waiting_for = STARTING
        self._asked_at = time.monotonic()

    def ask(self, order: Any) -> None:
        self.waiting_for, self._asked_at = str(order), time.monotonic()
        super().ask(order)

    def answer(self) -> Any:
        answer = super().answer()
        self.waiting_for = ""
        return answer

    def require_progress(self) -> None:
        """Raises SoakFailed if it has not answered for PATIENCE; the stacks of its threads are then in its output."""
        if self.waiting_for and time.monotonic() - self._asked_at > PATIENCE:
            os.kill(self.pid, signal.SIGUSR1)
            time.sleep(1)
            raise SoakFailed(f"{self.name} hangs: {self.waiting_for!r} has not ended for {PATIENCE:.0f} s")

    def level(self) -> Level:
        """What it takes from its host now. Raises SoakFailed if it is gone."""
        try:
            return Level.of(self.pid)
        except OSError as error:
            raise SoakFailed(f"{self.name} has ended by itself; its error is above") from error


class Conductor:
    """Starts all processes when it is entered, and ends them when it is left."""

    def __init__(self, setting: Setting, chance: random.Random, counts: Counts) -> None:
        self._setting = setting
        self._chance = chance
        self._counts = counts
        self._editions = 0
        self._workers: list[Patient] = []
        self._doomed: dict[Patient, float] = {}
        self._tasks: dict[Patient, Task] = {}
        self._servers: dict[str, Patient] = {}
        self._ports = {name: free_ports(len(LISTENERS), HOST) for name in ("lasting", "mortal")}
        self._first_levels: dict[int, Level] = {}
        self._quiet_moments = 0
        self._begun = self._reload_at = self._kill_at = 0.0

    @property
    def _children(self) -> list[Patient]:
        return [*self._workers, *self._servers.values()]

    def __enter__(self) -> Self:
        try:
            for name in self._ports:
                self._start_server(name)
            for number in range(WORKERS):
                self._workers.append(Patient(f"worker {number}", Worker, self._setting))
            self._wait_for_answers()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children:
            child.kill()

    def run(self, seconds: float) -> None:
        """Raises SoakFailed, or ChildFailed for a process that has ended by itself."""
        self._begun = time.monotonic()
        interval = min(REPORT_INTERVAL, seconds / 4)
        end, report_at, sample_at = self._begun + seconds, self._begun + interval, 0.0
        self._reload_at, self._kill_at = (self._begun + self._chance.uniform(2, 5) for _ in range(2))
        while (now := time.monotonic()) < end:
            if now >= report_at:
                self._be_quiet()
                report_at = max(report_at + interval, time.monotonic() + interval / 2)
            if now >= sample_at:
                self._counts.peak = self._counts.peak.highest(self._servers["lasting"].level())
                sample_at = now + 0.5

            self._disturb(now)
            for worker in self._workers:
                if worker not in self._tasks and not worker.waiting_for:
                    self._give_task(worker)
            self._collect(0.1)

        self._be_quiet()
        for kind in FETCHING:
            if self._counts.begun[kind] >= 3 and not self._counts.succeeded[kind]:
                raise SoakFailed(f"of {self._counts.begun[kind]} tasks of the kind {kind!r}, none succeeded")

    def _disturb(self, now: float) -> None:
        """Kills and reloads what is due."""
        self._kill_doomed(now)
        if now >= self._reload_at:
            self._reload_at = now + self._chance.uniform(1, 8)
            server = self._servers[self._chance.choice(sorted(self._servers))]
            if not server.waiting_for:
                self._counts.reloads += 1
                server.ask(self._next_edition())
        if now >= self._kill_at and self._servers["mortal"].waiting_for != STARTING:
            self._kill_at = now + self._chance.uniform(8, 20)
            self._servers["mortal"].kill()
            self._counts.servers_killed += 1
            self._start_server("mortal")

    def _give_task(self, worker: Patient) -> None:
        kind = self._chance.choices(list(SHARES), list(SHARES.values()))[0]
        listener = self._chance.choice(LISTENERS)
        names = self._chance.sample(sorted(self._ports), len(self._ports))
        task = Task(
            kind=kind,
            seed=self._chance.randrange(1 << 32),
            listener=listener,
            sources=tuple(self._ports[name][LISTENERS.index(listener)] for name in names),
            verify=kind == "corrupted" or self._chance.random() < 0.8,
        )
        self._counts.begun[kind] += 1
        self._tasks[worker] = task
        if kind == "killed":
            self._doomed[worker] = time.monotonic() + self._chance.uniform(0, 1)
        worker.ask(task)

    def _collect(self, timeout: float) -> None:
        """Takes the answers that come within `timeout`. Raises SoakFailed or ChildFailed."""
        children = self._children
        ready = wait([child.connection for child in children], timeout)
        for child in [child for child in children if child.connection in ready]:
            result = child.answer()
            if isinstance(result, Result):
                self._note(child, result)
        for child in children:
            child.require_progress()

    def _note(self, worker: Patient, result: Result) -> None:
        task = self._tasks.pop(worker)
        if self._doomed.pop(worker, None) is not None:  # it was faster than its end
            self._counts.begun.subtract(["killed"])
            self._counts.begun.update(["fetch"])
            result = replace(result, kind="fetch")
        self._counts.add(result)
        if result.wrong:
            raise SoakFailed(f"{result.wrong} ({task})")

    def _wait_for_answers(self) -> None:
        """Returns when every process has done what it was asked for."""
        while any(child.waiting_for for child in self._children):
            self._collect(0.1)
            self._kill_doomed(time.monotonic())

    def _be_quiet(self) -> None:
        """Waits until nothing runs, and compares levels with those of the first minute. Raises SoakFailed."""
        self._quiet_moments += 1
        self._wait_for_answers()
        for port, listener in zip(self._ports["lasting"], LISTENERS, strict=True):
            require_no_clients(Endpoint(HOST, port), self._setting.access(listener))
        lasting = self._servers["lasting"]
        for child in (lasting, *self._workers):
            base = self._first_levels.get(child.pid)
            level = self._settled_level(child, base)
            if base is None or self._quiet_moments <= FIRST_MOMENTS:
                self._first_levels[child.pid] = level if base is None else base.highest(level)
            elif level.above(base):
                raise SoakFailed(f"{child.name} has grown: {level} when quiet, in the first minute {base}")
            if child is lasting:
                self._counts.quiet = level
        self._counts.show(time.monotonic() - self._begun)

    @staticmethod
    def _settled_level(child: Patient, base: Level | None) -> Level:
        """The level once it does not exceed `base` or, without one, does not change any more, or after SETTLING."""
        end = time.monotonic() + SETTLING
        level = child.level()
        while time.monotonic() < end:
            time.sleep(0.5)
            before, level = level, child.level()
            if level == before if base is None else not level.above(base):
                break
        return level

    def _kill_doomed(self, now: float) -> None:
        """Kills the workers that are due in the middle of their task, and puts new ones in their places."""
        for worker in [worker for worker, due in self._doomed.items() if now >= due]:
            del self._doomed[worker], self._tasks[worker]
            worker.kill()
            self._first_levels.pop(worker.pid, None)
            self._workers[self._workers.index(worker)] = Patient(worker.name, Worker, self._setting)

    def _start_server(self, name: str) -> None:
        ports, edition = self._ports[name], self._next_edition()
        self._servers[name] = Patient(f"the {name} server", Server, self._setting, ports, edition)

    def _next_edition(self) -> int:
        self._editions += 1
        return self._editions


def require_no_clients(server: Endpoint, access: Access) -> None:
    """Returns when nobody takes weights from the lasting server, or waits for them. Raises SoakFailed."""

    def has_none() -> bool:
        status = inquire(server, TIMEOUTS.connect, access)
        return not status.sessions and not status.waiting

    try:
        wait_until(has_none, SETTLING, interval=0.2)
    except SourceError as error:
        raise SoakFailed(f"the lasting server does not answer: {error}") from error
    except AssertionError as error:
        raise SoakFailed(f"nobody fetches, but the lasting server has clients on its port {server.port}") from error
