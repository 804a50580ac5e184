"""How long it takes many clients to fetch the same weights from one server at once, over tcp.

    python -m benchmarks.many_clients                  # 8 clients, 512 MB each
    python -m benchmarks.many_clients --clients 4 --megabytes 256

One server process holds synthetic weights; each client is a process of its own. All processes live as long as the
benchmark and do every measurement, in turn, `--rounds` times:

    raw sockets           each client has as many connections as the tcp transport; `sendfile` on the server's side and
                          `recv_into` on the client's, into memory that exists already
    raw, new memory       the same into a new memfd, which the kernel must fill with pages during the transfer
    tcp                   Netloader as it is: connecting, digests, the arena and its pages, the transfer, confirmation
    tcp, memory ahead     the same, but the pages of the arena are made before the clock starts
    tcp, VERIFY off       as it is, without digests

Everything that can be prepared is: the clients then wait for one another at a barrier. A measurement lasts from when
the first leaves it until the last client is done. The target for Netloader is a ratio of 1.3 at most, the median
of the ratios of each round, to raw sockets into memory of the same kind. A client that starts needs new memory, however
its weights arrive, and where all clients share one host, making it takes from what moves the bytes: so the ratios to
both kinds are printed.

Before each measurement as much memory as it needs is touched and freed, so that a virtual machine whose host gives it
memory only at first touch does not decide the outcome. Absolute figures belong to the machine: quote the ratios.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import mmap
import multiprocessing
import os
import random
import signal
import socket
import statistics
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

from benchmarks.weight_phase import GIGABYTE, condition_memory
from vllm_ascend.model_loader.netloader.client.fetch import Client
from vllm_ascend.model_loader.netloader.client.options import FetchOptions
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
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

HOST = "127.0.0.1"
MEGABYTE = 10**6
TARGET = 1.3
TENSOR_BYTES = 8 * MEGABYTE
BARRIER_TIMEOUT = 300.0
RAW = "raw sockets"
RAW_NEW = "raw, new memory"
IDENTITY = ModelIdentity(name="synthetic", architecture="Synthetic", config_digest="", dtype="uint8")
_RANGE = struct.Struct("!QQ")
_spawn = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Way:
    """How Netloader fetches in one measurement."""

    verify: bool = True
    memory_ahead: bool = False


WAYS = {
    "tcp": Way(),
    "tcp, memory ahead": Way(memory_ahead=True),
    "tcp, VERIFY off": Way(verify=False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--megabytes", type=int, default=512, help="of weights (default: 512)")
    parser.add_argument(
        "--max-clients", type=int, default=Settings.max_clients, help="MAX_CLIENTS of the server (default: 8)"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    figures = measure(options.megabytes * MEGABYTE, options.clients, options.max_clients, options.rounds)
    print_table(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2))


def measure(nbytes: int, number: int, max_clients: int, rounds: int) -> dict[str, Any]:
    """Seconds until all clients were done, and those of each client, by way and round."""
    seconds: dict[str, list[float]] = {}
    each: dict[str, list[list[float]]] = {}
    with contextlib.ExitStack() as running:
        server = running.enter_context(Child(Server, nbytes, max_clients))
        ports = server.do("ports")
        barrier = _spawn.Barrier(number)
        clients = [running.enter_context(Child(FetchingClient, nbytes, ports, barrier)) for _ in range(number)]
        for client in clients:
            client.do("wake up")
        for round_number in range(1, rounds + 1):
            for way in (RAW, RAW_NEW, *WAYS):
                condition_memory((number + 1) * nbytes)
                for client in clients:
                    client.ask(way)
                times = [client.answer() for client in clients]
                seconds.setdefault(way, []).append(max(end for _, end in times) - min(begin for begin, _ in times))
                each.setdefault(way, []).append([end - begin for begin, end in times])
                say(f"round {round_number}: {way} {seconds[way][-1]:.3f} s")
    return {
        "bytes": nbytes,
        "clients": number,
        "max_clients": max_clients,
        "connections": number * CONNECTIONS,
        "seconds": seconds,
        "client_seconds": each,
    }


def print_table(figures: dict[str, Any]) -> None:
    nbytes, number = figures["bytes"], figures["clients"]
    print(f"\nweights: {nbytes / MEGABYTE:.0f} MB, clients: {number}, connections: {figures['connections']}, ", end="")
    print(f"MAX_CLIENTS {figures['max_clients']}, medians of {len(figures['seconds'][RAW])} rounds\n")
    print(f"{'way':<20}{'all done':>10}{'GB/s':>8}{'time / raw':>12}{'/ raw, new':>12}", end="")
    print(f"{'first client':>15}{'last client':>14}")
    for way, seconds in figures["seconds"].items():
        median = statistics.median(seconds)
        first = statistics.median(min(times) for times in figures["client_seconds"][way])
        last = statistics.median(max(times) for times in figures["client_seconds"][way])
        speed = number * nbytes / GIGABYTE / median
        ratios = [ratio_to(figures["seconds"][reference], seconds) for reference in (RAW, RAW_NEW)]
        print(f"{way:<20}{median:>8.3f} s{speed:>8.2f}{ratios[0]:>12.2f}{ratios[1]:>12.2f}", end="")
        print(f"{first:>13.3f} s{last:>12.3f} s")
    print(f"\ntarget for tcp: at most {TARGET} times raw sockets into memory of the same kind")


def ratio_to(reference: list[float], seconds: list[float]) -> float:
    """The median over the rounds of how many times longer it took."""
    return statistics.median(ours / theirs for ours, theirs in zip(seconds, reference, strict=True))


class Child:
    """A process that makes `doer(*arguments)` and calls it with whatever it is asked; it ends with this process."""

    def __init__(self, doer: Callable[..., Callable[[Any], Any]], *arguments: Any) -> None:
        self._connection, theirs = _spawn.Pipe()
        self._process = _spawn.Process(target=_obey, args=(theirs, doer, arguments), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._process.join(2)
        self._process.kill()
        self._process.join()

    def ask(self, order: Any) -> None:
        self._connection.send(order)

    def answer(self) -> Any:
        """Raises RuntimeError where the process failed."""
        try:
            done, value = self._connection.recv()
        except EOFError:
            raise RuntimeError("a process of the benchmark ended; its error is above") from None
        if not done:
            raise RuntimeError(f"a process of the benchmark failed: {value}")
        return value

    def do(self, order: Any) -> Any:
        self.ask(order)
        return self.answer()


def _obey(connection: Connection, doer: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...]) -> None:
    do = doer(*arguments)
    with contextlib.suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        while True:
            order = connection.recv()
            try:
                connection.send((True, do(order)))
            except Exception as error:
                traceback.print_exc()
                connection.send((False, repr(error)))


def synthetic_manifest(nbytes: int) -> Manifest:
    places = enumerate(chunks(nbytes, TENSOR_BYTES))
    return Manifest(TensorSpec(f"w{number}", "uint8", (length,), (1,), offset) for number, (offset, length) in places)


def synthetic_arena(nbytes: int) -> Arena:
    """Sealed, with all its pages made."""
    arena, block = Arena.create(nbytes), random.Random(0).randbytes(MEGABYTE)
    with arena.writable() as data:
        for offset, length in chunks(nbytes, MEGABYTE):
            data[offset : offset + length] = block[:length]
    arena.seal()
    return arena


def synthetic_publication(arena: Arena) -> Publication:
    """All digests are made, as they are in an instance that runs for a while."""
    manifest = synthetic_manifest(arena.nbytes)
    digests = StoreDigests(arena.reader())
    digests.part(0, arena.nbytes)
    return Publication(IDENTITY, RankCoordinates(), WeightStore(manifest, arena, 1, digests=digests))


@contextlib.contextmanager
def prepared_fetch(nbytes: int, port: int, way: Way, access: Access | None = None) -> Iterator[Callable[[], Client]]:
    """A function that fetches synthetic weights once; what it fetched is freed in the end."""
    request = Request(IDENTITY, RankCoordinates(), synthetic_manifest(nbytes))
    client = Client(FetchOptions(request, Timeouts(), access or Access(), verify=way.verify), (TcpTransport(),))
    fetched = []

    def fetch() -> Client:
        fetched.append(client.fetch([Endpoint(HOST, port)]))
        return client

    if way.memory_ahead:
        client.memory_to_fill()
        for thread in threading.enumerate():
            if thread.name == "netloader-pages":
                thread.join()
    yield fetch
    for each in fetched:
        each.memory.close()
    fetched.clear()
    gc.collect()


class Server:
    """Serves synthetic weights by Netloader and by raw sockets, out of the same pages."""

    def __init__(self, nbytes: int, max_clients: int) -> None:
        arena = synthetic_arena(nbytes)
        self._listener = socket.create_server((HOST, 0), backlog=1024)
        threading.Thread(target=self._accept, args=(os.dup(arena.descriptor),), daemon=True).start()
        self._server = WeightServer(HOST, 0, Settings((TcpTransport(),), max_clients=max_clients))
        self._server.start()
        self._server.publish(synthetic_publication(arena))

    def __call__(self, _: Any) -> dict[str, int]:
        return {"netloader": self._server.port, "raw": self._listener.getsockname()[1]}

    def _accept(self, descriptor: int) -> None:
        while True:
            connection, _ = self._listener.accept()
            threading.Thread(target=_send_raw, args=(connection, descriptor), daemon=True).start()


def _send_raw(connection: socket.socket, descriptor: int) -> None:
    """The range that the peer asks for; nothing for one that closes instead."""
    with connection:
        request = connection.recv(_RANGE.size, socket.MSG_WAITALL)
        if len(request) == _RANGE.size:
            offset, end = _RANGE.unpack(request)
            while offset < end:
                offset += os.sendfile(connection.fileno(), descriptor, offset, end - offset)


class FetchingClient:
    """Does one measurement together with the others; the answer is when it began and when it was done."""

    def __init__(self, nbytes: int, ports: dict[str, int], barrier: Any) -> None:
        self._nbytes = nbytes
        self._ports = ports
        self._barrier = barrier

    def __call__(self, order: str) -> tuple[float, float]:
        if order == "wake up":
            return 0.0, 0.0
        way = WAYS.get(order)
        prepared = (
            prepared_raw(self._nbytes, self._ports["raw"], new_memory=order == RAW_NEW)
            if way is None
            else prepared_fetch(self._nbytes, self._ports["netloader"], way)
        )
        try:
            with prepared as run:
                self._barrier.wait(BARRIER_TIMEOUT)
                begun = time.monotonic()
                run()
                return begun, time.monotonic()
        except BaseException:
            self._barrier.abort()
            raise


@contextlib.contextmanager
def prepared_raw(nbytes: int, port: int, *, new_memory: bool) -> Iterator[Callable[[], None]]:
    """A function that fetches by raw sockets once: connections are made, and unless it is new, so is the memory."""
    memory = _new_memfd(nbytes)
    for offset in range(0, 0 if new_memory else nbytes, mmap.PAGESIZE):
        memory[offset] = 1
    bounds = [nbytes * part // CONNECTIONS for part in range(CONNECTIONS + 1)]
    with contextlib.ExitStack() as opened:
        opened.callback(memory.close)
        view = opened.enter_context(memoryview(memory))
        connections = [opened.enter_context(socket.create_connection((HOST, port))) for _ in range(CONNECTIONS)]
        failed: list[BaseException] = []

        def receive(part: int) -> None:
            try:
                _receive_raw(connections[part], view, bounds[part], bounds[part + 1])
            except BaseException as error:
                failed.append(error)

        def run() -> None:
            threads = [threading.Thread(target=receive, args=(part,)) for part in range(CONNECTIONS)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            if failed:
                raise failed[0]

        yield run


def _new_memfd(nbytes: int) -> mmap.mmap:
    """A mapping without pages, of what the arena is made of."""
    descriptor = os.memfd_create("raw-sockets")
    try:
        os.truncate(descriptor, nbytes)
        return mmap.mmap(descriptor, nbytes)
    finally:
        os.close(descriptor)


def _receive_raw(connection: socket.socket, memory: memoryview, begin: int, end: int) -> None:
    connection.sendall(_RANGE.pack(begin, end))
    while begin < end:
        with memory[begin:end] as rest:
            received = connection.recv_into(rest)
        if not received:
            raise ConnectionError("the raw server closed the connection")
        begin += received


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
