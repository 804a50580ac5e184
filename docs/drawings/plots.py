"""Draws the result of a benchmark from figures that it measured earlier. The benchmark itself draws it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def draw(name: str, figures: Path) -> str:
    """The SVG that the benchmark `name` draws of the JSON file `figures`. Raises ValueError if it cannot."""
    with tempfile.TemporaryDirectory() as folder:
        svg = Path(folder) / "plot.svg"
        command = [sys.executable, "-m", f"benchmarks.{name}", "--from", str(figures), "--plot", str(svg)]
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        run = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
        )
        if run.returncode or not svg.exists():
            raise ValueError(f"{' '.join(command)} failed:\n{run.stderr}")
        text = svg.read_text()
        return text[text.index("<svg ") :]
