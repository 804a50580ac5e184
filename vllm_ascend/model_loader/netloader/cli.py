"""The command `netloader`, which looks at running instances from outside, takes from them, and holds their weights.

It needs no vLLM and loads no model. It exits with 0 when it is done, with 1 when the source refused or did not answer,
and with 2 when its arguments are wrong.
"""

from __future__ import annotations

import argparse
import sys

import msgspec

from vllm_ascend.model_loader.netloader.cache import command as cache
from vllm_ascend.model_loader.netloader.client.inquiry import inquire
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import ConfigError, SourceError, TransportError, one_line
from vllm_ascend.model_loader.netloader.pull import command as pull
from vllm_ascend.model_loader.netloader.wire.access import Access
from vllm_ascend.model_loader.netloader.wire.messages import Holding, Status


def main(arguments: list[str] | None = None) -> int:
    """Runs the command with `arguments`, by default those of this process. Returns the exit status."""
    options = _parser().parse_args(arguments)
    if options.command == "cache":
        return cache.run(options)
    if options.command == "pull":
        return pull.run(options)
    return _status(options)


def _status(options: argparse.Namespace) -> int:
    try:
        access = Access.load(options.token_file, options.tls_cert, options.tls_key, options.tls_ca)
    except ConfigError as error:
        print(f"netloader: {error}", file=sys.stderr)
        return 2

    try:
        status = inquire(options.source, options.timeout, access)
    except (SourceError, TransportError) as error:
        print(f"netloader: {options.source}: {error}", file=sys.stderr)
        return 1

    print(msgspec.json.encode(status).decode() if options.json else describe(options.source, status))
    return 0


def describe(source: Endpoint, status: Status) -> str:
    """`status` of `source` as lines for a person; whatever the source says in them is safe to print."""
    sessions = f"{status.sessions} session{'' if status.sessions == 1 else 's'} now"
    if status.waiting:
        sessions += f", {status.waiting} waiting"

    lines = [f"{source}: {sessions}, transports {', '.join(status.transports)}"]
    lines += [line for holding in status.holdings for line in _describe_holding(holding)]
    lines += [f"  {role}: cannot be served: {reason}" for role, reason in status.declined.items()]
    if not status.holdings and not status.declined:
        lines.append("  holds no weights")
    return "\n".join(map(one_line, lines))


def _describe_holding(holding: Holding) -> list[str]:
    identity, place = holding.identity, holding.coordinates
    fields = {
        "model": identity.name,
        "architecture": identity.architecture,
        "dtype": identity.dtype + (f", {identity.quantization}" if identity.quantization else ""),
        "partition": (
            f"tp {place.tp_rank} of {place.tp_size}, pp {place.pp_rank} of {place.pp_size}, "
            f"ep {place.ep_rank} of {place.ep_size}"
        ),
        "weights": f"{holding.tensors} tensors, {_size(holding)}, generation {holding.generation}",
        "root": holding.root[:16] or "not known yet",
        "checkpoint": identity.fingerprint[:16] or "not seen",
        "software": ", ".join(f"{name} {version}" for name, version in sorted(identity.versions.items())),
    }
    return [f"  {holding.role}", *(f"    {name:<14}{value}" for name, value in fields.items())]


def _size(holding: Holding) -> str:
    whole = f"{holding.nbytes / 1e6:.1f} MB"
    return whole if holding.held >= holding.nbytes else f"{holding.held / 1e6:.1f} of {whole} loaded"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="netloader", description="Weights of vLLM instances: what they serve, and a cache of them."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    status = commands.add_parser("status", help="what a source holds and for which partition")
    status.add_argument("source", type=_endpoint, help="host:port")
    status.add_argument("--timeout", type=float, default=10.0, help="seconds")
    status.add_argument("--token-file", help="the TOKEN_FILE of the instance")
    for name in ("cert", "key", "ca"):
        status.add_argument(f"--tls-{name}", help=f"a TLS_{name.upper()} that the instance accepts; all three or none")
    status.add_argument("--json", action="store_true", help="for programs")
    cache.add_parser(commands)
    pull.add_parser(commands)
    return parser


def _endpoint(text: str) -> Endpoint:
    """The endpoint that `text` names. Raises what argparse shows to the user."""
    try:
        return Endpoint.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


if __name__ == "__main__":
    sys.exit(main())
