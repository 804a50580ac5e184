"""What it costs to verify weights while they arrive, and what the digests cost that could be used for it.

    python -m benchmarks.verification                  # 1 GB

Transfers: one server process and one client process, tcp, synthetic weights. Each way is measured in turn, `--rounds`
times, in another order each round. The time is that of the whole fetch, from connecting to the confirmation, and
includes the making of the arena:

    off            VERIFY off: nothing is checked
    on             VERIFY on: BLAKE3
    token, on      the same, with a token
    tls, off       TLS, VERIFY off
    tls, on        TLS, VERIFY on

The ratio is the median of the ratios to "off" of the same round. With `--memory-ahead` the pages of the arena are made
before the clock starts, so that nothing but the transfer is measured.

Digests: the candidates over `--digest-megabytes` of memory, a piece at a time as a transfer does it, by one thread and
by one thread for each CPU at once; the latter shows which of them let other Python threads run. The reference is a copy
of the same memory in the same pieces.

Absolute figures belong to the machine: quote the ratios.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import random
import secrets
import statistics
import tempfile
import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from benchmarks.harness.benchmark import Benchmark, progress
from benchmarks.harness.fetches import Way, digested_publication, prepared_fetch, synthetic_arena
from benchmarks.harness.memory import condition_memory
from benchmarks.harness.plot import Bar, Panel
from benchmarks.harness.raw_sockets import HOST
from benchmarks.harness.tables import GIGABYTE, MEGABYTE, print_table, ratio_to, ratios_to
from support.certificates import Authority, Identification
from support.child import Child
from support.synthetic import shared
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.server.requests import Settings
from vllm_ascend.model_loader.netloader.server.server import WeightServer
from vllm_ascend.model_loader.netloader.transport.digests import BLAKE3, PIECE_BYTES, start
from vllm_ascend.model_loader.netloader.transport.tcp import CONNECTIONS, TcpTransport
from vllm_ascend.model_loader.netloader.weights.manifest import chunks
from vllm_ascend.model_loader.netloader.wire.access import Access

OFF = "off"
MEMCPY = "memcpy"
ONE_THREAD = "1 thread"
ALL_CPUS = "all CPUs"
WAYS = {
    OFF: ("open", False),
    "on": ("open", True),
    "token, on": ("token", True),
    "tls, off": ("tls", False),
    "tls, on": ("tls", True),
}
"""By name: the listener, and whether the client verifies."""
Digest = Callable[[memoryview], object]


@dataclass(frozen=True)
class Figures:
    """Seconds of fetches by way and round, and of digests by name, by ONE_THREAD or ALL_CPUS, and by round."""

    bytes: int
    connections: int
    memory_ahead: bool
    seconds: dict[str, list[float]]
    digest_bytes: int
    digest_seconds: dict[str, dict[str, list[float]]]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--megabytes", type=int, default=1000, help="of weights (default: 1000)")
    parser.add_argument("--digest-megabytes", type=int, default=256, help="for each thread (default: 256)")
    parser.add_argument("--memory-ahead", action="store_true", help="make the arena's pages before the clock starts")


def measure(options: argparse.Namespace) -> Figures:
    nbytes, digest_bytes = options.megabytes * MEGABYTE, options.digest_megabytes * MEGABYTE
    return Figures(
        bytes=nbytes,
        connections=CONNECTIONS,
        memory_ahead=options.memory_ahead,
        seconds=transfers(nbytes, options.memory_ahead, options.rounds),
        digest_bytes=digest_bytes,
        digest_seconds=digests(digest_bytes, options.rounds),
    )


def transfers(nbytes: int, memory_ahead: bool, rounds: int) -> dict[str, list[float]]:
    """Seconds by way and round."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    with contextlib.ExitStack() as running:
        scratch = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="verification-")))
        credentials = Credentials(secrets.token_bytes(32), Authority(scratch, "ours").identify("instance"))
        server = running.enter_context(Child(Server, nbytes, credentials, name="the server"))
        server.answer()
        client = Child(FetchingClient, nbytes, server.do("ports"), credentials, memory_ahead, name="the client")
        running.enter_context(client)
        client.answer()

        for round_number in range(1, rounds + 1):
            for way in random.Random(round_number).sample(list(WAYS), len(WAYS)):
                condition_memory(2 * nbytes)
                seconds[way].append(client.do(way))
                progress(f"round {round_number}: {way} {seconds[way][-1]:.3f} s")
    return seconds


@dataclass(frozen=True)
class Credentials:
    """What server and client show each other."""

    token: bytes
    identification: Identification

    def access(self) -> dict[str, Access]:
        """By listener."""
        return {"open": Access(), "token": Access(self.token), "tls": self.identification.access()}


class Server:
    """Serves the same pages behind each listener. The answer is their ports."""

    def __init__(self, nbytes: int, credentials: Credentials) -> None:
        arena = synthetic_arena(nbytes)
        self._servers: dict[str, WeightServer] = {}
        for name, access in credentials.access().items():
            server = self._servers[name] = WeightServer(HOST, 0, Settings((TcpTransport(),), access=access))
            server.start()
            server.publish(digested_publication(shared(arena)))

    def __call__(self, _: Any) -> dict[str, int]:
        return {name: server.port for name, server in self._servers.items()}


