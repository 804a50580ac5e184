"""Netloader's server and client under random faults for a while; whatever arrives is compared byte for byte.

    python -m tools.soak                    # ten minutes
    python -m tools.soak --seconds 60 --seed 7

Two server processes, "lasting" and "mortal", serve synthetic weights, each on a listener for everybody, one with a
token and one with TLS. They replace their weights by others now and then, every other time with serving suspended
before, which no client may prevent. The mortal one is killed and started again. Worker processes do tasks, each chosen
by chance:

    fetch       takes the weights from both servers in some order, with or without VERIFY
    killed      the same, but the process is killed in the middle
    cut         connections break after some bytes, by a proper end or a reset
    corrupted   bytes change on their way
    slow        bytes pass slowly, and then the connection breaks
    stranger    a client with a wrong token, without one, or without TLS: it must get nothing
    flood       many connections that are silent, send garbage, or ask for nothing but the status
    clinging    sessions and waiting clients that ask on, do not read, take nothing, or give up with many words

Now and then all is quiet: no task runs, and the lasting server must have no sessions left, and not more descriptors,
threads and private memory than in the first minute, but for a tolerance. The same holds for the workers.

The exit status is 1 for wrong bytes, a stranger that got weights, growth, a task or server that does not come to its
end, or faultless fetches of which none succeeded. `--seed` chooses the same tasks and faults again; when they hit what
is up to the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import faulthandler
import gc
import json
import logging
import multiprocessing
import os
import random
import re
import secrets
import select
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Final, Self, TextIO

import numpy
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from vllm_ascend.model_loader.netloader.client.fetch import Client
from vllm_ascend.model_loader.netloader.client.inquiry import inquire
from vllm_ascend.model_loader.netloader.client.options import FetchOptions
from vllm_ascend.model_loader.netloader.client.session import Fetched
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import SourceError, SourcesExhausted
from vllm_ascend.model_loader.netloader.server.publications import Publication
from vllm_ascend.model_loader.netloader.server.requests import Settings
from vllm_ascend.model_loader.netloader.server.server import WeightServer
from vllm_ascend.model_loader.netloader.transport.base import Timeouts
from vllm_ascend.model_loader.netloader.transport.digests import StoreDigests
from vllm_ascend.model_loader.netloader.transport.store import Request, WeightStore
from vllm_ascend.model_loader.netloader.transport.tcp import CONNECTIONS, TcpTransport
from vllm_ascend.model_loader.netloader.weights.arena import Arena
from vllm_ascend.model_loader.netloader.weights.identity import ModelIdentity, RankCoordinates
from vllm_ascend.model_loader.netloader.weights.manifest import Manifest, TensorSpec, chunks
from vllm_ascend.model_loader.netloader.wire.access import Access
from vllm_ascend.model_loader.netloader.wire.conversation import frame
from vllm_ascend.model_loader.netloader.wire.messages import AskDigests, Done, Fetch, Hello, Inquire, Join, Leave, Offer

HOST: Final = "127.0.0.1"
STRANGERS_HOST: Final = "127.0.0.2"
FAULTY_HOST: Final = "127.0.0.3"
"""Where strangers and floods, and where broken connections come from. A server does not listen for a while to an
address from which it is not greeted as it should be, which faultless fetches must not feel."""
LISTENERS: Final = ("open", "token", "tls")
WORKERS: Final = 5
MAX_CLIENTS: Final = 1
"""Of each listener: few, so that workers wait for their turn."""
TIMEOUTS: Final = Timeouts(connect=5.0, stall=5.0)
WAIT_TIMEOUT: Final = 20.0
PATIENCE: Final = 120.0
"""Seconds after which a task or a server counts as hung: above what all timeouts and pauses of a task come to."""
SETTLING: Final = 30.0
"""Seconds that the lasting server has to let go of all that ended."""
REPORT_INTERVAL: Final = 30.0
FIRST_MOMENTS: Final = 2
"""Quiet moments, one REPORT_INTERVAL apart, that give the levels with which the later ones are compared."""
MORE_DESCRIPTORS: Final = 4
MORE_THREADS: Final = 2
MORE_MEMORY: Final = 48 << 20
"""Tolerances. Memory is what malloc may keep in the arenas of threads that ended."""
SLOW_RATE: Final = 256 << 10
SLOW_SECONDS: Final = 6.0
"""Above what a server needs to notice that a client takes next to nothing."""
FLOOD: Final = 100
"""Connections."""
CLINGING: Final = 20
"""Connections."""
UNFRAMED_FROM: Final = 64 << 10
"""Byte of a connection from which on there are only weights: messages to a client of these weights are shorter."""
IDENTITY: Final = ModelIdentity(name="synthetic", architecture="Synthetic", config_digest="", dtype="uint8")
TENSOR_BYTES: Final = 3 << 20
STARTING: Final = "to start"

_processes: Final = multiprocessing.get_context("forkserver")
_NO_LINGER: Final = struct.pack("ii", 1, 0)

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


class SoakFailed(Exception):
    """Something that must not happen has."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0, help="default: 600")
    parser.add_argument("--megabytes", type=int, default=64, help="of weights, in MiB (default: 64)")
    parser.add_argument("--seed", type=int, default=None, help="default: another one each time")
    parser.add_argument("--json", type=Path, help="also write the counts here")
    options = parser.parse_args()
    seed = secrets.randbelow(1 << 32) if options.seed is None else options.seed
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    _processes.set_forkserver_preload([Client.__module__, WeightServer.__module__, Arena.__module__])
    faulthandler.dump_traceback_later(2 * options.seconds + 5 * PATIENCE, exit=True)  # should this process itself hang
    say(f"{options.seconds:.0f} s, seed {seed}, {os.cpu_count()} CPUs")
    counts = Counts()
    failure = ""
    with tempfile.TemporaryDirectory(prefix="netloader-soak-") as scratch:
        setting = Setting.new(options.megabytes << 20, Path(scratch))
        try:
            with Soak(setting, random.Random(seed), counts) as soak:
                soak.run(options.seconds)
        except SoakFailed as error:
            failure = str(error)
        except KeyboardInterrupt:
            failure = "interrupted"
    if options.json:
        options.json.write_text(json.dumps({"seed": seed, "failure": failure, **counts.as_dict()}, indent=2))
    say(f"FAILED (seed {seed}): {failure}" if failure else "passed")
    return 1 if failure else 0


