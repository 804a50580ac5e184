"""What servers and clients hold, and what is left of them: descriptors, threads, memory, processes, sockets, files."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Self

import msgspec
import pytest

from support.peers.strangers import Intruder, is_idle
from support.process import model
from support.sources import IDENTITY, SMALL, Tensors, client_for, fetch, serving
from support.wait import wait_until
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import SourcesExhausted
from vllm_ascend.model_loader.netloader.transport.base import Timeouts, Transport
from vllm_ascend.model_loader.netloader.transport.chunks.inventory import Chunk
from vllm_ascend.model_loader.netloader.transport.in_process import InProcessTransport
from vllm_ascend.model_loader.netloader.transport.registry import transports
from vllm_ascend.model_loader.netloader.weights.identity import RankCoordinates
from vllm_ascend.model_loader.netloader.wire.messages import Fetch, Join
from vllm_ascend.model_loader.netloader.wire.pacing import Pacer

pytestmark = pytest.mark.timeout(100)

MEBIBYTE = 1 << 20
PATIENT = Timeouts(connect=60.0, stall=60.0)
SESSIONS = 500


def held() -> tuple[int, int]:
    """Descriptors and threads of this process."""
    gc.collect()
    return len(os.listdir("/proc/self/fd")), threading.active_count()


def damage(_: Chunk, content: bytes) -> bytes:
    return bytes(len(content))


BY_TRANSPORT: dict[str, tuple[Transport, Transport]] = {
    "tcp": (transports(["tcp"])[0], transports(["tcp"])[0]),
    "in_process": (InProcessTransport(), InProcessTransport(damage)),
}
"""One that works and, where there is such a one, one that fails."""


@pytest.mark.parametrize(("working", "failing"), BY_TRANSPORT.values(), ids=BY_TRANSPORT.keys())
def test_descriptors_and_threads_return_after_hundreds_of_sessions(
    working: Transport, failing: Transport, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    other = SMALL.request(msgspec.structs.replace(IDENTITY, dtype="float16"))
    with serving(SMALL, (working,), timeouts=PATIENT) as (server, source):

        def run(number: int) -> None:
            match number % 10:
                case 0:
                    with pytest.raises(SourcesExhausted):
                        fetch(other, (working,), source)
                case 1:
                    vanish(source, working.name)
                case 2 if failing.name == "in_process":
                    with pytest.raises(SourcesExhausted):
                        fetch(SMALL, (failing,), source)
                case _:
                    fetch(SMALL, (working,), source, timeouts=PATIENT)[1].memory.close()

        for number in range(20):
            run(number)
        wait_until(lambda: is_idle(server))
        before = held()
        for number in range(SESSIONS):
            run(number)
        wait_until(lambda: is_idle(server))
        assert held() == before


def vanish(source: Endpoint, transport: str) -> None:
    """Takes a part, and is gone."""
    with Intruder(source).greet() as control:
        session = control.accepted(transport)
        if transport == "tcp":
            with Intruder(source).greet() as line:
                line.attach(session).say(Fetch(0, SMALL.manifest.nbytes)).read(1)
                line.reset()
        control.reset()


@contextlib.contextmanager
def free_descriptors(count: int) -> Iterator[None]:
    """Leaves this process no more than `count` further descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        for _ in range(count):
            os.close(taken.pop())
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in taken:
            os.close(descriptor)


@pytest.mark.parametrize("name", ["shared_memory", "tcp"])
def test_a_session_for_which_descriptors_run_out_leaves_none(name: str) -> None:
    (transport,) = transports([name])
    store, failures = SMALL.store(), 0
    assert store.bytes.nbytes == SMALL.manifest.nbytes  # mapped now, which takes a descriptor of the store's own
    before = held()
    for free in range(4):
        with free_descriptors(free):
            try:
                transport.sender(store, PATIENT, Pacer(None)).close()
            except OSError:
                failures += 1
        assert held() == before
    assert 0 < failures < 4
    store.close()


class Process:
    """A process that runs `support.process`, alone in its group."""

    def __init__(self, role: str, **options: object) -> None:
        arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "support.process", role, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            start_new_session=True,
            text=True,
        )
        self.pid = self._popen.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._popen.kill()
        self._popen.communicate()

    def hear(self) -> str:
        assert self._popen.stdout is not None
        line = self._popen.stdout.readline()
        assert line, f"the process ended: {self._popen.communicate()[1]}"
        return line.strip()

    def say(self) -> None:
        assert self._popen.stdin is not None
        self._popen.stdin.write("\n")
        self._popen.stdin.flush()

    def kill(self, kind: signal.Signals) -> None:
        self._popen.send_signal(kind)

    def assert_killed_by(self, kind: signal.Signals) -> None:
        """Whether it is gone, with whatever it may have started."""
        assert self._popen.wait(40) == -kind
        with pytest.raises(ProcessLookupError):
            os.killpg(self.pid, 0)

    @property
    def anonymous_bytes(self) -> int:
        """Memory that is its own and not that of an arena, which is a file."""
        lines = Path(f"/proc/{self.pid}/smaps_rollup").read_text().splitlines()
        (kibibytes,) = (int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))
        return kibibytes << 10

    @property
    def arenas(self) -> set[int]:
        """The files behind its arenas."""
        return {inode for pid, inode in open_arenas() if pid == self.pid}


