"""Shows what this is all about: a server loads a model from disk, a client takes its weights, and both answer alike.

Starts two real `vllm serve` processes, asks both the same prompts at temperature 0 and prints a table. The exit status
is 0 if the client took its weights from the server and all answers are equal.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from support.vllm.fetch_model import fetch_model
from support.vllm.instance import Instance, InstanceFailed, telling

PROMPTS = ("The capital of France is", "def fibonacci(n):", "Water boils at a temperature of", "Once upon a time,")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="a directory or a hub name; default: SmolLM2-135M-Instruct")
    parser.add_argument("--transport", default="", help="shared_memory, tcp or process_group; default: the best")
    parser.add_argument("--npu", action="store_true", help="on two simulated NPUs (make demo-npu)")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return demonstrate(fetch_model(options.model), options.transport, options.npu)
    except InstanceFailed as error:
        print(f"\ndemo failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo interrupted; its processes are ended", file=sys.stderr)
        return 130


def demonstrate(model: str, transport: str, on_npus: bool) -> int:
    with tempfile.TemporaryDirectory(prefix="netloader-demo-") as scratch:
        directory = Path(scratch)
        ours, theirs = ("0", "1") if on_npus else (None, None)
        if on_npus:
            say("on simulated NPUs: what works here has a chance on hardware, and times mean nothing")
        chosen: dict[str, Any] = {"TRANSPORT": [transport]} if transport else {}
        with Instance("server", model, directory, chosen, npus=ours) as server:
            say(f"server: vllm serve {model} --load-format netloader")
            server.wait_until_ready(telling("server"))
            say(f"server: ready, its weights are served on {server.address}")
            with Instance("client", model, directory, {"SOURCE": [server.address], **chosen}, npus=theirs) as client:
                say(f'client: the same with --model-loader-extra-config \'{{"SOURCE": ["{server.address}"]}}\'')
                client.wait_until_ready(telling("client"))
                say("client: ready; asking both the same prompts")
                answers = [(prompt, server.complete(prompt), client.complete(prompt)) for prompt in PROMPTS]
                return show(answers, server.report(), client.report(), with_times=not on_npus)


def show(
    answers: list[tuple[str, str, str]], server: dict[str, Any], client: dict[str, Any], *, with_times: bool
) -> int:
    """Prints the comparison and returns the exit status."""
    print("\nprompt                              answers  text")
    for prompt, ours, theirs in answers:
        print(f"{prompt:<36}{'equal' if ours == theirs else 'DIFFER':<9}{shorten(ours)}")
        if ours != theirs:
            print(f"{'':<45}{shorten(theirs)}")
    print(f"\n{'':<10}{'loaded by':<11}{'source':<24}{'transport':<16}{'MB':>8}{'weight phase':>15}")
    for name, report in (("server", server), ("client", client)):
        source, transport = report["source"] or "disk", report["transport"] or "-"
        print(
            f"{name:<10}{report['outcome']:<11}{source:<24}{transport:<16}{report['bytes'] / 1e6:>8.1f}"
            f"{weight_seconds(report):>13.3f} s"
        )
    equal = all(ours == theirs for _, ours, theirs in answers)
    loaded = client["outcome"] == "p2p"
    print()
    if with_times:
        print(f"weight phase, disk : client = {weight_seconds(server) / weight_seconds(client):.1f} : 1")
    print("answers are equal" if equal else "ANSWERS DIFFER", end="; ")
    print("the client loaded from the server" if loaded else f"the client loaded by {client['outcome']}: {client}")
    return 0 if equal and loaded else 1


def shorten(text: str) -> str:
    shown = repr(text)
    return shown if len(shown) <= 72 else f"{shown[:69]}..."


def weight_seconds(report: dict[str, Any]) -> float:
    return float(sum(seconds for phase, seconds in report["seconds"].items() if phase != "serve"))


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