@dataclass(frozen=True)
class Setting:
    """What all processes know."""

    nbytes: int
    token: bytes
    directory: Path

    @classmethod
    def new(cls, nbytes: int, directory: Path) -> Setting:
        make_certificate(directory)
        return cls(nbytes, secrets.token_bytes(32), directory)

    @property
    def manifest(self) -> Manifest:
        places = enumerate(chunks(self.nbytes, TENSOR_BYTES))
        return Manifest(TensorSpec(f"w{n}", "uint8", (length,), (1,), offset) for n, (offset, length) in places)

    def access(self, listener: str) -> Access:
        match listener:
            case "token":
                return Access(self.token)
            case "tls":
                cert, key = str(self.directory / "cert.pem"), str(self.directory / "key.pem")
                return Access.load(None, cert, key, cert)
        return Access()


def contents(edition: int, nbytes: int) -> bytes:
    """The weights of an edition, random as no other edition's."""
    return numpy.random.default_rng(edition).bytes(nbytes)


@dataclass(frozen=True)
class Task:
    """One thing for a worker to do. `sources` are the ports of the listener, in the order to ask them in."""

    kind: Kind
    seed: int
    listener: str
    sources: tuple[int, ...]
    verify: bool = True


@dataclass(frozen=True)
class Result:
    """What came of a task; `wrong` says what must not be. `failures` has one entry per attempt that failed."""

    kind: Kind
    succeeded: bool = False
    failures: tuple[str, ...] = ()
    damaged: int = 0
    wrong: str = ""


@dataclass(frozen=True)
class Level:
    """What a process takes from its host."""

    descriptors: int
    threads: int
    private: int

    @classmethod
    def of(cls, pid: int) -> Level:
        """Raises OSError for a process that is gone."""
        process = Path("/proc") / str(pid)
        anonymous = 0
        for line in (process / "smaps_rollup").read_text().splitlines():
            if line.startswith("Anonymous:"):  # the pages of arenas belong to their files
                anonymous = int(line.split()[1]) << 10
        return cls(len(os.listdir(process / "fd")), len(os.listdir(process / "task")), anonymous)

    def highest(self, other: Level) -> Level:
        return Level(
            max(self.descriptors, other.descriptors),
            max(self.threads, other.threads),
            max(self.private, other.private),
        )

    def above(self, base: Level) -> bool:
        """Whether it has grown since `base`, by more than the tolerances."""
        return (
            self.descriptors > base.descriptors + MORE_DESCRIPTORS
            or self.threads > base.threads + MORE_THREADS
            or self.private > base.private + MORE_MEMORY
        )

    def __str__(self) -> str:
        return f"{self.descriptors} fds, {self.threads} threads, {self.private / 1e6:.0f} MB"


