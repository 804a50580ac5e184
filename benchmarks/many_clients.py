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

Everything that can be prepared is; the clients then wait for one another at a barrier. A measurement lasts from when
the first one leaves it until the last one is done. The target for Netloader is a ratio of at most 1.3 to raw sockets
into memory of the same kind, as the median of the ratios of each round. A client that starts needs new memory, however
its weights arrive, and where all clients share one host, making it takes processor time from what moves the bytes.
Therefore the ratios to both kinds are printed.

Before each measurement as much memory as it needs is touched and freed, so that a virtual machine whose host gives it
memory only at first touch does not decide the outcome. Absolute figures belong to the machine: quote the ratios.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import statistics
import time
from dataclasses import dataclass
from typing import Any

from benchmarks.harness.benchmark import Benchmark, progress
from benchmarks.harness.fetches import Way, digested_publication, prepared_fetch, synthetic_arena
from benchmarks.harness.memory import condition_memory, memory_file, touch
from benchmarks.harness.plot import REFERENCE, Bar, Panel
from benchmarks.harness.raw_sockets import HOST, RawServer, prepared_raw, send_file
from benchmarks.harness.tables import GIGABYTE, MEGABYTE, print_table, ratio_to, ratios_to
from support.child import Child
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.server.requests import Settings
from vllm_ascend.model_loader.netloader.server.server import WeightServer
from vllm_ascend.model_loader.netloader.transport.tcp import CONNECTIONS, TcpTransport

TARGET = 1.3
BARRIER_TIMEOUT = 300.0
RAW = "raw sockets"
RAW_NEW = "raw, new memory"
WAYS = {
    "tcp": Way(),
    "tcp, memory ahead": Way(memory_ahead=True),
    "tcp, VERIFY off": Way(verify=False),
}


@dataclass(frozen=True)
class Figures:
    """Seconds until all clients were done, and those of each client, by way and round."""

    bytes: int
    clients: int
    max_clients: int
    connections: int
    seconds: dict[str, list[float]]
    client_seconds: dict[str, list[list[float]]]


def add_options(parser: argparse.ArgumentParser) -> None:
    default = Settings.max_clients
    parser.add_argument("--clients", type=int, default=8, help="default: 8")
    parser.add_argument("--megabytes", type=int, default=512, help="of weights (default: 512)")
    parser.add_argument("--max-clients", type=int, default=default, help=f"MAX_CLIENTS of the server ({default})")


def measure(options: argparse.Namespace) -> Figures:
    nbytes, number = options.megabytes * MEGABYTE, options.clients
    seconds: dict[str, list[float]] = {way: [] for way in (RAW, RAW_NEW, *WAYS)}
    each: dict[str, list[list[float]]] = {way: [] for way in seconds}
    with contextlib.ExitStack() as running:
        server = running.enter_context(Child(Server, nbytes, options.max_clients, name="the server"))
        server.answer()
        ports, barrier = server.do("ports"), multiprocessing.get_context("spawn").Barrier(number)
        clients = [
            running.enter_context(Child(FetchingClient, nbytes, ports, barrier, name="a client")) for _ in range(number)
        ]
        for client in clients:
            client.answer()

        for round_number in range(1, options.rounds + 1):
            for way, so_far in seconds.items():
                condition_memory((number + 1) * nbytes)
                for client in clients:
                    client.ask(way)
                times = [client.answer() for client in clients]
                so_far.append(max(end for _, end in times) - min(begin for begin, _ in times))
                each[way].append([end - begin for begin, end in times])
                progress(f"round {round_number}: {way} {so_far[-1]:.3f} s")
    return Figures(nbytes, number, options.max_clients, number * CONNECTIONS, seconds, each)


class Server:
    """Serves synthetic weights by Netloader and by raw sockets, out of the same pages. The answer is the ports."""

    def __init__(self, nbytes: int, max_clients: int) -> None:
        arena = synthetic_arena(nbytes)
        self._raw = RawServer(send_file(os.dup(arena.descriptor)))
        self._server = WeightServer(HOST, 0, Settings((TcpTransport(),), max_clients=max_clients))
        self._server.start()
        self._server.publish(digested_publication(arena))

    def __call__(self, _: Any) -> dict[str, int]:
        return {"netloader": self._server.port, "raw": self._raw.port}


class FetchingClient:
    """Does one measurement together with the others. The answer is when it began and when it was done."""

    def __init__(self, nbytes: int, ports: dict[str, int], barrier: Any) -> None:
        self._nbytes = nbytes
        self._ports = ports
        self._barrier = barrier

    def __call__(self, order: str) -> tuple[float, float]:
        try:
            with self._prepared(order) as run:
                self._barrier.wait(BARRIER_TIMEOUT)
                begun = time.monotonic()
                run()
                return begun, time.monotonic()
        except BaseException:
            self._barrier.abort()
            raise

    def _prepared(self, order: str) -> Any:
        if order in WAYS:
            return prepared_fetch(self._nbytes, Endpoint(HOST, self._ports["netloader"]), WAYS[order])
        memory = memory_file(self._nbytes)
        if order == RAW:
            touch(memory)
        return prepared_raw(memory, self._ports["raw"])


def show(figures: Figures) -> None:
    print(f"\nweights: {figures.bytes / MEGABYTE:.0f} MB, clients: {figures.clients}, ", end="")
    print(f"connections: {figures.connections}, MAX_CLIENTS {figures.max_clients}, ", end="")
    print(f"medians of {len(figures.seconds[RAW])} rounds\n")
    rows = []
    for way, seconds in figures.seconds.items():
        median = statistics.median(seconds)
        rows.append(
            (
                way,
                f"{median:.3f} s",
                f"{figures.clients * figures.bytes / GIGABYTE / median:.2f}",
                *(f"{ratio_to(figures.seconds[reference], seconds):.2f}" for reference in (RAW, RAW_NEW)),
                *(f"{statistics.median(map(which, figures.client_seconds[way])):.3f} s" for which in (min, max)),
            )
        )
    print_table(("way", "all done", "GB/s", "time / raw", "/ raw, new", "first client", "last client"), rows)
    print(f"\ntarget for tcp: at most {TARGET} times raw sockets into memory of the same kind")


def panels(figures: Figures) -> list[Panel]:
    reference = figures.seconds[RAW_NEW]
    rows = {
        way: [
            Bar(
                ratios_to(reference, seconds),
                f"{ratio_to(reference, seconds):.2f}x, {statistics.median(seconds):.2f} s",
                REFERENCE if way in (RAW, RAW_NEW) else "Netloader",
            )
        ]
        for way, seconds in figures.seconds.items()
    }
    title = f"{figures.clients} clients that take {figures.bytes / MEGABYTE:.0f} MB each from one server"
    axis = f"time until all are done / raw sockets, new memory; median of {len(reference)} rounds, each a dot"
    return [Panel(title, axis, rows, reference=(TARGET, f"target for tcp: {TARGET}"))]


if __name__ == "__main__":
    Benchmark(__doc__, Figures, 5, measure, show, panels, add_options).run()
