"""One vLLM engine in Python that takes its weights from a running instance, if told where one is, and serves them.

    python offline_inference.py --model MODEL --stay                       # from disk; serves until Enter
    python offline_inference.py --model MODEL --source 10.0.0.1:40213      # from the first one

The engine runs in a process of its own, so where the weights came from and where they are served is read from the
report that Netloader writes there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

PROMPTS = ["The capital of France is", "def fibonacci(n):", "Water boils at a temperature of"]


def main() -> None:
    options = _parser().parse_args()
    with tempfile.TemporaryDirectory(prefix="netloader-example-") as scratch:
        prefix = f"{scratch}/report-"
        engine = start_engine(options, prefix)  # serves its weights until it is collected
        report: dict[str, Any] = json.loads(Path(f"{prefix}0.json").read_text())
    for prompt, answer in zip(PROMPTS, greedy_answers(engine), strict=True):
        print(f"{prompt!r} -> {answer!r}")
    for attempt in report["attempts"]:
        print(f"{attempt['source']} did not deliver: {attempt['reason']}")
    print(f"loaded from {origin(report)}; {serving(report)}", flush=True)
    if options.stay:
        print("press Enter to end", flush=True)
        sys.stdin.readline()


def start_engine(options: argparse.Namespace, report_prefix: str) -> Any:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB, so that two instances fit on a small machine
    from vllm import LLM

    return LLM(
        model=options.model,
        load_format="netloader",
        model_loader_extra_config=loader_configuration(options, report_prefix),
        enforce_eager=True,  # compiling would take longer than these few answers
        max_model_len=512,
    )


def loader_configuration(options: argparse.Namespace, report_prefix: str) -> dict[str, Any]:
    """What `vllm serve` takes as --model-loader-extra-config."""
    configuration: dict[str, Any] = {"REPORT_PREFIX": report_prefix}
    if options.source:
        configuration["SOURCE"] = options.source
    if options.listen_port:
        configuration["LISTEN_PORT"] = options.listen_port
    return configuration


def greedy_answers(engine: Any) -> list[str]:
    from vllm import SamplingParams

    outputs = engine.generate(PROMPTS, SamplingParams(temperature=0.0, max_tokens=24))
    return [output.outputs[0].text for output in outputs]


def origin(report: dict[str, Any]) -> str:
    return f"{report['source']} by {report['transport']}" if report["outcome"] == "p2p" else str(report["outcome"])


def serving(report: dict[str, Any]) -> str:
    if report["listening"]:
        return f"serving the weights on {report['listening']}"
    return f"not serving the weights: {report['not_served']}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a directory or a hub name")
    parser.add_argument("--source", action="append", metavar="HOST:PORT", help="an instance to ask; may be repeated")
    parser.add_argument("--listen-port", type=int, metavar="PORT", help="where to serve; default: a free port")
    parser.add_argument("--stay", action="store_true", help="go on serving the weights until Enter is pressed")
    return parser


if __name__ == "__main__":
    main()
