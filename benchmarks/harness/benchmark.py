"""The command line that all benchmarks have: measure, or take figures measured earlier; then show and draw them."""

from __future__ import annotations

import argparse
import importlib.util
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

from benchmarks.harness.plot import Panel, draw

Figures = TypeVar("Figures")


@dataclass(frozen=True)
class Benchmark(Generic[Figures]):
    """A program that measures something and shows it. `figures` is a dataclass that holds all that was measured."""

    description: str
    figures: type[Figures]
    rounds: int
    """How often everything is measured unless the command line says otherwise."""
    measure: Callable[[argparse.Namespace], Figures]
    show: Callable[[Figures], None]
    """Prints the table."""
    panels: Callable[[Figures], list[Panel]]
    """What is to be plotted."""
    add_options: Callable[[argparse.ArgumentParser], object] = lambda _: None

    def run(self) -> None:
        """Does what the command line asks for. Figures are written before anything can go wrong in showing them."""
        options = self._options()
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        if options.earlier is None:
            figures = self.measure(options)
        else:
            figures = msgspec.json.decode(options.earlier.read_bytes(), type=self.figures)

        if options.json is not None:
            options.json.write_bytes(msgspec.json.format(msgspec.json.encode(figures)) + b"\n")
        self.show(figures)
        if options.plot is not None:
            draw(self.panels(figures), options.plot)

    def _options(self) -> argparse.Namespace:
        parser = argparse.ArgumentParser(
            description=self.description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        self.add_options(parser)
        parser.add_argument("--rounds", type=int, default=self.rounds, help=f"default: {self.rounds}")
        parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures here")
        parser.add_argument(
            "--from", type=Path, metavar="FILE", dest="earlier", help="measure nothing: take such a file"
        )
        parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="also draw the result")
        options = parser.parse_args()
        if options.plot is not None and importlib.util.find_spec("matplotlib") is None:
            parser.error("--plot needs matplotlib, which make setup installs")
        return options


def progress(text: str) -> None:
    """Tells on standard error what has just been measured."""
    print(text, file=sys.stderr, flush=True)
