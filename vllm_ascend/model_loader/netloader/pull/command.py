"""``netloader pull``: writes what an instance holds as a directory.

It exits with 0 when the directory is complete, with 1 when no source delivered (another try goes on where this one
ended), with 2 when the arguments are wrong, with 3 when vLLM's format cannot hold what the source has, and with 4 when
the directory cannot be written.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import msgspec

from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import (
    CannotBeWritten,
    ConfigError,
    DirectoryFailed,
    NetloaderError,
    NoRoom,
    SourcesExhausted,
    UnsupportedModel,
    one_line,
)
from vllm_ascend.model_loader.netloader.pull.pull import Bar, Pull, Pulled
from vllm_ascend.model_loader.netloader.transport.base import Timeouts
from vllm_ascend.model_loader.netloader.wire.access import Access

_DESCRIPTION: Final = """Writes the weights of all ranks that an instance holds, and the small files of its
model, as a directory that vLLM loads by --load-format sharded_state. A second run fetches only
what is missing or damaged. The address of one rank is enough."""
_EXAMPLE: Final = """examples:
  netloader pull 10.0.0.1:19000 --out model
  vllm serve model --load-format sharded_state

  netloader pull 10.0.0.1:19000 --out model --files-only
  vllm serve model --load-format netloader --model-loader-extra-config '{"SOURCE": ["10.0.0.1:19000"]}'

exit status: 0 complete, 1 no source delivered (run it again: it goes on), 2 wrong arguments,
3 the format cannot hold these weights, 4 the directory cannot be written
"""
_STATUS: Final[dict[type[NetloaderError], int]] = {CannotBeWritten: 3, DirectoryFailed: 4}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to those of ``netloader``; `run` is what it does."""
    parser = commands.add_parser(
        "pull",
        help="write what a source holds as a directory",
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=_endpoint, nargs="+", help="host:port of an instance; several share the work")
    parser.add_argument("--out", type=Path, required=True, help="the directory: a new or empty one, or that of a pull")
    parser.add_argument(
        "--files-only",
        action="store_true",
        help="no weights: the small files, and a note by which an instance that starts there finds its weights",
    )
    parser.add_argument("--timeout", type=_seconds, default=10.0, help="seconds to reach a source, and for an answer")
    parser.add_argument("--token-file", help="the TOKEN_FILE of the instance")
    for name in ("cert", "key", "ca"):
        parser.add_argument(f"--tls-{name}", help=f"a TLS_{name.upper()} that the instance accepts; all three or none")
    parser.add_argument("--json", action="store_true", help="for programs: no progress, and the result as JSON")


def run(options: argparse.Namespace) -> int:
    """Does what `options` of the parser say. Returns the exit status."""
    try:
        access = Access.load(options.token_file, options.tls_cert, options.tls_key, options.tls_ca)
    except ConfigError as error:
        return _failed(options, [str(error)], 2)

    timeouts = Timeouts(connect=options.timeout)
    bar: Bar = _no_bar if options.json or not sys.stderr.isatty() else _bar
    try:
        pulled = Pull(options.source, options.out, access, timeouts, options.files_only, bar).run()
    except SourcesExhausted as error:
        return _failed(options, error.reasons, 1)
    except CannotBeWritten as error:
        return _failed(options, [f"vLLM's sharded format cannot hold {error}"], 3)
    except (DirectoryFailed, NoRoom, UnsupportedModel) as error:
        return _failed(options, [str(error)], _STATUS.get(type(error), 1))
    except KeyboardInterrupt:
        return _failed(options, ["interrupted: run it again to go on"], 130)

    print(msgspec.json.encode(pulled).decode() if options.json else describe(pulled))
    return 0


def describe(pulled: Pulled) -> str:
    """`pulled` as lines for a person."""
    size, fetched = sum(rank.bytes for rank in pulled.ranks), sum(rank.fetched for rank in pulled.ranks)
    lines = [f"{pulled.directory}: {pulled.name}"]
    lines += [
        f"  {rank.file}: {rank.bytes / 1e6:.1f} MB, {rank.fetched / 1e6:.1f} MB of it fetched, root {rank.root[:16]}"
        for rank in pulled.ranks
    ]
    lines.append(
        f"  {', '.join(pulled.files) or 'no small file'} written" + ("" if pulled.files else ": all are right")
    )
    lines += [f"  left out: the {role} weights: {reason}" for role, reason in pulled.left_out.items()]
    if pulled.ranks:
        sizes = "".join(
            f" --{kind}-parallel-size {size}"
            for kind, size in (("tensor", pulled.tp_size), ("pipeline", pulled.pp_size))
            if size > 1
        )
        lines.append(f"{fetched / 1e6:.1f} of {size / 1e6:.1f} MB fetched in {pulled.seconds:.1f} s; to serve it:")
        lines.append(f"  vllm serve {pulled.directory} --load-format sharded_state{sizes}")
    return "\n".join(map(one_line, lines))


def _failed(options: argparse.Namespace, reasons: tuple[str, ...] | list[str], status: int) -> int:
    if options.json:
        print(msgspec.json.encode({"error": reasons, "status": status}).decode())
    else:
        print(*(f"netloader: {one_line(reason)}" for reason in reasons), sep="\n", file=sys.stderr)
    return status


@contextlib.contextmanager
def _bar(name: str, nbytes: int) -> Iterator[Callable[[int], None]]:
    from tqdm import tqdm

    lock = threading.Lock()
    with tqdm(total=nbytes, desc=name, unit="B", unit_scale=True, file=sys.stderr) as bar:

        def advance(moved: int) -> None:
            with lock:
                bar.update(moved)

        yield advance


@contextlib.contextmanager
def _no_bar(_: str, __: int) -> Iterator[Callable[[int], None]]:
    yield lambda _: None


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds above 0")
    return seconds


def _endpoint(text: str) -> Endpoint:
    """The endpoint that `text` names. Raises what argparse shows to the user."""
    try:
        return Endpoint.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