NOTHING: Final = Level(0, 0, 0)


@dataclass
class Counts:
    """What has happened so far; levels are of the lasting server."""

    begun: Counter[Kind] = field(default_factory=Counter)
    succeeded: Counter[Kind] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    damaged: int = 0
    reloads: int = 0
    servers_killed: int = 0
    peak: Level = NOTHING
    quiet: Level = NOTHING

    def add(self, result: Result) -> None:
        self.succeeded[result.kind] += result.succeeded
        self.failures.update(f"{result.kind}: {failure}" for failure in result.failures)
        self.damaged += result.damaged

    def as_dict(self) -> dict[str, Any]:
        return {
            "begun": dict(self.begun),
            "succeeded": dict(self.succeeded),
            "failures": dict(self.failures),
            "damaged_chunks": self.damaged,
            "reloads": self.reloads,
            "servers_killed": self.servers_killed,
            "peak": vars(self.peak),
            "quiet": vars(self.quiet),
        }

    def show(self, seconds: float) -> None:
        tasks = ", ".join(f"{kind} {self.succeeded[kind]} of {self.begun[kind]}" for kind in SHARES if kind != "killed")
        killed = f"{self.begun['killed']} clients, {self.servers_killed} servers"
        say(f"\n{seconds:5.0f} s  succeeded: {tasks}")
        say(f"         killed: {killed}; reloads: {self.reloads}; damaged chunks: {self.damaged}")
        say(f"         the lasting server when quiet: {self.quiet}; at most: {self.peak}")
        for failure, times in self.failures.most_common(12):
            say(f"         {times:7} x {failure}")


class Child:
    """A process that calls `target` with its end of a pipe; it ends with this process at the latest."""

    def __init__(self, name: str, target: Callable[..., None], *arguments: Any) -> None:
        self.name = name
        self.asked_at = time.monotonic()
        self.waiting_for = STARTING
        self.connection, theirs = _processes.Pipe()
        self.process = _processes.Process(target=target, args=(theirs, *arguments), name=name, daemon=True)
        self.process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def ask(self, what: Any, name: str) -> None:
        self.asked_at, self.waiting_for = time.monotonic(), name
        self.connection.send(what)

    def take_answer(self) -> Any:
        """Raises EOFError where the process is gone."""
        try:
            answer = self.connection.recv()
        except OSError as error:
            raise EOFError from error
        self.waiting_for = ""
        return answer

    def require_alive(self) -> None:
        """Raises SoakFailed where it has not answered for PATIENCE; then all threads' stacks are in its output."""
        if self.waiting_for and time.monotonic() - self.asked_at > PATIENCE:
            os.kill(self.pid, signal.SIGUSR1)
            time.sleep(1)
            raise SoakFailed(f"{self.name} hangs: {self.waiting_for!r} has not ended for {PATIENCE:.0f} s")

    def end(self) -> None:
        """At once, as a crash does."""
        self.process.kill()
        self.process.join()
        self.connection.close()


def level_of(child: Child) -> Level:
    """Raises SoakFailed for one that is gone."""
    try:
        return Level.of(child.pid)
    except OSError as error:
        raise SoakFailed(f"{child.name} has ended by itself; its error is above") from error


