"""What requests for tokens feel of clients that fetch the weights from the same instance.

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
import signal
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.many_clients import HOST, MEGABYTE, Child, Server, say
from support.vllm.fetch_model import fetch_model
from support.vllm.instance import Instance
from tools.demo import progress
from vllm_ascend.model_loader.netloader.client.fetch import Client
from vllm_ascend.model_loader.netloader.client.inquiry import inquire
from vllm_ascend.model_loader.netloader.client.options import FetchOptions
from vllm_ascend.model_loader.netloader.config import LEAST_LIMIT
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
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
"""Below the length that `Instance` allows."""
PROBES = 3
TIMEOUT = 10.0
STREAM_TIMEOUT = 300.0


@dataclass(frozen=True)
class Case:
    """`address` is where `clients` fetch."""

    name: str
    clients: int
    address: str


@dataclass(frozen=True)
class Round:
    """`gaps` between events in seconds, `mean` of a token; bytes per second of all clients, and in transfers of one."""

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
    "mean ms": lambda each: each.mean,
    "p50 ms": lambda each: each.median,
    "p99 ms": lambda each: each.p99,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="a directory or a hub name; default: SmolLM2-135M-Instruct")
    parser.add_argument("--tokens", type=int, default=600, help="for each case and round (default: 600)")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4], metavar="N", help="default: 1 4")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--client-cpus", type=_cpus, default=(), help="such as 2,3; default: all")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    model = fetch_model(options.model)
    with contextlib.ExitStack() as running:
        directory = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="neighbours-")))
        pullers = [running.enter_context(Child(Puller, options.client_cpus)) for _ in range(max(options.clients))]
        with Streaming("uncapped", model, directory) as instance:
            instance.wait_until_ready(progress("without MAX_BANDWIDTH"))
            nbytes, link = probe(pullers[0], instance.address)
            with Child(OtherServer, nbytes, max(options.clients), options.client_cpus) as other:
                cases = [*cases_of(options.clients, instance.address, "")]
                cases += cases_of(options.clients, f"{HOST}:{other.do('ports')['netloader']}", ", another process")
                uncapped = measure(instance, [Case(IDLE, 0, ""), *cases], pullers, options.tokens, options.rounds)
        limit = max(int(link / 4), LEAST_LIMIT)
        with Streaming("capped", model, directory, {"MAX_BANDWIDTH": limit}) as instance:
            instance.wait_until_ready(progress("with MAX_BANDWIDTH"))
            _, paced = probe(pullers[0], instance.address)
            cases = cases_of(options.clients, instance.address, "")
            capped = measure(instance, [Case(IDLE, 0, ""), *cases], pullers, options.tokens, options.rounds)
    print(f"\n{model}: {nbytes / MEGABYTE:.0f} MB of weights, {options.tokens} tokens per case, ", end="")
    print(f"medians of {options.rounds} rounds; one client alone gets {link / MEGABYTE:.0f} MB/s")
    print_table("without MAX_BANDWIDTH", uncapped, None)
    print_table(f"MAX_BANDWIDTH {limit} ({limit / MEGABYTE:.0f} MB/s)", capped, limit)
    print(
        f"\nwithout requests, one client gets {paced / MEGABYTE:.0f} MB/s in transfer: {paced / limit:.3f} of the limit"
    )
    if options.json:
        figures = {"bytes": nbytes, "link": link, "max_bandwidth": limit, "paced_without_requests": paced}
        rounds = {"uncapped": as_json(uncapped), "capped": as_json(capped)}
        options.json.write_text(json.dumps({**figures, **rounds}, indent=2))


def cases_of(clients: Sequence[int], address: str, where: str) -> list[Case]:
    return [Case(f"{number} client{'s' if number > 1 else ''}{where}", number, address) for number in clients]


def probe(puller: Child, address: str) -> tuple[int, float]:
    """The size of the weights, and the bytes per second that one client gets when nobody else wants anything."""
    pulls = [puller.do(("pull once", address)) for _ in range(PROBES)]
    return pulls[0].nbytes, statistics.median(pull.nbytes / pull.seconds for pull in pulls)


def measure(instance: Streaming, cases: Sequence[Case], pullers: Sequence[Child], tokens: int, rounds: int) -> Rounds:
    found: Rounds = {case.name: [] for case in cases}
    instance.stream(min(tokens, 50))
    for number in range(1, rounds + 1):
        for case in cases:
            found[case.name].append(measure_case(instance, case, pullers[: case.clients], tokens))
            latest = found[case.name][-1]
            say(f"{instance.name}, round {number}: {case.name}, p50 {latest.median * 1e3:.1f} ms")
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


def print_table(title: str, rounds: Rounds, limit: int | None) -> None:
    print(f"\n{title}\n")
    limits = f"{'/ limit':>9}{'in transfer / limit':>21}" if limit is not None else ""
    times = "".join(f"{name:>9}{'/ idle':>8}" for name in STATISTICS)
    print(f"{'case':<28}{times}{'MB/s':>8}{limits}")
    for case, ours in rounds.items():
        line = f"{case:<28}"
        for statistic in STATISTICS.values():
            ratios = [statistic(each) / statistic(idle) for each, idle in zip(ours, rounds[IDLE], strict=True)]
            line += f"{statistics.median(map(statistic, ours)) * 1e3:>9.1f}{statistics.median(ratios):>8.2f}"
        bandwidth = statistics.median(each.bandwidth for each in ours)
        if bandwidth:
            line += f"{bandwidth / MEGABYTE:>8.0f}"
        if bandwidth and limit is not None:
            alone = statistics.median(each.bandwidth_in_transfer for each in ours)
            line += f"{bandwidth / limit:>9.3f}" + (f"{alone / limit:>21.3f}" if alone else "")
        print(line)


def as_json(rounds: Rounds) -> dict[str, Any]:
    return {case: [asdict(each) for each in of_case] for case, of_case in rounds.items()}


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
        """When something arrived: a token, or several at once."""
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
    """Bytes, and the time of their transfer; or all bytes so far, and when that was."""

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
        """Returns when bytes come."""
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
    """What `source` holds: it tells its manifest to whoever asks for another one."""
    holding = inquire(source, TIMEOUT).holdings[0]
    with greet(source, Access(), TIMEOUT) as channel:
        channel.send(Join(holding.identity, holding.coordinates, "unknown", (Offer("tcp"),)), TIMEOUT)
        refusal = channel.receive(Deadline(TIMEOUT))
    assert isinstance(refusal, Refuse)
    return Request(holding.identity, holding.coordinates, Manifest.decode(refusal.manifest))


class OtherServer(Server):
    """Serves synthetic weights on some CPUs."""

    def __init__(self, nbytes: int, max_clients: int, cpus: Sequence[int]) -> None:
        if cpus:
            os.sched_setaffinity(0, cpus)
        logging.getLogger("vllm_ascend").setLevel(logging.ERROR)  # each client is refused once, to get the manifest
        super().__init__(nbytes, max_clients)


def _cpus(text: str) -> tuple[int, ...]:
    return tuple(int(cpu) for cpu in text.split(","))


if __name__ == "__main__":
    main()
