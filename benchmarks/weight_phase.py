"""How long it takes to fill a model with its weights, by every way there is, in one run on one model.

    python -m benchmarks.weight_phase                 # a random model of 3 GB, made on the spot
    python -m benchmarks.weight_phase --model DIR     # a checkpoint of yours

Measured, each in fresh processes, in turn, `--rounds` times; the median counts:

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
import json
import mmap
import multiprocessing
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.vllm.random_model import LARGE, make_random_model
from vllm_ascend.model_loader.netloader.traits import NAMES as TRANSPORTS
from vllm_ascend.model_loader.netloader.transport.tcp import CONNECTIONS

ROOT = Path(__file__).resolve().parents[1]
GIGABYTE = 1e9
_spawn = multiprocessing.get_context("spawn")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a checkpoint directory; default: a random model of 3 GB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    model = options.model or make_random_model(ROOT / ".models" / "random-3gb", LARGE)
    with _Server(model) as server:
        figures = measure(model, server, options.rounds)
    print_table(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2))


def measure(model: Path, server: _Server, rounds: int) -> dict[str, Any]:
    """Seconds per way and round, and the memory figures."""
    nbytes = server.result["parameter_bytes"]
    netloader: dict[str, list[dict[str, Any]]] = {transport: [] for transport in TRANSPORTS}
    ways: dict[str, Callable[[], float]] = {
        "disk": lambda: float(load(model, "auto", {})["weight_seconds"]),
        "gloo per tensor": lambda: gloo_per_tensor(model),
        "raw sockets": lambda: raw_sockets(nbytes, new_memory=False),
        "raw sockets, new memory": lambda: raw_sockets(nbytes, new_memory=True),
    }
    seconds: dict[str, list[float]] = {}
    for number in range(rounds):
        for way, run in ways.items():
            condition_memory(2 * nbytes)
            seconds.setdefault(way, []).append(run())
            _say(f"round {number + 1}: {way} {seconds[way][-1]:.3f} s")
        for transport, results in netloader.items():
            condition_memory(2 * nbytes)
            extra = {"SOURCE": [server.address], "TRANSPORT": [transport], "FALLBACK": "error", "CONNECT_TIMEOUT": 60}
            results.append(load(model, "netloader", extra))
            seconds.setdefault(transport, []).append(results[-1]["weight_seconds"])
            _say(f"round {number + 1}: {transport} {seconds[transport][-1]:.3f} s")
    return {
        "bytes": nbytes,
        "connections": CONNECTIONS,
        "seconds": seconds,
        "client_private_bytes": {transport: results[-1]["private_bytes"] for transport, results in netloader.items()},
        "server_private_bytes": server.result["private_bytes"],
    }


def print_table(figures: dict[str, Any]) -> None:
    nbytes = figures["bytes"]
    medians = {way: statistics.median(values) for way, values in figures["seconds"].items()}
    print(f"\nweights: {nbytes / GIGABYTE:.2f} GB, connections: {figures['connections']}, median of each way\n")
    print(f"{'way':<26}{'seconds':>9}{'GB/s':>9}{'x disk':>9}{'x gloo':>9}{'x raw':>9}{'x raw new':>11}")
    for way, median in medians.items():
        references = ("disk", "gloo per tensor", "raw sockets", "raw sockets, new memory")
        disk, gloo, raw, raw_new = (medians[reference] / median for reference in references)
        speed = nbytes / GIGABYTE / median
        print(f"{way:<26}{median:>9.3f}{speed:>9.2f}{disk:>9.2f}{gloo:>9.2f}{raw:>9.2f}{raw_new:>11.2f}")
    print("\nprivate memory added by the weight phase, as a share of the weights:")
    print(
        f"  server, from disk into the arena  {figures['server_private_bytes'] / nbytes:7.2%}  (the arena exists once)"
    )
    for transport, private in figures["client_private_bytes"].items():
        print(f"  client, {transport:<24}  {private / nbytes:7.2%}")


class _Server:
    """An instance's worker that has loaded `model` from disk and serves it."""

    def __init__(self, model: Path) -> None:
        self._scratch = tempfile.TemporaryDirectory()
        self._prefix = str(Path(self._scratch.name) / "listen-")
        self._process = _start_load(
            model, "netloader", {"OUTPUT_PREFIX": self._prefix, "TRANSPORT": list(TRANSPORTS)}, hold=True
        )
        self.result: dict[str, Any] = {}

    def __enter__(self) -> _Server:
        self.result = _result(self._process)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._scratch.cleanup()

    @property
    def address(self) -> str:
        port = Path(f"{self._prefix}0.txt").read_text().strip().rpartition(":")[2]
        return f"127.0.0.1:{port}"


