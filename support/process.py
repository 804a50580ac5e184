"""A server, or several clients, in a process of its own: `python -m support.process serve` or `fetch`.

`serve` writes its port, and serves until its input ends. `fetch` writes "ready" and waits for a line. Then it fetches,
writes "moving" when the first bytes have arrived and how many clients have finished at the end, and keeps what it has
fetched until its input ends.
"""

from __future__ import annotations

import argparse
import sys
import threading
from pathlib import Path

from support.sources import Tensors, client_for, serving
from vllm_ascend.model_loader.netloader.client.fetch import Client
from vllm_ascend.model_loader.netloader.client.fetched import Fetched
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.report import write_whole
from vllm_ascend.model_loader.netloader.transport.base import Timeouts
from vllm_ascend.model_loader.netloader.transport.registry import transports

PATIENT = Timeouts(connect=60.0, stall=60.0)


def model(mebibytes: int) -> Tensors:
    return Tensors.of_shapes(*[(mebibytes << 17,)] * 2, (3,))  # of four bytes each


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=["serve", "fetch"])
    parser.add_argument("--mebibytes", type=int, required=True)
    parser.add_argument("--transport", default="tcp")
    parser.add_argument("--max-bandwidth", type=int)
    parser.add_argument("--addresses")
    parser.add_argument("--port", type=int)
    parser.add_argument("--clients", type=int, default=1)
    options = parser.parse_args()
    serve(options) if options.role == "serve" else fetch(options)


def say(word: object) -> None:
    print(word, flush=True)


def serve(options: argparse.Namespace) -> None:
    kinds = transports(options.transport.split(","))
    with serving(
        model(options.mebibytes), kinds, timeouts=PATIENT, max_clients=16, max_bandwidth=options.max_bandwidth
    ) as (_, source):
        if options.addresses is not None:
            write_whole(Path(f"{options.addresses}0.txt"), f"{source}\n".encode())
        say(source.port)
        sys.stdin.read()


def fetch(options: argparse.Namespace) -> None:
    kinds, source = transports(options.transport.split(",")), Endpoint("127.0.0.1", options.port)
    request, moving = model(options.mebibytes).request(), threading.Event()

    def progress(nbytes: int) -> None:
        if nbytes > 0 and not moving.is_set():
            moving.set()
            say("moving")

    def run(client: Client) -> None:
        fetched.append(client.fetch([source]))

    fetched: list[Fetched] = []
    clients = [client_for(request, kinds, timeouts=PATIENT, progress=progress) for _ in range(options.clients)]
    threads = [threading.Thread(target=run, args=(client,)) for client in clients]
    say("ready")
    sys.stdin.readline()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    say(f"{len(fetched)} done")
    sys.stdin.readline()


if __name__ == "__main__":
    main()