class Soak:
    """The whole run. All decisions are made here, in one thread."""

    def __init__(self, setting: Setting, chance: random.Random, counts: Counts) -> None:
        self._setting = setting
        self._chance = chance
        self._counts = counts
        self._editions = 0
        self._workers: list[Child] = []
        self._doomed: dict[Child, float] = {}
        self._tasks: dict[Child, Task] = {}
        self._servers: dict[str, Child] = {}
        self._ports = {name: _free_ports(len(LISTENERS)) for name in ("lasting", "mortal")}
        self._first_levels: dict[int, Level] = {}
        self._quiet_moments = 0
        self._begun = self._reload_at = self._kill_at = 0.0

    @property
    def _children(self) -> list[Child]:
        return [*self._workers, *self._servers.values()]

    def __enter__(self) -> Self:
        try:
            for name in self._ports:
                self._start_server(name)
            for number in range(WORKERS):
                self._workers.append(Child(f"worker {number}", work, self._setting))
            for child in self._children:
                self._await(child)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children:
            child.end()

    def run(self, seconds: float) -> None:
        """Raises SoakFailed."""
        self._begun = time.monotonic()
        interval = min(REPORT_INTERVAL, seconds / 4)
        end, report_at, sample_at = self._begun + seconds, self._begun + interval, 0.0
        self._reload_at, self._kill_at = (self._begun + self._chance.uniform(2, 5) for _ in range(2))
        while (now := time.monotonic()) < end:
            if now >= report_at:
                self._be_quiet()
                report_at = max(report_at + interval, time.monotonic() + interval / 2)
            if now >= sample_at:
                self._counts.peak = self._counts.peak.highest(level_of(self._servers["lasting"]))
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
                server.ask(self._next_edition(), "reload")
        if now >= self._kill_at and self._servers["mortal"].waiting_for != STARTING:
            self._kill_at = now + self._chance.uniform(8, 20)
            self._servers["mortal"].end()
            self._counts.servers_killed += 1
            self._start_server("mortal")

    def _give_task(self, worker: Child) -> None:
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
        worker.ask(task, str(task))

    def _collect(self, timeout: float) -> None:
        """Takes the answers that come within `timeout`. Raises SoakFailed for what must not be, and for no answer."""
        children = self._children
        ready = wait([child.connection for child in children], timeout)
        for child in [child for child in children if child.connection in ready]:
            try:
                answer = child.take_answer()
            except EOFError:
                raise SoakFailed(f"{child.name} has ended by itself; its error is above") from None
            if not isinstance(answer, Result):
                continue
            task = self._tasks.pop(child)
            if self._doomed.pop(child, None) is not None:  # it was faster than its end
                self._counts.begun.subtract(["killed"])
                self._counts.begun.update(["fetch"])
                answer = replace(answer, kind="fetch")
            self._counts.add(answer)
            if answer.wrong:
                raise SoakFailed(f"{answer.wrong} ({task})")
        for child in children:
            child.require_alive()

    def _be_quiet(self) -> None:
        """Waits until nothing runs and compares levels with those of the first minute. Raises SoakFailed."""
        self._quiet_moments += 1
        while any(child.waiting_for for child in self._children):
            self._collect(0.1)
            self._kill_doomed(time.monotonic())
        self._require_no_sessions()
        lasting = self._servers["lasting"]
        for child in (lasting, *self._workers):
            level = self._settled(child)
            base = self._first_levels.get(child.pid)
            if base is None or self._quiet_moments <= FIRST_MOMENTS:
                self._first_levels[child.pid] = level if base is None else base.highest(level)
            elif level.above(base):
                raise SoakFailed(f"{child.name} has grown: {level} when quiet, in the first minute {base}")
            if child is lasting:
                self._counts.quiet = level
        self._counts.show(time.monotonic() - self._begun)

    def _settled(self, child: Child) -> Level:
        """The level once it does not exceed the first one, or does not get lower any more for SETTLING."""
        end = time.monotonic() + SETTLING
        base = self._first_levels.get(child.pid)
        level = level_of(child)
        while time.monotonic() < end:
            time.sleep(0.5)
            before, level = level, level_of(child)
            if level == before if base is None else not level.above(base):
                break
        return level

    def _require_no_sessions(self) -> None:
        for port, listener in zip(self._ports["lasting"], LISTENERS, strict=True):
            end = time.monotonic() + SETTLING
            while True:
                try:
                    status = inquire(Endpoint(HOST, port), TIMEOUTS.connect, self._setting.access(listener))
                except SourceError as error:
                    raise SoakFailed(f"the lasting server does not answer: {error}") from error
                if not status.sessions and not status.waiting:
                    break
                if time.monotonic() > end:
                    held = f"{status.sessions} sessions and {status.waiting} that wait"
                    raise SoakFailed(f"nobody fetches, but the lasting server has {held}")
                time.sleep(0.2)

    def _kill_doomed(self, now: float) -> None:
        for worker in [worker for worker, due in self._doomed.items() if now >= due]:
            self._replace(worker)

    def _replace(self, worker: Child) -> None:
        """Kills it and puts another one in its place."""
        del self._doomed[worker], self._tasks[worker]
        worker.end()
        self._first_levels.pop(worker.pid, None)
        self._workers[self._workers.index(worker)] = Child(worker.name, work, self._setting)

    def _start_server(self, name: str) -> None:
        self._servers[name] = Child(f"the {name} server", serve, self._setting, self._ports[name], self._next_edition())

    def _next_edition(self) -> int:
        self._editions += 1
        return self._editions

    def _await(self, child: Child) -> None:
        """Its first answer. Raises SoakFailed."""
        while not child.connection.poll(1):
            child.require_alive()
        try:
            child.take_answer()
        except EOFError:
            raise SoakFailed(f"{child.name} did not start; its error is above") from None