def load(model: Path, load_format: str, extra: dict[str, Any]) -> dict[str, Any]:
    """Loads in a fresh process and returns what it measured."""
    process = _start_load(model, load_format, extra, hold=False)
    try:
        return _result(process)
    finally:
        process.wait()


def _start_load(model: Path, load_format: str, extra: dict[str, Any], *, hold: bool) -> subprocess.Popen[str]:
    specification = {
        "model": str(model),
        "load_format": load_format,
        "extra": extra,
        "engine": {"skip_tokenizer_init": True},
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "support.vllm.load_models"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
        text=True,
    )
    assert process.stdin is not None
    print(json.dumps(specification), file=process.stdin, flush=True)
    if not hold:
        process.stdin.close()
    return process


def _result(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith('{"result":'):
            result: dict[str, Any] = json.loads(line)["result"]
            return result
        if line.startswith('{"error":'):
            raise RuntimeError(f"a load failed: {json.loads(line)['error']}")
    raise RuntimeError(f"a load ended with status {process.wait()} and no result; run load_models to see why")


def condition_memory(nbytes: int) -> None:
    """Touches and frees memory in a process of its own."""
    process = _spawn.Process(target=_touch, args=(nbytes,))
    process.start()
    process.join()


def _touch(nbytes: int) -> None:
    block = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for offset in range(0, nbytes, mmap.PAGESIZE):
        block[offset] = 1


def raw_sockets(nbytes: int, *, new_memory: bool) -> float:
    """Seconds to move `nbytes` over CONNECTIONS loopback connections between two processes."""
    listener = socket.create_server(("127.0.0.1", 0))
    share = nbytes // CONNECTIONS
    sender = _spawn.Process(target=_send_raw, args=(listener.getsockname()[1], share))
    ready = threading.Event()
    destination = mmap.mmap(-1, share * CONNECTIONS, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if not new_memory:
        for offset in range(0, len(destination), mmap.PAGESIZE):
            destination[offset] = 1
    sender.start()
    connections = [listener.accept()[0] for _ in range(CONNECTIONS)]
    view = memoryview(destination)
    threads = [
        threading.Thread(target=_receive_raw, args=(connection, view[n * share : (n + 1) * share], ready))
        for n, connection in enumerate(connections)
    ]
    for thread in threads:
        thread.start()
    begun = time.perf_counter()
    ready.set()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - begun
    sender.join()
    for each in (*connections, listener):
        each.close()
    return seconds


def _send_raw(port: int, share: int) -> None:
    connections = [socket.create_connection(("127.0.0.1", port)) for _ in range(CONNECTIONS)]
    block = mmap.mmap(-1, share * CONNECTIONS, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for offset in range(0, len(block), mmap.PAGESIZE):
        block[offset] = 1
    view = memoryview(block)

    def send(number: int) -> None:
        connections[number].recv(1)
        connections[number].sendall(view[number * share : (number + 1) * share])

    threads = [threading.Thread(target=send, args=(number,)) for number in range(CONNECTIONS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _receive_raw(connection: socket.socket, view: memoryview, ready: threading.Event) -> None:
    ready.wait()
    connection.send(b"\0")
    while view.nbytes:
        view = view[connection.recv_into(view) :]


def gloo_per_tensor(model: Path) -> float:
    """Seconds to send every tensor of the checkpoint by itself between two processes."""
    results = _spawn.Queue()
    store = tempfile.TemporaryDirectory()
    with store:
        ranks = [_spawn.Process(target=_gloo_rank, args=(rank, store.name, str(model), results)) for rank in (0, 1)]
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


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
