"""Processes that load models the way a vLLM worker does, for tests and benchmarks to start, watch and end.

Importing vLLM takes longer than loading a small model, so processes are kept and used again (`Pool`).
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from vllm_ascend.model_loader.netloader.client.inquiry import inquire
from vllm_ascend.model_loader.netloader.endpoint import Endpoint

ROOT = Path(__file__).resolve().parents[2]
LOAD_TIMEOUT = 180.0
"""Seconds that no load of a small model takes, unless it hangs."""
_REPLIES = (b'{"result":', b'{"error":')


class LoadFailed(AssertionError):
    """A load that should have succeeded failed, or gave no result; the message has the end of the process's log."""


def processor(**features: str) -> dict[str, str]:
    """An environment in which vLLM finds other features of the processor (tests/processor/sitecustomize.py)."""
    directories = [str(ROOT / "tests" / "processor"), *filter(None, [os.environ.get("PYTHONPATH")])]
    chosen = _chosen_features() | features
    return {
        "PYTHONPATH": os.pathsep.join(directories),
        "CPU_FEATURES": ",".join(f"{name}={answer}" for name, answer in chosen.items()),
    }


def amx() -> str:
    """Says "on" if vLLM finds AMX in the environment of this process, else "off"."""
    import torch

    return _chosen_features().get("amx_tile", "on" if torch.cpu._is_amx_tile_supported() else "off")


def _chosen_features() -> dict[str, str]:
    return dict(each.strip().split("=") for each in os.environ.get("CPU_FEATURES", "").split(",") if each)


