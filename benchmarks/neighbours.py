"""How much requests for tokens are delayed by clients that fetch the weights from the same instance.

    python -m benchmarks.neighbours                        # SmolLM2-135M-Instruct
    python -m benchmarks.neighbours --model DIR --tokens 1000 --clients 1 8

A real `vllm serve` streams `--tokens` tokens for each case and round, greedily and past every end:

    idle                          nobody fetches
    1 client, 4 clients           so many processes fetch the weights by tcp, again and again
    the same, another process     they fetch as many bytes from a process that serves synthetic weights and does no
                                  inference

All of this happens on one host, so the clients and their half of the network take processor time from inference too,
which they would not from another host: they run only when no other process wants to (SCHED_IDLE), but the network's
half of the kernel's work comes with the bytes. The last cases show how much of the delay that is: what an instance pays
for serving is the difference. `--client-cpus` keeps clients and the other process on some CPUs; set
VLLM_CPU_OMP_THREADS_BIND in the environment for vLLM to keep off them.

Then the instance is started again with MAX_BANDWIDTH, a quarter of what one client gets in the same run without a limit
and without requests, and the cases are measured again, without another process.

The inter-token latency is the time from an event of the stream to the next, as a reader sees it, so that tokens which
are held up and then come together count as one long time and many short ones: the mean is that of all tokens from the
request on, whenever they came. Ratios are the medians over the rounds of the ratio to "idle" of the same instance and
round. Bytes per second are those of all clients together while tokens were streamed; in the pauses between two fetches
there are none, so "in transfer" leaves them out for a single client. Absolute figures belong to the machine: quote the
ratios.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import logging
import os
import statistics
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.benchmark import Benchmark, progress
from benchmarks.harness.fetches import digested_publication, synthetic_arena
from benchmarks.harness.plot import Bar, Panel
from benchmarks.harness.raw_sockets import HOST
from benchmarks.harness.tables import MEGABYTE, print_table, ratios_to
from support.child import Child
from support.vllm.fetch_model import fetch_model
from support.vllm.instance import Instance, telling
from vllm_ascend.model_loader.netloader.client.fetch import Client
from vllm_ascend.model_loader.netloader.client.inquiry import inquire
from vllm_ascend.model_loader.netloader.client.options import FetchOptions
from vllm_ascend.model_loader.netloader.config import LEAST_LIMIT
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.server.requests import Settings
from vllm_ascend.model_loader.netloader.server.server import WeightServer
from vllm_ascend.model_loader.netloader.transport.base import Timeouts
from vllm_ascend.model_loader.netloader.transport.store import Request
from vllm_ascend.model_loader.netloader.transport.tcp import TcpTransport
from vllm_ascend.model_loader.netloader.weights.manifest import Manifest
from vllm_ascend.model_loader.netloader.wire.access import Access
from vllm_ascend.model_loader.netloader.wire.channel import Deadline
from vllm_ascend.model_loader.netloader.wire.greeting import greet
from vllm_ascend.model_loader.netloader.wire.messages import Join, Offer, Refuse

IDLE = "idle"
PROMPT = "Once upon a time,"
TOKENS_PER_REQUEST = 400
"""Fewer than fit into the length of a sequence that `Instance` allows."""
PROBES = 3
TIMEOUT = 10.0
STREAM_TIMEOUT = 300.0


@dataclass(frozen=True)
class Case:
    """How many clients fetch, and the address from which they do."""

    name: str
    clients: int
    address: str


@dataclass(frozen=True)
class Round:
    """The `gaps` between events and the `mean` time of a token in seconds, and bytes per second.

    `bandwidth` is that of all clients together; `bandwidth_in_transfer` leaves out the pauses of a single client.
    """

    gaps: list[float]
    mean: float
    bandwidth: float
    bandwidth_in_transfer: float

    @property
    def median(self) -> float:
        return statistics.median(self.gaps)

    @property
    def p99(self) -> float:
        return statistics.quantiles(self.gaps, n=100)[98]


Rounds = dict[str, list[Round]]
STATISTICS: dict[str, Callable[[Round], float]] = {
    "mean": lambda each: each.mean,
    "p50": lambda each: each.median,
    "p99": lambda each: each.p99,
}


@dataclass(frozen=True)
class Figures:
    """All rounds of both instances; `link` and `paced_without_requests` are bytes per second that one client gets."""

    model: str
    tokens: int
    bytes: int
    link: float
    max_bandwidth: int
    paced_without_requests: float
    uncapped: Rounds
    capped: Rounds


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="", help="a directory or a hub name; default: SmolLM2-135M-Instruct")
    parser.add_argument("--tokens", type=int, default=600, help="for each case and round (default: 600)")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4], metavar="N", help="default: 1 4")
    parser.add_argument("--client-cpus", type=_cpus, default=(), help="such as 2,3; default: all")


def measure(options: argparse.Namespace) -> Figures:
    model, most = fetch_model(options.model), max(options.clients)
    with contextlib.ExitStack() as running:
        directory = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="neighbours-")))
        pullers = [running.enter_context(Child(Puller, options.client_cpus, name="a client")) for _ in range(most)]
        for puller in pullers:
            puller.answer()

        with Streaming("uncapped", model, directory) as instance:
            instance.wait_until_ready(telling("without MAX_BANDWIDTH"))
            nbytes, link = probe(pullers[0], instance.address)
            with Child(OtherServer, nbytes, most, options.client_cpus, name="another process") as other:
                other.answer()
                cases = cases_of(options.clients, instance.address, "")
                cases += cases_of(options.clients, f"{HOST}:{other.do('port')}", ", another process")
                uncapped = measure_all(instance, cases, pullers, options.tokens, options.rounds)

        limit = max(int(link / 4), LEAST_LIMIT)
        with Streaming("capped", model, directory, {"MAX_BANDWIDTH": limit}) as instance:
            instance.wait_until_ready(telling("with MAX_BANDWIDTH"))
            _, paced = probe(pullers[0], instance.address)
            cases = cases_of(options.clients, instance.address, "")
            capped = measure_all(instance, cases, pullers, options.tokens, options.rounds)
    return Figures(Path(model).name, options.tokens, nbytes, link, limit, paced, uncapped, capped)


def cases_of(clients: Sequence[int], address: str, where: str) -> list[Case]:
    return [Case(f"{number} client{'s' if number > 1 else ''}{where}", number, address) for number in clients]


def probe(puller: Child, address: str) -> tuple[int, float]:
    """The size of the weights, and the bytes per second that one client gets when nobody else wants anything."""
    pulls = [puller.do(("pull once", address)) for _ in range(PROBES)]
    return pulls[0].nbytes, statistics.median(pull.nbytes / pull.seconds for pull in pulls)


def measure_all(
    instance: Streaming, cases: Sequence[Case], pullers: Sequence[Child], tokens: int, rounds: int
) -> Rounds:
    """Measures the cases and, first of all, IDLE."""
    cases = [Case(IDLE, 0, ""), *cases]
    found: Rounds = {case.name: [] for case in cases}
    instance.stream(min(tokens, 50))
    for number in range(1, rounds + 1):
        for case in cases:
            found[case.name].append(measure_case(instance, case, pullers[: case.clients], tokens))
            latest = found[case.name][-1]
            progress(f"{instance.name}, round {number}: {case.name}, p50 {latest.median * 1e3:.1f} ms")
    return found


def measure_case(instance: Streaming, case: Case, pullers: Sequence[Child], tokens: int) -> Round:
    for puller in pullers:
        puller.ask(("start", case.address))
    for puller in pullers:
        puller.answer()
    before = [puller.do(("count", "")) for puller in pullers]
    gaps, mean = instance.stream(tokens)
    after = [puller.do(("count", "")) for puller in pullers]
    for puller in pullers:
        puller.ask(("stop", ""))
    pulls = [pull for puller in pullers for pull in puller.answer()]
    bandwidth = sum(
        (now.nbytes - then.nbytes) / (now.seconds - then.seconds) for then, now in zip(before, after, strict=True)
    )
    alone = statistics.median(pull.nbytes / pull.seconds for pull in pulls) if case.clients == 1 else 0.0
    return Round(gaps, mean, bandwidth, alone)


class Streaming(Instance):
    """An instance that is asked for tokens one by one."""

    def stream(self, tokens: int) -> tuple[list[float], float]:
        """Seconds from each event to the next of the same request, and the mean of a token, the first ones included."""
        gaps: list[float] = []
        seconds, left = 0.0, tokens
        while left:
            begun, times = time.perf_counter(), self._event_times(min(left, TOKENS_PER_REQUEST))
            gaps += (later - earlier for earlier, later in itertools.pairwise(times))
            seconds += times[-1] - begun
            left -= min(left, TOKENS_PER_REQUEST)
        return gaps, seconds / tokens

    def _event_times(self, tokens: int) -> list[float]:
        """The times at which something arrived: a token, or several at once."""
        body = {
            "model": "model",
            "prompt": PROMPT,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._port}/v1/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        times: list[float] = []
        arrived = 0
        with urllib.request.urlopen(request, timeout=STREAM_TIMEOUT) as response:
            for line in response:
                now = time.perf_counter()
                if line.startswith(b"data: {"):
                    by_now = json.loads(line.removeprefix(b"data: "))["usage"]["completion_tokens"]
                    if by_now > arrived:
                        times.append(now)
                    arrived = by_now
        if arrived != tokens:
            raise RuntimeError(f"{self.name} streamed {arrived} tokens instead of {tokens}:\n{self.log_tail()}")
        return times


@dataclass(frozen=True)
class Pulled:
    """Bytes, and the seconds of their transfer; or all bytes so far, and when they were counted."""

    nbytes: int
    seconds: float


class Puller:
    """Fetches the weights of an address once, or again and again until it is stopped. For a process of its own."""

    def __init__(self, cpus: Sequence[int]) -> None:
        if cpus:
            os.sched_setaffinity(0, cpus)
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        self._lock = threading.Lock()
        self._nbytes = 0
        self._begun = threading.Event()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._pulls: list[Pulled] = []
        self._failure: Exception | None = None

    def __call__(self, order: tuple[str, str]) -> Any:
        match order:
            case ("pull once", address):
                return self._pull(Endpoint.parse(address), request_of(Endpoint.parse(address)))
            case ("start", address):
                return self._start(Endpoint.parse(address))
            case ("stop", _):
                return self._end()
        if self._failure is not None:
            raise self._failure
        return Pulled(self._nbytes, time.monotonic())

    def _start(self, source: Endpoint) -> None:
        """Begins to fetch again and again, and returns when the first bytes arrive."""
        self._pulls, self._failure = [], None
        self._begun.clear()
        self._stop.clear()
        self._thread = threading.Thread(target=self._pull_on, args=(source, request_of(source)), daemon=True)
        self._thread.start()
        self._begun.wait()

    def _end(self) -> list[Pulled]:
        assert self._thread is not None
        self._stop.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        return self._pulls

    def _pull_on(self, source: Endpoint, request: Request) -> None:
        try:
            while not self._stop.is_set():
                self._pulls.append(self._pull(source, request))
        except Exception as error:
            self._failure = error
        finally:
            self._begun.set()

    def _pull(self, source: Endpoint, request: Request) -> Pulled:
        client = Client(FetchOptions(request, Timeouts(), progress=self._note), (TcpTransport(),))
        client.fetch([source]).memory.close()
        gc.collect()
        return Pulled(request.manifest.nbytes, client.phases.seconds["transfer"])

    def _note(self, nbytes: int) -> None:
        with self._lock:
            self._nbytes += nbytes
        if nbytes:
            self._begun.set()


def request_of(source: Endpoint) -> Request:
    """A request for what `source` holds, which tells its manifest to whoever asks for another one."""
    holding = inquire(source, TIMEOUT).holdings[0]
    with greet(source, Access(), TIMEOUT) as channel:
        channel.send(Join(holding.identity, holding.coordinates, "unknown", (Offer("tcp"),)), TIMEOUT)
        refusal = channel.receive(Deadline(TIMEOUT))
    assert isinstance(refusal, Refuse)
    return Request(holding.identity, holding.coordinates, Manifest.decode(refusal.manifest))


class OtherServer:
    """Serves synthetic weights on some CPUs. The answer is the port."""

    def __init__(self, nbytes: int, max_clients: int, cpus: Sequence[int]) -> None:
        if cpus:
            os.sched_setaffinity(0, cpus)
        logging.getLogger("vllm_ascend").setLevel(logging.ERROR)  # each client is refused once, to get the manifest
        self._server = WeightServer(HOST, 0, Settings((TcpTransport(),), max_clients=max_clients))
        self._server.start()
        self._server.publish(digested_publication(synthetic_arena(nbytes)))

    def __call__(self, _: Any) -> int:
        return self._server.port


def _cpus(text: str) -> tuple[int, ...]:
    return tuple(int(cpu) for cpu in text.split(","))


def ratios_to_idle(rounds: Rounds, case: str, statistic: Callable[[Round], float]) -> list[float]:
    return ratios_to([statistic(each) for each in rounds[IDLE]], [statistic(each) for each in rounds[case]])


def show(figures: Figures) -> None:
    limit, rounds = figures.max_bandwidth, len(figures.capped[IDLE])
    print(
        f"\n{figures.model}: {figures.bytes / MEGABYTE:.0f} MB of weights, {figures.tokens} tokens per case, ", end=""
    )
    print(f"medians of {rounds} rounds; one client alone gets {figures.link / MEGABYTE:.0f} MB/s")
    print("\nwithout MAX_BANDWIDTH\n")
    show_rounds(figures.uncapped, None)
    print(f"\nMAX_BANDWIDTH {limit} ({limit / MEGABYTE:.0f} MB/s)\n")
    show_rounds(figures.capped, limit)
    paced = figures.paced_without_requests
    print(
        f"\nwithout requests, one client gets {paced / MEGABYTE:.0f} MB/s in transfer: {paced / limit:.3f} of the limit"
    )


def show_rounds(rounds: Rounds, limit: int | None) -> None:
    """Prints a table of one instance; with its `limit`, also how much of that was used."""
    header = ["case", *(cell for name in STATISTICS for cell in (f"{name} ms", "/ idle")), "MB/s"]
    rows = []
    for case, ours in rounds.items():
        row = [case]
        for statistic in STATISTICS.values():
            row.append(f"{statistics.median(map(statistic, ours)) * 1e3:.1f}")
            row.append(f"{statistics.median(ratios_to_idle(rounds, case, statistic)):.2f}")
        bandwidth = statistics.median(each.bandwidth for each in ours)
        row.append(f"{bandwidth / MEGABYTE:.0f}" if bandwidth else "")
        if limit is not None:
            alone = statistics.median(each.bandwidth_in_transfer for each in ours)
            row += [f"{share / limit:.3f}" if share else "" for share in (bandwidth, alone)]
        rows.append(row)
    print_table(header if limit is None else [*header, "/ limit", "in transfer / limit"], rows)


def panels(figures: Figures) -> list[Panel]:
    def rows(rounds: Rounds) -> dict[str, list[Bar]]:
        return {
            case: [bar(ratios_to_idle(rounds, case, statistic), name) for name, statistic in STATISTICS.items()]
            for case in rounds
            if case != IDLE
        }

    def bar(ratios: list[float], name: str) -> Bar:
        return Bar(ratios, f"{statistics.median(ratios):.2f}x", name)

    axis = f"inter-token latency / idle; median of {len(figures.capped[IDLE])} rounds, each a dot"
    limit = f"MAX_BANDWIDTH {figures.max_bandwidth / MEGABYTE:.0f} MB/s"
    idle = (1.0, "idle")
    return [
        Panel("While clients fetch from the instance", axis, rows(figures.uncapped), reference=idle),
        Panel(f"The same with {limit}", axis, rows(figures.capped), reference=idle),
    ]


if __name__ == "__main__":
    Benchmark(__doc__, Figures, 3, measure, show, panels, add_options).run()
