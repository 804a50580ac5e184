"""``netloader cache``: runs the cache of this host, or says what it holds, or has it give something up."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
import signal
import sys
from typing import Final

import msgspec

from vllm_ascend.model_loader.netloader.cache import asking, place
from vllm_ascend.model_loader.netloader.cache.line import connect
from vllm_ascend.model_loader.netloader.cache.messages import Ask, CacheMessage, Drop, Dropped, Said, State
from vllm_ascend.model_loader.netloader.cache.process import Cache, CacheOptions
from vllm_ascend.model_loader.netloader.cache.pulling import Chosen
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import ConfigError, PeerError, ProtocolError, one_line
from vllm_ascend.model_loader.netloader.weights.identity import RankCoordinates
from vllm_ascend.model_loader.netloader.wire.access import Access

_SECONDS: Final = 10.0
"""For the running cache to answer a command."""
_UNITS: Final = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}

_EXAMPLE: Final = """examples:
  netloader cache --max-bytes 200G          hold what engines of this host load, for as long as this runs
  netloader cache --pull 10.0.0.1:19000 --only tp_rank=0,1
                                            fetch two ranks of an instance before engines need them
  netloader cache status                    what the running cache holds
  netloader cache drop org/model            have it give up the weights of a model
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to those of ``netloader``; `run` is what it does."""
    parser = commands.add_parser(
        "cache",
        help="hold the weights of this host without an engine",
        description="Holds the weights that engines of this host have loaded, so that an engine that restarts maps "
        "them again. Engines find it by themselves. Without a further command it runs until SIGTERM.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--socket", help="absolute path of its socket, in a directory of mode 0700; as CACHE of engines"
    )
    parser.add_argument(
        "--max-bytes", type=_size, help="how much it may hold, such as 200G; by default half of this host's memory"
    )
    parser.add_argument("--host", help="address on which to serve other hosts; by default all")
    parser.add_argument("--port", type=_port, help="port on which to serve other hosts; by default it serves none")
    parser.add_argument("--token-file", help="other hosts have to know this token, as TOKEN_FILE of engines")
    for name in ("cert", "key", "ca"):
        parser.add_argument(f"--tls-{name}", help=f"as TLS_{name.upper()} of engines; all three or none")
    parser.add_argument(
        "--pull",
        nargs="+",
        default=[],
        type=_endpoint,
        metavar="SOURCE",
        help="addresses of instances whose weights it fetches ahead of engines, and again when they have new ones",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        type=_choice,
        metavar="FIELD=VALUE,...",
        help="of these, only those with such a role, name, tp_rank, pp_rank, ep_rank, ...",
    )
    parser.set_defaults(action="run", json=False)

    actions = parser.add_subparsers(title="commands to the running cache", metavar="{status,drop}")
    status = actions.add_parser("status", help="what it holds")
    drop = actions.add_parser("drop", help="give up weights; engines that use them keep theirs")
    drop.add_argument("selected", nargs="?", default="", help="a model, or the first digits of a root digest")
    drop.add_argument("--all", action="store_true", help="everything")
    for action in (status, drop):
        action.add_argument("--socket", default=argparse.SUPPRESS, help="absolute path of its socket")
        action.add_argument("--json", action="store_true", help="for programs")
    status.set_defaults(action="status")
    drop.set_defaults(action="drop")


def run(options: argparse.Namespace) -> int:
    """Does what `options` of the parser say. Returns the exit status."""
    try:
        match options.action:
            case "status":
                return _status(options)
            case "drop":
                return _drop(options)
            case _:
                return _run(options)
    except ConfigError as error:
        return _failed(error, 2)
    except (PeerError, OSError) as error:
        return _failed(error, 1)


def describe(state: State) -> str:
    """`state` as lines for a person."""
    served = f", serves other hosts on port {state.port}" if state.port else ""
    lines = [
        f"cache of process {state.pid}: {len(state.holdings)} held, {state.nbytes / 1e6:.1f} of at most "
        f"{state.max_bytes / 1e6:.1f} MB{served}"
    ]
    for each in state.holdings:
        identity, at = each.identity, each.coordinates
        whole = each.held >= each.nbytes and each.root
        size = (
            f"{each.nbytes / 1e6:.1f} MB" if whole else f"{each.held / 1e6:.1f} of {each.nbytes / 1e6:.1f} MB verified"
        )
        lines += [
            f"  {identity.name} ({identity.role})",
            f"    {'partition':<12}tp {at.tp_rank} of {at.tp_size}, pp {at.pp_rank} of {at.pp_size}, "
            f"ep {at.ep_rank} of {at.ep_size}",
            f"    {'weights':<12}{size}, {identity.dtype}",
            f"    {'root':<12}{each.root[:16] or 'not known yet'}",
            f"    {'checkpoint':<12}{identity.fingerprint[:16] or 'not seen'}",
            f"    {'last used':<12}{each.idle:.0f} s ago",
        ]
    return "\n".join(map(one_line, lines))


def _run(options: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    access = Access.load(options.token_file, options.tls_cert, options.tls_key, options.tls_ca)
    path = place.prepare(options.socket)
    max_bytes = options.max_bytes or _half_of_memory()
    cache = Cache(
        CacheOptions(
            path, max_bytes, options.host, options.port, access, tuple(options.pull), Chosen(dict(options.only))
        )
    )
    with contextlib.closing(cache), cache.ended_by(signal.SIGTERM, signal.SIGINT):
        cache.start(os.environ)
        logging.info("holds weights of at most %.1f MB, its socket is %s", max_bytes / 1e6, path)
        cache.wait()
    logging.info("has ended")
    return 0


def _status(options: argparse.Namespace) -> int:
    match _told(options, Ask()):
        case State() as state:
            print(msgspec.json.encode(state).decode() if options.json else describe(state))
            return 0
        case message:
            raise ProtocolError(f"the cache answered with {type(message).__name__}")


def _drop(options: argparse.Namespace) -> int:
    if bool(options.selected) == options.all:
        raise ConfigError("drop needs a model, the first digits of a root digest, or --all")
    match _told(options, Drop(options.selected)):
        case Dropped(count=count, nbytes=nbytes) as dropped:
            told = f"gave up {count} weights, {nbytes / 1e6:.1f} MB"
            print(msgspec.json.encode(dropped).decode() if options.json else told)
            return 0 if count or options.all else 1
        case message:
            raise ProtocolError(f"the cache answered with {type(message).__name__}")


def _told(options: argparse.Namespace, question: CacheMessage) -> Said:
    path = asking.find(place.candidates(options.socket or "auto"), _SECONDS)
    if isinstance(path, str):
        raise FileNotFoundError(f"no cache of this user runs here: {path}")
    with connect(path, _SECONDS) as line:
        line.send(question, _SECONDS)
        with line.receive(_SECONDS) as received:
            return received.message


def _failed(error: Exception, status: int) -> int:
    print(f"netloader: {one_line(str(error))}", file=sys.stderr)
    return status


def _half_of_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _size(text: str) -> int:
    """A number of bytes. Raises what argparse shows to the user."""
    match = re.fullmatch(r"([0-9]{1,18})([KMGT]?)(i?B)?", text)
    if match is None or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of bytes: expected such as 200G")
    return int(match[1]) * _UNITS[match[2]]


def _port(text: str) -> int:
    """A port number. Raises what argparse shows to the user."""
    if not text.isdecimal() or not 0 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: expected 0 (any free one) to 65535")
    return int(text)


def _endpoint(text: str) -> Endpoint:
    """The endpoint that `text` names. Raises what argparse shows to the user."""
    try:
        return Endpoint.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _choice(text: str) -> tuple[str, frozenset[str]]:
    """A field of what is wanted, and its allowed values. Raises what argparse shows to the user."""
    name, separator, values = text.partition("=")
    fields = ("role", "name", *RankCoordinates.__struct_fields__)
    if not separator or name not in fields:
        raise argparse.ArgumentTypeError(f"{text!r}: expected FIELD=VALUE, with one of {', '.join(fields)}")
    return name, frozenset(values.split(","))
