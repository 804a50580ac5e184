"""What it costs to serve weights that post-processing has rearranged, compared with weights as they were loaded.

    python -m benchmarks.inverses                  # on the CPU
    source tools/npu_sim.sh; python -m benchmarks.inverses --device npu

Stacks of int8 matrices are served as they are, transposed, in FRACTAL_NZ, and both, in turn, `--rounds` times. For each
arrangement:

    to a bucket    all chunks are brought to where a process group sends from
    to the host    all chunks are read as tcp, and the digests, read them
    tcp            a client in the same process fetches everything and verifies it

The ratio is the median of the ratios to "as it is" of the same round. What is as it is needs no bucket; there it is
copied once, so that there is something to compare with.

The figures are those of a processor that turns matrices round. On the simulated NPU that is the same processor. They
show how the work grows with what is served, and that a part of a matrix costs a part of the work. How fast a device
turns matrices round, they do not show; the copies that remain, to the host and over the network, are usually slower.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.harness.benchmark import Benchmark, progress
from benchmarks.harness.plot import Bar, Panel
from benchmarks.harness.tables import MEGABYTE, print_table, ratio_to, ratios_to
from support.arrangements import ARRANGED
from vllm_ascend.model_loader.netloader.client.fetch import Client
from vllm_ascend.model_loader.netloader.client.options import FetchOptions
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.model.live import LiveMemory
from vllm_ascend.model_loader.netloader.model.weights import LiveWeights
from vllm_ascend.model_loader.netloader.server.publications import Publication
from vllm_ascend.model_loader.netloader.server.requests import Settings
from vllm_ascend.model_loader.netloader.server.server import WeightServer
from vllm_ascend.model_loader.netloader.transport.base import Timeouts
from vllm_ascend.model_loader.netloader.transport.digests import CHUNK_BYTES, StoreDigests
from vllm_ascend.model_loader.netloader.transport.store import Request, WeightStore
from vllm_ascend.model_loader.netloader.transport.tcp import TcpTransport
from vllm_ascend.model_loader.netloader.weights.identity import ModelIdentity, RankCoordinates
from vllm_ascend.model_loader.netloader.weights.manifest import chunks
from vllm_ascend.model_loader.netloader.wire.access import Access

STACK = 8, 1536, 4096
"""Matrices of which each has the size of a large expert."""
REFERENCE = "as it is"
BUCKET, HOST, TCP = "to a bucket", "to the host", "tcp"
HOST_ADDRESS = "127.0.0.1"
IDENTITY = ModelIdentity(name="rearranged", architecture="Stacks", config_digest="", dtype="int8")


@dataclass(frozen=True)
class Figures:
    """Seconds to serve `bytes` on `device`: by arrangement, by what is done with them, and by round."""

    bytes: int
    device: str
    seconds: dict[str, dict[str, list[float]]]


class Stacks(nn.Module):
    """Stacks of matrices with random values."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        super().__init__()
        for number in range(max(nbytes // torch.Size(STACK).numel(), 1)):
            values = torch.randint(-128, 128, STACK, dtype=torch.int8)
            self.register_parameter(f"w{number}", nn.Parameter(values.to(device), requires_grad=False))


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--megabytes", type=int, default=200, help="default: 200")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="default: cpu")


def measure(options: argparse.Namespace) -> Figures:
    seconds: dict[str, dict[str, list[float]]] = {name: {BUCKET: [], HOST: [], TCP: []} for name in ARRANGED}
    nbytes = 0
    for number in range(options.rounds):
        for name, arrange in ARRANGED.items():
            store = served(options.megabytes * MEGABYTE, options.device, arrange)
            nbytes = store.manifest.nbytes
            for what, run in {BUCKET: to_buckets, HOST: to_host, TCP: by_tcp}.items():
                begun = time.perf_counter()
                run(store)
                seconds[name][what].append(time.perf_counter() - begun)
            store.close()
            gc.collect()
        progress(f"round {number + 1} of {options.rounds}")
    return Figures(nbytes, str(options.device), seconds)


def served(nbytes: int, device: torch.device, arrange: Callable[[torch.Tensor], torch.Tensor]) -> WeightStore:
    """The weights of a model that `arrange` has processed, proven to be what they were."""
    model = Stacks(nbytes, device)
    weights = LiveWeights(model, device)
    memory = weights.allocate()
    memory.seal()
    weights.note_originals(memory)
    for name in [name for name, _ in model.named_parameters()]:
        setattr(model, name, nn.Parameter(arrange(getattr(model, name).data), requires_grad=False))
    weights.find_changes(model, memory)
    digests = StoreDigests(memory.reader())
    digests.all()
    return WeightStore(weights.manifest, memory, 1, digests=digests)


def to_buckets(store: WeightStore) -> None:
    assert isinstance(store.memory, LiveMemory)
    for offset, length in chunks(store.manifest.nbytes, CHUNK_BYTES):
        chunk = store.memory.chunk(offset, length)
        if chunk.untyped_storage().nbytes() != length:  # it is the memory itself
            chunk.clone()


def to_host(store: WeightStore) -> None:
    for offset, length in chunks(store.manifest.nbytes, CHUNK_BYTES):
        store.bytes[offset : offset + length]


def by_tcp(store: WeightStore) -> None:
    transports, access = (TcpTransport(),), Access()
    server = WeightServer(HOST_ADDRESS, 0, Settings(transports, Timeouts(), access))
    server.start()
    try:
        server.publish(Publication(IDENTITY, RankCoordinates(), store))
        request = Request(IDENTITY, RankCoordinates(), store.manifest)
        options = FetchOptions(request, Timeouts(), access)
        Client(options, transports).fetch([Endpoint(HOST_ADDRESS, server.port)]).memory.close()
    finally:
        server.close()


def show(figures: Figures) -> None:
    print(f"\nint8 weights: {figures.bytes / MEGABYTE:.0f} MB on {figures.device}; times as ratios to {REFERENCE!r}\n")
    rows = [
        (name, *(f"{ratio_to(figures.seconds[REFERENCE][what], times):.2f}" for what, times in by_what.items()))
        for name, by_what in figures.seconds.items()
    ]
    print_table(("arrangement", BUCKET, HOST, TCP), rows)


def panels(figures: Figures) -> list[Panel]:
    def bar(name: str, what: str) -> Bar:
        ratios = ratios_to(figures.seconds[REFERENCE][what], figures.seconds[name][what])
        return Bar(ratios, f"{ratio_to(figures.seconds[REFERENCE][what], figures.seconds[name][what]):.2f}", name)

    rows = {what: [bar(name, what) for name in figures.seconds] for what in (HOST, TCP)}
    return [Panel("Serving what was rearranged", "time, compared with weights that lie as they were loaded", rows)]


if __name__ == "__main__":
    Benchmark(__doc__, Figures, 5, measure, show, panels, add_options).run()
