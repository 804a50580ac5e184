"""How long it takes to fill a model with its weights, by every way there is, in one run on one model.

    python -m benchmarks.weight_phase                 # a random model of 3 GB, made on the spot
    python -m benchmarks.weight_phase --model DIR     # a checkpoint of yours

Everything is measured `--rounds` times, in turn, each time in fresh processes; the median counts:

    disk            vLLM's default loader; the files are in the page cache
    gloo per tensor one blocking send and receive for each tensor, into new memory: how weights were moved between
                    vLLM instances before
    raw sockets     as many connections as the tcp transport has, `sendall` on one side and `recv_into` on the other,
                    once into memory that exists and once into new memory
    shared_memory, tcp, process_group    Netloader, from connecting to the model's parameters in place

Before each measurement as much memory as it needs is touched and freed, so that a virtual machine whose host gives it
memory only at first touch does not decide the outcome. Absolute figures belong to the machine: quote the ratios.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.benchmark import Benchmark, progress
from benchmarks.harness.memory import anonymous_memory, condition_memory, touch
from benchmarks.harness.plot import REFERENCE, Bar, Panel
from benchmarks.harness.raw_sockets import MemorySender, prepared_raw
from benchmarks.harness.tables import GIGABYTE, print_table
from support.child import Child
from support.vllm.loaders import ROOT, Loader, Pool
from support.vllm.random_model import LARGE, make_random_model
from vllm_ascend.model_loader.netloader.traits import NAMES as TRANSPORTS
from vllm_ascend.model_loader.netloader.transport.tcp import CONNECTIONS

DISK = "disk"
GLOO = "gloo per tensor"
RAW = "raw sockets"
RAW_NEW = "raw sockets, new memory"
LOAD_TIMEOUT = 3600.0
"""Seconds; the model may be large, and its files not in the page cache yet."""
REFERENCES = (DISK, GLOO, RAW, RAW_NEW)
_spawn = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Figures:
    """Seconds by way and round, and the private memory that the weight phase added to a process."""

    bytes: int
    connections: int
    seconds: dict[str, list[float]]
    client_private_bytes: dict[str, int]
    server_private_bytes: int


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, help="a checkpoint directory; default: a random model of 3 GB")


def measure(options: argparse.Namespace) -> Figures:
    model = options.model or make_random_model(ROOT / ".models" / "random-3gb", LARGE)
    with loaded(model, {"TRANSPORT": list(TRANSPORTS)}) as server:
        return measure_against(server, model, options.rounds)


def measure_against(server: Loader, model: Path, rounds: int) -> Figures:
    """`server` has loaded the model and serves it."""
    nbytes = server.result["parameter_bytes"]
    private: dict[str, int] = {}

    def netloader(transport: str) -> float:
        extra = {"SOURCE": [server.address], "TRANSPORT": [transport], "FALLBACK": "error", "CONNECT_TIMEOUT": 60}
        with loaded(model, extra) as client:
            private[transport] = client.result["private_bytes"]
            return float(client.result["weight_seconds"])

    def disk() -> float:
        with loaded(model, load_format="auto") as client:
            return float(client.result["weight_seconds"])

    ways: dict[str, Callable[[], float]] = {
        DISK: disk,
        GLOO: lambda: gloo_per_tensor(model),
        RAW: lambda: raw_sockets(nbytes, new_memory=False),
        RAW_NEW: lambda: raw_sockets(nbytes, new_memory=True),
        **{transport: functools.partial(netloader, transport) for transport in TRANSPORTS},
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(1, rounds + 1):
        for way, run in ways.items():
            condition_memory(2 * nbytes)
            seconds[way].append(run())
            progress(f"round {number}: {way} {seconds[way][-1]:.3f} s")
    return Figures(nbytes, CONNECTIONS, seconds, private, server.result["private_bytes"])


@contextlib.contextmanager
def loaded(model: Path, extra: dict[str, Any] | None = None, **request: Any) -> Iterator[Loader]:
    """A process of its own that has loaded `model`, and serves it until the end of the `with` block."""
    with tempfile.TemporaryDirectory(prefix="weight-phase-") as scratch:
        pool = Pool(Path(scratch), load_timeout=LOAD_TIMEOUT)
        try:
            yield pool.load(str(model), extra, digests=False, **request).finish_loading()
        finally:
            pool.end()


def raw_sockets(nbytes: int, *, new_memory: bool) -> float:
    """Seconds to move `nbytes` over CONNECTIONS loopback connections between two processes."""
    memory = anonymous_memory(nbytes)
    if not new_memory:
        touch(memory)
    with Child(MemorySender, nbytes, name="the sender") as sender:
        sender.answer()
        with prepared_raw(memory, sender.do("port")) as run:
            begun = time.perf_counter()
            run()
            return time.perf_counter() - begun


def gloo_per_tensor(model: Path) -> float:
    """Seconds to send every tensor of the checkpoint by itself between two processes."""
    results = _spawn.Queue()
    with tempfile.TemporaryDirectory() as store:
        ranks = [_spawn.Process(target=_gloo_rank, args=(rank, store, str(model), results)) for rank in (0, 1)]
        for rank in ranks:
            rank.start()
        seconds: float = results.get(timeout=600)
        for rank in ranks:
            rank.join()
    return seconds


def _gloo_rank(rank: int, store: str, model: str, results: Any) -> None:
    import torch
    from safetensors import safe_open
    from torch import distributed

    distributed.init_process_group("gloo", init_method=f"file://{store}/store", rank=rank, world_size=2)
    tensors = []
    for file in sorted(Path(model).glob("*.safetensors")):
        with safe_open(file, framework="pt") as checkpoint:
            for name in checkpoint.keys():  # noqa: SIM118 - not a mapping
                tensor = checkpoint.get_tensor(name)
                tensors.append(tensor.clone() if rank == 0 else torch.empty_like(tensor))
                del tensor

    distributed.barrier()
    begun = time.perf_counter()
    for tensor in tensors:
        if rank == 0:
            distributed.send(tensor, 1)
        else:
            distributed.recv(tensor, 0)
    if rank == 1:
        results.put(time.perf_counter() - begun)

    distributed.barrier()
    distributed.destroy_process_group()


def show(figures: Figures) -> None:
    nbytes = figures.bytes
    medians = {way: statistics.median(values) for way, values in figures.seconds.items()}
    print(f"\nweights: {nbytes / GIGABYTE:.2f} GB, connections: {figures.connections}, median of each way\n")
    print_table(
        ("way", "seconds", "GB/s", "x disk", "x gloo", "x raw", "x raw new"),
        (
            (
                way,
                f"{median:.3f}",
                f"{nbytes / GIGABYTE / median:.2f}",
                *(f"{medians[reference] / median:.2f}" for reference in REFERENCES),
            )
            for way, median in medians.items()
        ),
    )
    print("\nprivate memory added by the weight phase, as a share of the weights:")
    print(f"  server, from disk into the arena  {figures.server_private_bytes / nbytes:7.2%}  (the arena exists once)")
    for transport, private in figures.client_private_bytes.items():
        print(f"  client, {transport:<24}  {private / nbytes:7.2%}")


def panels(figures: Figures) -> list[Panel]:
    medians = {way: statistics.median(values) for way, values in figures.seconds.items()}
    rows = {
        way: [
            Bar(
                values,
                f"{medians[way]:.2f} s, {medians[DISK] / medians[way]:.2g}x disk",
                REFERENCE if way in REFERENCES else "Netloader",
            )
        ]
        for way, values in figures.seconds.items()
    }
    title = f"Filling a model with {figures.bytes / GIGABYTE:.2f} GB of weights"
    axis = f"seconds; median of {len(figures.seconds[DISK])} rounds, each a dot"
    return [Panel(title, axis, rows)]


if __name__ == "__main__":
    Benchmark(__doc__, Figures, 3, measure, show, panels, add_options).run()
