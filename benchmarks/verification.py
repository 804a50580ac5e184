"""What it costs to verify weights while they arrive, and what the digests cost that could be used for it.

    python -m benchmarks.verification                  # 1 GB

Transfers: one server process and one client process, tcp, synthetic weights, each way in turn, `--rounds` times, in
another order each round. The time is that of the whole fetch, from connecting to the confirmation, as is the arena's:

    off            VERIFY off: nothing is checked
    on             VERIFY on: BLAKE3
    token, on      the same, with a token
    tls, off       TLS, VERIFY off
    tls, on        TLS, VERIFY on

The ratio is the median of the ratios to "off" of the same round. With `--memory-ahead` the pages of the arena are made
before the clock starts, so that nothing but the transfer is measured.

Digests: the candidates over `--digest-megabytes` of memory, a piece at a time as a transfer does it, by one thread and
by one for each CPU at once; the latter shows which of them let other Python threads run. The reference is a copy of the
same memory in the same pieces.

Absolute figures belong to the machine: quote the ratios.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import random
import secrets
import signal
import statistics
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy

from benchmarks.many_clients import (
    HOST,
    MEGABYTE,
    Child,
    Way,
    prepared_fetch,
    ratio_to,
    say,
    synthetic_arena,
    synthetic_publication,
)
from benchmarks.weight_phase import GIGABYTE, condition_memory
from tools.soak import make_certificate
from vllm_ascend.model_loader.netloader.server.requests import Settings
from vllm_ascend.model_loader.netloader.server.server import WeightServer
from vllm_ascend.model_loader.netloader.transport.digests import BLAKE3, PIECE_BYTES, start
from vllm_ascend.model_loader.netloader.transport.tcp import CONNECTIONS, TcpTransport
from vllm_ascend.model_loader.netloader.weights.arena import Arena
from vllm_ascend.model_loader.netloader.weights.manifest import chunks
from vllm_ascend.model_loader.netloader.wire.access import Access

OFF = "off"
MEMCPY = "memcpy"
WAYS = {
    OFF: ("open", False),
    "on": ("open", True),
    "token, on": ("token", True),
    "tls, off": ("tls", False),
    "tls, on": ("tls", True),
}
"""By name: the listener, and whether the client verifies."""
Digest = Callable[[memoryview], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000, help="of weights (default: 1000)")
    parser.add_argument("--digest-megabytes", type=int, default=256, help="for each thread (default: 256)")
    parser.add_argument("--memory-ahead", action="store_true", help="make the arena's pages before the clock starts")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    figures = {
        "bytes": options.megabytes * MEGABYTE,
        "connections": CONNECTIONS,
        "memory_ahead": options.memory_ahead,
        "seconds": transfers(options.megabytes * MEGABYTE, options.memory_ahead, options.rounds),
        "digest_bytes": options.digest_megabytes * MEGABYTE,
        "digest_seconds": digests(options.digest_megabytes * MEGABYTE, options.rounds),
    }
    print_table(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2))


def transfers(nbytes: int, memory_ahead: bool, rounds: int) -> dict[str, list[float]]:
    """Seconds by way and round."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    with contextlib.ExitStack() as running:
        scratch = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="verification-")))
        make_certificate(scratch)
        token = secrets.token_bytes(32)
        server = running.enter_context(Child(Server, nbytes, token, scratch))
        ports = server.do("ports")
        client = running.enter_context(Child(Client, nbytes, ports, token, scratch, memory_ahead))
        for round_number in range(1, rounds + 1):
            for way in random.Random(round_number).sample(list(WAYS), len(WAYS)):
                condition_memory(2 * nbytes)
                seconds[way].append(client.do(way))
                say(f"round {round_number}: {way} {seconds[way][-1]:.3f} s")
    return seconds


def accesses(token: bytes, certificate: Path) -> dict[str, Access]:
    """What the listeners want to see, by name."""
    pem, key = str(certificate / "cert.pem"), str(certificate / "key.pem")
    return {"open": Access(), "token": Access(token), "tls": Access.load(None, pem, key, pem)}


class Server:
    """The same pages behind each listener; the answer is their ports."""

    def __init__(self, nbytes: int, token: bytes, certificate: Path) -> None:
        arena = synthetic_arena(nbytes)
        self._servers: dict[str, WeightServer] = {}
        for name, access in accesses(token, certificate).items():
            server = self._servers[name] = WeightServer(HOST, 0, Settings((TcpTransport(),), access=access))
            server.start()
            server.publish(synthetic_publication(Arena.adopt(os.dup(arena.descriptor), nbytes)))

    def __call__(self, _: Any) -> dict[str, int]:
        return {name: server.port for name, server in self._servers.items()}