def serve(connection: Connection, setting: Setting, ports: Sequence[int], edition: int) -> None:
    """A server process: publishes `edition`, then every other one that it is sent; answers each."""
    _prepare_child()
    with contextlib.ExitStack() as listening:
        servers = {}
        for port, listener in zip(ports, LISTENERS, strict=True):
            settings = Settings((TcpTransport(),), TIMEOUTS, setting.access(listener), max_clients=MAX_CLIENTS)
            servers[listener] = listening.enter_context(WeightServer(HOST, port, settings))
        with contextlib.suppress(EOFError, BrokenPipeError):
            while True:
                publish(servers, setting, edition)
                connection.send("published")
                edition = connection.recv()


def publish(servers: Mapping[str, WeightServer], setting: Setting, edition: int) -> None:
    """The same pages behind all listeners."""
    for server in servers.values():
        if edition % 2:
            server.suspend("its weights are being replaced")
    with contextlib.closing(Arena.create(setting.nbytes)) as arena:
        with arena.writable() as data:
            data[:] = contents(edition, setting.nbytes)
        arena.seal()
        for server in servers.values():
            pages = Arena.adopt(os.dup(arena.descriptor), setting.nbytes)
            digests = StoreDigests(pages.reader())
            digests.make_ahead()
            generation, attributes = server.next_generation(IDENTITY.role), {"edition": edition}
            store = WeightStore(setting.manifest, pages, generation, attributes, digests)
            server.publish(Publication(IDENTITY, RankCoordinates(), store))
    gc.collect()


def work(connection: Connection, setting: Setting) -> None:
    """A worker process: does each task that it is sent and answers with the result."""
    _prepare_child()
    damaged = DamageCounter()
    logging.getLogger("vllm_ascend").addHandler(damaged)
    connection.send("ready")
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            task = connection.recv()
            damaged.count = 0
            result = do(task, setting)
            connection.send(Result(result.kind, result.succeeded, result.failures, damaged.count, result.wrong))
            gc.collect()


def _prepare_child() -> None:
    """Faults are what this is about: their warnings stay out of the output. SIGUSR1 shows where a process hangs."""
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