class VllmProcess:
    """A process of `support.vllm.load_models`, which answers requests in order."""

    def __init__(
        self,
        log: Path,
        python: str = sys.executable,
        environment: Mapping[str, str] | None = None,
        load_timeout: float = LOAD_TIMEOUT,
    ) -> None:
        self.log = log
        self._load_timeout = load_timeout
        self.unanswered = 0
        self._output = b""
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                [python, "-m", "support.vllm.load_models"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                cwd=ROOT,
                env={**os.environ, **(environment or {}), "VLLM_LOGGING_STREAM": "ext://sys.stderr"},
            )

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def ask(self, request: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()
        self.unanswered += 1

    def reply(self) -> dict[str, Any]:
        """The next reply. Raises LoadFailed when there is none within the timeout of loads."""
        assert self.process.stdout is not None
        end = time.monotonic() + self._load_timeout
        while True:
            line, separator, rest = self._output.partition(b"\n")
            if separator:
                self._output = rest
                if line.startswith(_REPLIES):
                    self.unanswered -= 1
                    reply: dict[str, Any] = json.loads(line)
                    return reply
                continue
            readable, _, _ = select.select([self.process.stdout], [], [], max(end - time.monotonic(), 0))
            data = os.read(self.process.stdout.fileno(), 1 << 16) if readable else b""
            if not data:
                self.process.kill()
                raise LoadFailed(f"a load gave no result:\n{self.log.read_text(errors='replace')[-4000:]}")
            self._output += data

    def ask_no_more(self) -> None:
        """Lets the process shut down in an orderly way, because vLLM's ranks share memory that has to be removed."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    def end(self) -> None:
        """Waits until the process has shut down, and ends it by force if it hangs."""
        assert self.process.stdout is not None
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


_IDLE: Final = 4
"""How many processes are kept for later loads. Most tests need no more."""


class Pool:
    """Processes that are started when they are needed, and kept for later loads.

    `python` runs them in `environment`. A load fails that takes longer than `load_timeout` seconds.
    """

    def __init__(
        self,
        directory: Path,
        python: str = sys.executable,
        environment: Mapping[str, str] | None = None,
        load_timeout: float = LOAD_TIMEOUT,
    ) -> None:
        self._directory = directory
        self._python = python
        self._environment = environment
        self._load_timeout = load_timeout
        self._all: list[VllmProcess] = []
        self._idle: list[VllmProcess] = []
        self._loads = 0

    def load(self, model: str, extra: dict[str, Any] | None = None, **request: Any) -> Loader:
        """Starts a load in a process of its own. `load_models` says what else a `request` may hold."""
        self._loads += 1
        return Loader(self, self._directory / f"load-{self._loads}", model, extra or {}, request)

    def take(self) -> VllmProcess:
        while self._idle:
            process = self._idle.pop()
            if process.alive:
                return process
        log = self._directory / f"process-{len(self._all)}.log"
        self._all.append(VllmProcess(log, self._python, self._environment, self._load_timeout))
        return self._all[-1]

    def give_back(self, process: VllmProcess) -> None:
        if process.unanswered:  # a test that failed did not wait
            process.process.kill()
        elif len(self._idle) < _IDLE:
            self._idle.append(process)
        else:
            process.ask_no_more()

    def end_idle(self) -> None:
        """Ends the processes that nobody uses, each of which takes one to two gigabytes of memory."""
        while self._idle:
            self._idle.pop().ask_no_more()

    def end(self) -> None:
        for process in self._all:
            process.ask_no_more()
        for process in self._all:
            process.end()


class Loader:
    """One load in a process, which then serves the weights until `end` lets the process go on to another load."""

    def __init__(self, pool: Pool, prefix: Path, model: str, extra: dict[str, Any], request: dict[str, Any]) -> None:
        self._pool = pool
        self._prefix = str(prefix)
        self._process: VllmProcess | None = pool.take()
        engine = request.get("engine", {})
        ranks = engine.get("tensor_parallel_size", 1) * engine.get("pipeline_parallel_size", 1)
        self._rank = engine.get("data_parallel_rank", 0) * ranks + request.get("rank", 0)
        self._log_begins = self.log.stat().st_size
        self.result: dict[str, Any] = {}
        files = {"REPORT_PREFIX": f"{self._prefix}-report-", "OUTPUT_PREFIX": f"{self._prefix}-address-"}
        netloader = request.get("load_format", "netloader") == "netloader"
        self._process.ask(
            {
                "model": model,
                "digests": True,
                **request,
                "extra": {"LISTEN_HOST": "127.0.0.1", **files, **extra} if netloader else extra,
                "engine": {"skip_tokenizer_init": True, **engine},
            }
        )

    @property
    def process(self) -> VllmProcess:
        assert self._process is not None, "the process has gone on to another load"
        return self._process

    @property
    def log(self) -> Path:
        return self.process.log

    def log_text(self) -> str:
        """What the process has logged since this load began."""
        return self.log.read_bytes()[self._log_begins :].decode(errors="replace")

    def finish_loading(self) -> Loader:
        """Waits for the result. Raises LoadFailed when there is none."""
        reply = self.process.reply()
        if "error" in reply:
            raise LoadFailed(f"the load failed with {reply['error']}:\n{self.log_text()[-4000:]}")
        self.result = reply["result"]
        return self

    def fails_with(self) -> str:
        """Waits for a load that must fail, and returns its error."""
        reply = self.process.reply()
        assert "error" in reply, f"the load succeeded:\n{self.log_text()[-4000:]}"
        error: str = reply["error"]
        return error

    def reload(
        self,
        prompts: list[Any] | None = None,
        *,
        directly: bool = False,
        replace_while_reading: Sequence[str] = (),
        **arguments: Any,
    ) -> None:
        """Begins vLLM's `reload_weights`, or the loader's `load_weights`; `finish_loading` or `fails_with` waits."""
        asking = {"directly": directly} if prompts is None else {"directly": directly, "prompts": prompts}
        self.process.ask({"reload": arguments, "replace_while_reading": replace_while_reading, **asking})

    def call(self, method: str, **arguments: Any) -> None:
        """Calls a method of the engine that is held. Raises AssertionError, with the log, if it failed."""
        self.process.ask({"call": method, "arguments": arguments})
        reply = self.process.reply()
        assert "result" in reply, f"{method} failed with {reply}:\n{self.log_text()[-4000:]}"

    def ask(self, prompts: list[Any]) -> list[Any]:
        """What the engine that is held answers to `prompts` now."""
        self.process.ask({"ask": prompts})
        answers: list[Any] = self.finish_loading().answers
        return answers

    def routes(self, prompts: list[Any]) -> list[Any]:
        """The experts that each token takes in each layer: of `prompts`, and of the answers but for the last token."""
        self.process.ask({"routes": prompts})
        routes: list[Any] = self.finish_loading().answers
        return routes

    @property
    def digests(self) -> dict[str, str]:
        digests: dict[str, str] = self.result["digests"]
        return digests

    @property
    def answers(self) -> list[Any]:
        answers: list[Any] = self.result["answers"]
        return answers

    @property
    def report(self) -> dict[str, Any]:
        return self.report_of("target")

    def report_of(self, role: str) -> dict[str, Any]:
        suffix = "" if role == "target" else f"-{role}"
        report: dict[str, Any] = json.loads(Path(f"{self._prefix}-report-{self._rank}{suffix}.json").read_text())
        return report

    @property
    def address(self) -> str:
        return Path(f"{self._prefix}-address-{self._rank}.txt").read_text().strip()

    def arena_bytes(self) -> int:
        """How many bytes of the process's memory are pages of an arena."""
        kibibytes, in_arena = 0, False
        for line in Path(f"/proc/{self.process.process.pid}/smaps").read_text().splitlines():
            if not line.split(" ", 1)[0].endswith(":"):
                in_arena = "memfd:netloader-arena" in line
            elif in_arena and line.startswith("Rss:"):
                kibibytes += int(line.split()[1])
        return kibibytes * 1024

    def end(self) -> None:
        """Frees the process for another load; until that begins, it goes on serving. Idempotent."""
        process, self._process = self._process, None
        if process is not None:
            self._pool.give_back(process)


Load = Callable[..., Loader]
"""Starts a load, as `Pool.load` does."""


@contextlib.contextmanager
def loading(pool: Pool) -> Iterator[Load]:
    """Starts loads, all of which are ended with the block."""
    started: list[Loader] = []

    def start(model: str, extra: dict[str, Any] | None = None, **request: Any) -> Loader:
        started.append(pool.load(model, extra, **request))
        return started[-1]

    try:
        yield start
    finally:
        for loader in started:
            loader.end()


def generation(loader: Loader) -> int:
    holding = next(each for each in inquire(Endpoint.parse(loader.address), 10).holdings if each.role == "target")
    return holding.generation