class Client:
    """Fetches by one of WAYS; the answer is how long it took."""

    def __init__(self, nbytes: int, ports: dict[str, int], token: bytes, certificate: Path, memory_ahead: bool) -> None:
        self._nbytes = nbytes
        self._ports = ports
        self._accesses = accesses(token, certificate)
        self._memory_ahead = memory_ahead

    def __call__(self, name: str) -> float:
        listener, verify = WAYS[name]
        way = Way(verify, self._memory_ahead)
        with prepared_fetch(self._nbytes, self._ports[listener], way, self._accesses[listener]) as fetch:
            begun = time.perf_counter()
            fetch()
            return time.perf_counter() - begun


def digests(nbytes: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds by digest, by "1 thread" and "all CPUs", and by round."""
    groups = {"1 thread": 1, "all CPUs": os.cpu_count() or 1}
    blocks = [memoryview(bytearray(random.Random(0).randbytes(MEGABYTE) * (nbytes // MEGABYTE)))]
    blocks += [memoryview(bytearray(blocks[0])) for _ in range(groups["all CPUs"] - 1)]
    seconds: dict[str, dict[str, list[float]]] = {}
    for _ in range(rounds):
        for name, make in candidates(nbytes).items():
            for group, threads in groups.items():
                took = seconds_of([make() for _ in range(threads)], blocks)
                seconds.setdefault(name, {}).setdefault(group, []).append(took)
    return seconds


def candidates(nbytes: int) -> dict[str, Callable[[], Digest]]:
    """What takes piece after piece; memcpy first."""
    found: dict[str, Callable[[], Digest]] = {
        MEMCPY: lambda: _Copy(nbytes),
        BLAKE3: lambda: start().update,
        "sha256": lambda: hashlib.sha256().update,
        "crc32": lambda: zlib.crc32,
    }
    if importlib.util.find_spec("xxhash"):
        import xxhash

        found["xxh3_128"] = lambda: xxhash.xxh3_128().update
    return found


class _Copy:
    """Copies into memory that exists, at another place for each piece."""

    def __init__(self, nbytes: int) -> None:
        self._target = numpy.ones(nbytes, numpy.uint8)
        self._offset = 0

    def __call__(self, piece: memoryview) -> None:
        numpy.copyto(self._target[self._offset : self._offset + piece.nbytes], numpy.frombuffer(piece, numpy.uint8))
        self._offset += piece.nbytes


def seconds_of(digests_of_threads: list[Digest], blocks: list[memoryview]) -> float:
    """From when the first thread begins until the last is through with its block."""
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


def print_table(figures: dict[str, Any]) -> None:
    nbytes, seconds = figures["bytes"], figures["seconds"]
    print(f"\nweights: {nbytes / MEGABYTE:.0f} MB, connections: {figures['connections']}, ", end="")
    print(f"medians of {len(seconds[OFF])} rounds, memory made {'ahead' if figures['memory_ahead'] else 'meanwhile'}\n")
    print(f"{'way':<14}{'seconds':>9}{'GB/s':>8}{'time / off':>13}")
    for way, times in seconds.items():
        median, ratio = statistics.median(times), ratio_to(seconds[OFF], times)
        print(f"{way:<14}{median:>9.3f}{nbytes / GIGABYTE / median:>8.2f}{ratio:>13.2f}")
    nbytes, seconds = figures["digest_bytes"], figures["digest_seconds"]
    groups = list(seconds[MEMCPY])
    print(f"\ndigests of {nbytes / MEGABYTE:.0f} MB for each thread: GB/s of a thread, and its share of memcpy's\n")
    print(f"{'digest':<14}" + "".join(f"{group:>12}{'/ memcpy':>11}" for group in groups))
    for digest, by_group in seconds.items():
        line = f"{digest:<14}"
        for group in groups:
            share = 1 / ratio_to(seconds[MEMCPY][group], by_group[group])
            line += f"{nbytes / GIGABYTE / statistics.median(by_group[group]):>12.2f}{share:>11.2f}"
        print(line)


if __name__ == "__main__":
    main()