class DamageCounter(logging.Handler):
    """Counts the chunks that a client reports as damaged."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += "arrived damaged: its digest differs" in str(record.msg)


def do(task: Task, setting: Setting) -> Result:
    chance = random.Random(task.seed)
    match task.kind:
        case "flood":
            flood(task, chance)
            return Result(task.kind, succeeded=True)
        case "clinging":
            cling(task, setting, chance)
            return Result(task.kind, succeeded=True)
        case "stranger":
            return fetch_as_stranger(task, setting, chance)
    with contextlib.ExitStack() as scope:
        sources = [Endpoint(HOST, port) for port in task.sources]
        if task.kind in ("cut", "corrupted", "slow"):
            proxies = [Proxy(source, faults_of(task.kind, setting.nbytes, chance)) for source in sources]
            if task.kind == "slow":
                del proxies[1:]
            sources = [scope.enter_context(proxy).endpoint for proxy in proxies] + sources[len(proxies) :]
        return fetch(task, setting, setting.access(task.listener), sources)


def fetch(task: Task, setting: Setting, access: Access, sources: Sequence[Endpoint]) -> Result:
    request = Request(IDENTITY, RankCoordinates(), setting.manifest)
    terms = FetchOptions(request, TIMEOUTS, access, verify=task.verify, wait_timeout=WAIT_TIMEOUT)
    client = Client(terms, (TcpTransport(),))
    try:
        fetched = client.fetch(sources)
    except SourcesExhausted as error:
        return Result(task.kind, failures=tuple(kind_of_failure(reason) for reason in error.reasons))
    failures = tuple(kind_of_failure(str(attempt)) for attempt in client.attempts)
    with contextlib.closing(fetched.memory):
        return Result(task.kind, succeeded=True, failures=failures, wrong=difference(fetched, setting.nbytes))


def difference(fetched: Fetched, nbytes: int) -> str:
    """How the bytes differ from those of the edition that they are said to be; nothing where they do not."""
    edition = fetched.attributes.get("edition")
    if not isinstance(edition, int):
        return f"the weights came with the edition {edition!r}"
    expected = numpy.frombuffer(contents(edition, nbytes), numpy.uint8)
    differing = numpy.flatnonzero(numpy.frombuffer(fetched.memory.contents()[:], numpy.uint8) != expected)
    if not differing.size:
        return ""
    return (
        f"WRONG BYTES: {differing.size} of edition {edition}, the first at {differing[0]}, the last at {differing[-1]}"
    )


def fetch_as_stranger(task: Task, setting: Setting, chance: random.Random) -> Result:
    """Succeeds if it gets nothing."""
    unfit = {
        "open": [setting.access("token"), setting.access("tls")],
        "token": [Access(), Access(secrets.token_bytes(32)), setting.access("tls")],
        "tls": [Access(), setting.access("token")],
    }
    access = chance.choice(unfit[task.listener])
    with contextlib.ExitStack() as scope:
        proxies = [Proxy(Endpoint(HOST, port), host=STRANGERS_HOST) for port in task.sources]
        result = fetch(task, setting, access, [scope.enter_context(proxy).endpoint for proxy in proxies])
    wrong = f"a stranger got weights from the listener {task.listener!r}" if result.succeeded else ""
    return Result(task.kind, succeeded=not result.succeeded, wrong=wrong)


def flood(task: Task, chance: random.Random) -> None:
    """Many connections at once that lead to nothing."""
    greeting = frame(Hello())
    sayings = (
        b"",
        greeting,
        greeting + frame(Inquire()) * 200,
        greeting + chance.randbytes(2000),
        chance.randbytes(2000),
        (1 << 30).to_bytes(4, "big") + chance.randbytes(2000),
    )
    with contextlib.ExitStack() as scope:
        for _ in range(FLOOD):
            with contextlib.suppress(OSError):
                address = (HOST, chance.choice(task.sources))
                connection = scope.enter_context(socket.create_connection(address, 1, (STRANGERS_HOST, 0)))
                connection.sendall(chance.choice(sayings))
        time.sleep(chance.uniform(0, 1))


def cling(task: Task, setting: Setting, chance: random.Random) -> None:
    """Sessions that lead to nothing; behind a listener that wants a token or TLS, not even they come about."""
    join = Join(IDENTITY, RankCoordinates(), setting.manifest.digest, (Offer("tcp"),))
    asking = frame(AskDigests(0, 1)) * 100
    sayings = (b"", asking, frame(Done()), frame(Leave("words without end, " * 200)), frame(Fetch(0, 1)), b"\0\0\xff")
    end = time.monotonic() + chance.uniform(1, 4)
    with contextlib.ExitStack() as scope:
        connections: list[socket.socket] = []
        for _ in range(CLINGING):
            with contextlib.suppress(OSError):
                address = (HOST, chance.choice(task.sources))
                connection = scope.enter_context(socket.create_connection(address, 1, (STRANGERS_HOST, 0)))
                connection.sendall(frame(Hello()) + frame(join))
                connection.setblocking(False)
                connections.append(connection)
        readers = set(connections[::2])
        while time.monotonic() < end:
            for connection in connections:
                with contextlib.suppress(OSError):
                    if connection in readers:
                        connection.recv(1 << 16)
                    connection.send(chance.choice(sayings))
            time.sleep(0.05)


@dataclass(frozen=True)
class Fault:
    """What happens on one connection; positions are counted in bytes from its beginning."""

    cut_after: int | None = None
    reset: bool = False
    corrupt_reply_at: int | None = None
    corrupt_request_at: int | None = None
    rate: int | None = None
    seconds: float = 3600.0


def faults_of(kind: Kind, nbytes: int, chance: random.Random) -> list[Fault]:
    """Those of the first connections; the later ones have none."""
    share = nbytes // CONNECTIONS
    match kind:
        case "cut":
            ends = [chance.randrange(share if chance.random() < 0.8 else 1000) for _ in range(chance.randint(1, 6))]
            return [Fault(cut_after=end, reset=chance.random() < 0.5) for end in ends]
        case "corrupted":
            places = [chance.randrange(UNFRAMED_FROM, UNFRAMED_FROM + share) for _ in range(chance.randint(1, 6))]
            return [
                Fault(corrupt_reply_at=place) if chance.random() < 0.8 else Fault(corrupt_request_at=place % 500)
                for place in places
            ]
        case _:
            return [Fault(rate=SLOW_RATE, seconds=SLOW_SECONDS)] * (1 + CONNECTIONS)


class Proxy:
    """Passes connections on to `target`, coming from `host`; the first ones suffer `faults`, one each."""

    def __init__(self, target: Endpoint, faults: Sequence[Fault] = (), host: str = FAULTY_HOST) -> None:
        self._target = target
        self._faults = iter(faults)
        self._host = host
        self._closed = threading.Event()
        self._listener = socket.create_server((HOST, 0), backlog=64)
        self._threads = [threading.Thread(target=self._accept, name="proxy")]

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        self._listener.close()
        for thread in self._threads[1:]:
            thread.join()

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(HOST, self._listener.getsockname()[1])

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            relay = threading.Thread(target=self._relay, args=(client, next(self._faults, Fault())), name="relay")
            self._threads.append(relay)
            relay.start()

    def _relay(self, client: socket.socket, fault: Fault) -> None:
        with contextlib.suppress(OSError), client:
            client.settimeout(2 * TIMEOUTS.stall)
            source = (self._host, 0)
            with socket.create_connection(self._target, TIMEOUTS.connect, source) as server:
                server.settimeout(2 * TIMEOUTS.stall)
                self._pass_on(client, server, fault)
                if fault.reset:
                    for each in (client, server):
                        each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)

    def _pass_on(self, client: socket.socket, server: socket.socket, fault: Fault) -> None:
        """Returns when both ends are through, or at the fault's end of the connection."""
        other, passed = {client: server, server: client}, {client: 0, server: 0}
        corrupt_at = {client: fault.corrupt_request_at, server: fault.corrupt_reply_at}
        speaking, end = [client, server], time.monotonic() + fault.seconds
        size = (64 << 10) if fault.rate is None else (16 << 10)
        while speaking and not self._closed.is_set() and time.monotonic() < end:
            for speaker in select.select(speaking, [], [], 0.1)[0]:
                data = bytearray(speaker.recv(size))
                if not data:
                    speaking.remove(speaker)
                    other[speaker].shutdown(socket.SHUT_WR)
                    continue
                begin = passed[speaker]
                passed[speaker] += len(data)
                place = corrupt_at[speaker]
                if place is not None and begin <= place < passed[speaker]:
                    data[place - begin] ^= 0x55
                if fault.rate is not None:
                    time.sleep(len(data) / fault.rate)
                if speaker is server and fault.cut_after is not None and passed[server] > fault.cut_after:
                    other[speaker].sendall(data[: fault.cut_after - begin])
                    return
                other[speaker].sendall(data)


def kind_of_failure(reason: str) -> str:
    """`reason` without its source and its numbers."""
    text = re.sub(r"\b[0-9a-f]{16,}\b|[0-9]+", "N", reason.partition(": ")[2])
    return text if len(text) <= 100 else f"{text[:100]}..."


def make_certificate(directory: Path) -> None:
    """Writes cert.pem and key.pem for a day; the certificate is its own authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "netloader")])
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now - day, now + day)
        .add_extension(x509.BasicConstraints(True, 0), critical=True)
        .sign(key, hashes.SHA256())
    )
    (directory / "cert.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
    (directory / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def _free_ports(count: int) -> list[int]:
    """Below those that Linux gives to outgoing connections, so that a server can have them again."""
    with contextlib.ExitStack() as probes:
        found: list[int] = []
        for port in random.sample(range(20000, 30000), 1000):
            with contextlib.suppress(OSError):
                probes.enter_context(socket.create_server((HOST, port)))
                found.append(port)
            if len(found) == count:
                return found
    raise SoakFailed(f"there are no {count} free ports from 20000 to 29999")


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