class FetchingClient:
    """Fetches by one of WAYS. The answer is how long it took."""

    def __init__(self, nbytes: int, ports: dict[str, int], credentials: Credentials, memory_ahead: bool) -> None:
        self._nbytes = nbytes
        self._ports = ports
        self._access = credentials.access()
        self._memory_ahead = memory_ahead

    def __call__(self, name: str) -> float:
        listener, verify = WAYS[name]
        source, way = Endpoint(HOST, self._ports[listener]), Way(verify, self._memory_ahead)
        with prepared_fetch(self._nbytes, source, way, self._access[listener]) as fetch:
            begun = time.perf_counter()
            fetch()
            return time.perf_counter() - begun


def digests(nbytes: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds by digest, by ONE_THREAD or ALL_CPUS, and by round."""
    groups = {ONE_THREAD: 1, ALL_CPUS: os.cpu_count() or 1}
    blocks = [memoryview(bytearray(random.Random(0).randbytes(MEGABYTE) * (nbytes // MEGABYTE)))]
    blocks += [memoryview(bytearray(blocks[0])) for _ in range(groups[ALL_CPUS] - 1)]
    seconds: dict[str, dict[str, list[float]]] = {}
    for _ in range(rounds):
        for name, make in candidates(nbytes).items():
            for group, threads in groups.items():
                took = seconds_of([make() for _ in range(threads)], blocks)
                seconds.setdefault(name, {}).setdefault(group, []).append(took)
    return seconds


def candidates(nbytes: int) -> dict[str, Callable[[], Digest]]:
    """What takes piece after piece; memcpy first."""
    return {
        MEMCPY: lambda: _Copy(nbytes),
        BLAKE3: lambda: start().update,
        "sha256": lambda: hashlib.sha256().update,
        "crc32": lambda: zlib.crc32,
    }


class _Copy:
    """Copies into memory that exists, to another place for each piece."""

    def __init__(self, nbytes: int) -> None:
        self._target = numpy.ones(nbytes, numpy.uint8)
        self._offset = 0

    def __call__(self, piece: memoryview) -> None:
        numpy.copyto(self._target[self._offset : self._offset + piece.nbytes], numpy.frombuffer(piece, numpy.uint8))
        self._offset += piece.nbytes


def seconds_of(digests_of_threads: list[Digest], blocks: list[memoryview]) -> float:
    """From when the first thread begins until the last one is through with its block."""
    together = threading.Barrier(len(digests_of_threads))
    times: list[float] = []

    def run(digest: Digest, block: memoryview) -> None:
        together.wait()
        times.append(time.perf_counter())
        for offset, length in chunks(block.nbytes, PIECE_BYTES):
            digest(block[offset : offset + length])
        times.append(time.perf_counter())

    threads = [threading.Thread(target=run, args=pair) for pair in zip(digests_of_threads, blocks, strict=False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return max(times) - min(times)


def show(figures: Figures) -> None:
    nbytes, seconds = figures.bytes, figures.seconds
    print(f"\nweights: {nbytes / MEGABYTE:.0f} MB, connections: {figures.connections}, ", end="")
    print(f"medians of {len(seconds[OFF])} rounds, memory made {'ahead' if figures.memory_ahead else 'meanwhile'}\n")
    medians = {way: statistics.median(times) for way, times in seconds.items()}
    print_table(
        ("way", "seconds", "GB/s", "time / off"),
        (
            (way, f"{median:.3f}", f"{nbytes / GIGABYTE / median:.2f}", f"{ratio_to(seconds[OFF], seconds[way]):.2f}")
            for way, median in medians.items()
        ),
    )

    print(f"\ndigests of {figures.digest_bytes / MEGABYTE:.0f} MB for each thread: ", end="")
    print("GB/s of a thread, and its share of memcpy's\n")
    rows = []
    for digest, by_group in figures.digest_seconds.items():
        row = [digest]
        for group in by_group:
            row.append(f"{statistics.median(speeds(figures, digest, group)):.2f}")
            row.append(f"{share_of_memcpy(figures, digest, group):.2f}")
        rows.append(row)
    print_table(("digest", ONE_THREAD, "/ memcpy", ALL_CPUS, "/ memcpy"), rows)


def speeds(figures: Figures, digest: str, group: str) -> list[float]:
    """GB/s of a thread, by round."""
    return [figures.digest_bytes / GIGABYTE / seconds for seconds in figures.digest_seconds[digest][group]]


def share_of_memcpy(figures: Figures, digest: str, group: str) -> float:
    return ratio_to(speeds(figures, MEMCPY, group), speeds(figures, digest, group))


def panels(figures: Figures) -> list[Panel]:
    off = figures.seconds[OFF]
    fetches = {
        way: [Bar(ratios_to(off, seconds), f"{ratio_to(off, seconds):.2f}x, {statistics.median(seconds):.2f} s")]
        for way, seconds in figures.seconds.items()
    }
    by_digest = {
        digest: [
            Bar(
                speeds(figures, digest, group),
                f"{share_of_memcpy(figures, digest, group):.2f}x memcpy",
                {ONE_THREAD: "one thread", ALL_CPUS: "each of one thread per CPU"}[group],
            )
            for group in by_group
        ]
        for digest, by_group in figures.digest_seconds.items()
    }
    rounds = f"median of {len(off)} rounds, each a dot"
    return [
        Panel(f"Fetching {figures.bytes / MEGABYTE:.0f} MB by tcp", f"time / VERIFY off; {rounds}", fetches),
        Panel("Making digests", f"GB/s of a thread; {rounds}", by_digest),
    ]


if __name__ == "__main__":
    Benchmark(__doc__, Figures, 7, measure, show, panels, add_options).run()
