"""A process that loads a model the way a vLLM worker does, for the tests to start, watch and end."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
LOAD_TIMEOUT = 180.0


class Loader:
    """A process in which vLLM's worker loads a model (tools/load_once.py) and, if it can, goes on serving it."""

    def __init__(self, directory: Path, name: str, model: str, extra: dict[str, Any], **specification: Any) -> None:
        self._prefix = str(directory / f"{name}-")
        files = {"REPORT_PREFIX": f"{self._prefix}report-", "OUTPUT_PREFIX": f"{self._prefix}address-"}
        self.log = directory / f"{name}.log"
        netloader = specification.get("load_format", "netloader") == "netloader"
        specification |= {
            "model": model,
            "extra": {"LISTEN_HOST": "127.0.0.1", **files, **extra} if netloader else extra,
            "digests": True,
            "engine": {"skip_tokenizer_init": True, **specification.get("engine", {})},
        }
        self._rank = specification.get("rank", 0)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "tools" / "load_once.py"), json.dumps(specification)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "VLLM_LOGGING_STREAM": "ext://sys.stderr"},
            )
        self._output = b""
        self.result: dict[str, Any] = {}

    def finish_loading(self) -> Loader:
        """Waits for the result. Fails the test, with the log, when there is none."""
        assert self.process.stdout is not None
        end = time.monotonic() + LOAD_TIMEOUT
        while b'{"weight_seconds"' not in self._output or not self._output.endswith(b"\n"):
            readable, _, _ = select.select([self.process.stdout], [], [], max(end - time.monotonic(), 0))
            data = self.process.stdout.read1() if readable else b""
            if not data:
                self.process.kill()
                pytest.fail(f"the load gave no result:\n{self.log.read_text(errors='replace')[-4000:]}")
            self._output += data
        line = next(line for line in self._output.splitlines() if line.startswith(b'{"weight_seconds"'))
        self.result = json.loads(line)
        return self

    def fails_with(self) -> str:
        """Waits for a load that must fail; returns its log."""
        assert self.process.wait(LOAD_TIMEOUT) != 0
        return self.log.read_text(errors="replace")

    @property
    def digests(self) -> dict[str, str]:
        digests: dict[str, str] = self.result["digests"]
        return digests

    @property
    def answers(self) -> list[list[int]]:
        answers: list[list[int]] = self.result["answers"]
        return answers

    @property
    def report(self) -> dict[str, Any]:
        report: dict[str, Any] = json.loads(Path(f"{self._prefix}report-{self._rank}.json").read_text())
        return report

    @property
    def address(self) -> str:
        return Path(f"{self._prefix}address-{self._rank}.txt").read_text().strip()

    def arena_bytes(self) -> int:
        """Bytes of arena pages in the memory of the process now."""
        kibibytes, in_arena = 0, False
        for line in Path(f"/proc/{self.process.pid}/smaps").read_text().splitlines():
            if not line.split(" ", 1)[0].endswith(":"):
                in_arena = "memfd:netloader-arena" in line
            elif in_arena and line.startswith("Rss:"):
                kibibytes += int(line.split()[1])
        return kibibytes * 1024

    def end(self) -> None:
        """Lets it shut down, since vLLM's ranks share memory that has to be removed; ends it by force if it hangs."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


Load = Callable[..., Loader]