def open_arenas() -> Iterator[tuple[int, int]]:
    """Process and inode of every arena that a process has open or mapped."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            for descriptor in (process / "fd").iterdir():
                if ARENA in os.readlink(descriptor):
                    yield int(process.name), os.stat(descriptor).st_ino
            for line in (process / "maps").read_text().splitlines():
                if ARENA in line:
                    yield int(process.name), int(line.split()[4])


ARENA = "memfd:netloader-arena"


class Peak:
    """The most that `process` held while this was entered, above what it held before."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._before = process.anonymous_bytes
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.growth = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self._look()

    def _look(self) -> None:
        self.growth = max(self.growth, self._process.anonymous_bytes - self._before)


def test_serving_eight_clients_takes_little_memory_beside_the_arena() -> None:
    with Process("serve", mebibytes=64) as server:
        port = server.hear()
        with Process("fetch", mebibytes=64, port=port, clients=8) as clients:
            assert clients.hear() == "ready"
            with Peak(server) as peak:
                clients.say()
                assert clients.hear() == "moving"
                assert clients.hear() == "8 done"
    assert peak.growth < 64 * MEBIBYTE


def test_fetching_takes_little_memory_beside_the_weights() -> None:
    with serving(model(64), transports(["tcp"]), timeouts=PATIENT) as (_, source):
        with Process("fetch", mebibytes=64, port=source.port) as client:
            assert client.hear() == "ready"
            with Peak(client) as peak:
                client.say()
                assert client.hear() == "moving"
                assert client.hear() == "1 done"
            assert len(client.arenas) == 1
    assert peak.growth < 128 * MEBIBYTE


SIGNALS = pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGKILL], ids=lambda kind: kind.name)
SLOWLY = 4 * MEBIBYTE
"""Bytes per second: a transfer of 32 MiB still has long to go when the first bytes have come."""


def sockets() -> set[str]:
    """Names of the Unix sockets of the transport."""
    names = (line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines())
    return {name.lstrip("@") for name in names if name.startswith("@netloader-")}


def joined_by_shared_memory(source: Endpoint, tensors: Tensors) -> tuple[Intruder, str]:
    """A client that does not fetch the descriptor, and the socket on which the server waits with it."""
    line = Intruder(source).greet()
    offer = transports(["shared_memory"])[0].offer()
    line.say(Join(IDENTITY, RankCoordinates(), tensors.manifest.digest, (offer,)))
    return line, line.hear()["parameters"]["socket"]


@SIGNALS
def test_a_server_that_is_killed_leaves_nothing_and_its_client_goes_on(kind: signal.Signals, tmp_path: Path) -> None:
    tensors = model(32)
    options = {"mebibytes": 32, "max_bandwidth": SLOWLY, "transport": "shared_memory,tcp"}
    with (
        serving(tensors, transports(["tcp"]), timeouts=PATIENT) as (_, second),
        Process("serve", addresses=tmp_path / "address-", **options) as server,
    ):
        first = Endpoint("127.0.0.1", int(server.hear()))
        waiting, name = joined_by_shared_memory(first, tensors)
        arenas = server.arenas
        assert name in sockets()
        assert len(arenas) == 1
        killed = threading.Event()

        def kill_at_the_first_bytes(nbytes: int) -> None:
            if nbytes and not killed.is_set():
                killed.set()
                server.kill(kind)

        client = client_for(tensors, transports(["tcp"]), timeouts=PATIENT, progress=kill_at_the_first_bytes)
        fetched = client.fetch([first, second])
        tensors.assert_in(fetched.memory)
        fetched.memory.close()
        assert fetched.source == second
        assert [attempt.source for attempt in client.attempts] == [str(first)]
        server.assert_killed_by(kind)
        waiting.hear_out()
        waiting.socket.close()
        wait_until(lambda: name not in sockets())
        wait_until(lambda: not arenas & {inode for _, inode in open_arenas()})
    assert [file.name for file in tmp_path.iterdir()] == ["address-0.txt"]


@SIGNALS
def test_a_client_that_is_killed_leaves_nothing_and_its_server_goes_on(
    kind: signal.Signals, caplog: pytest.LogCaptureFixture
) -> None:
    tensors, tcp = model(32), transports(["tcp"])
    with serving(tensors, tcp, timeouts=PATIENT, max_clients=1, max_bandwidth=SLOWLY) as (server, source):
        with Process("fetch", mebibytes=32, port=source.port) as client:
            assert client.hear() == "ready"
            client.say()
            assert client.hear() == "moving"
            arenas = client.arenas
            assert len(arenas) == 1
            client.kill(kind)
            client.assert_killed_by(kind)
            wait_until(lambda: is_idle(server))
            wait_until(lambda: not arenas & {inode for _, inode in open_arenas()})
        assert any("went away" in record.getMessage() for record in caplog.records)
        server.configure(replace(server.settings, max_bandwidth=None))
        fetched = fetch(tensors, tcp, source, timeouts=PATIENT)[1]
        tensors.assert_in(fetched.memory)
        fetched.memory.close()
