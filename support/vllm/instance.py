"""A `vllm serve` process with Netloader: how it is started, watched, asked and ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from support.ports import free_port

START_TIMEOUT = 300.0
KV_CACHE_ON_NPU = 1 << 28
"""Bytes of an instance's KV cache. To measure how much there is room for would take long on the simulator."""


class InstanceFailed(Exception):
    """The process has ended, or has not become ready. The message holds the end of its log."""


class Instance:
    """One `vllm serve MODEL --load-format netloader`, which writes its log, report and address into `directory`.

    `extra` are further keys of Netloader's configuration, and `arguments` further ones of the command. The instance
    runs on CPUs or, with `npus` ("0", "2,3"), on these simulated NPUs, in whose environment this process must run. Use
    it with `with`, or call `start` and `stop`, which ends the whole process group.
    """

    def __init__(
        self,
        name: str,
        model: str,
        directory: Path,
        extra: dict[str, Any] | None = None,
        *arguments: str,
        npus: str | None = None,
    ) -> None:
        self.name = name
        self.log = directory / f"{name}.log"
        self._model = model
        self._report = directory / f"{name}-report-"
        self._address = directory / f"{name}-address-"
        files = {"REPORT_PREFIX": str(self._report), "OUTPUT_PREFIX": str(self._address)}
        self._extra = {"LISTEN_HOST": "127.0.0.1", **files, **(extra or {})}
        self._npus = npus
        self._arguments = arguments
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Starts the process in a session of its own, so that `stop` reaches its children."""
        self._port = free_port()  # vLLM's HTTP server takes no descriptor
        command = [
            *(str(Path(sys.executable).with_name("vllm")), "serve", self._model),
            *("--host", "127.0.0.1", "--port", str(self._port), "--served-model-name", "model"),
            *("--load-format", "netloader", "--model-loader-extra-config", json.dumps(self._extra)),
            *("--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "8"),
            *(() if self._npus is None else ("--kv-cache-memory-bytes", str(KV_CACHE_ON_NPU))),
            *self._arguments,
        ]
        environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_CI_ENV": "1", "VLLM_NO_USAGE_STATS": "1"}
        chosen = {} if self._npus is None else {"ASCEND_RT_VISIBLE_DEVICES": self._npus}
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**environment, **os.environ, **chosen},
                start_new_session=True,
            )

    def wait_until_ready(self, tell: Callable[[str], None] = lambda _: None) -> None:
        """Returns when it answers requests. `tell` is given its latest log line every second. Raises InstanceFailed."""
        end = time.monotonic() + START_TIMEOUT
        for _ in _every_second_until(end):
            if self._process is None or self._process.poll() is not None:
                raise InstanceFailed(f"{self.name} ended while starting:\n{self.log_tail()}")
            tell(self.last_log_line())
            if self._healthy():
                return
        raise InstanceFailed(f"{self.name} was not ready within {START_TIMEOUT:.0f} s:\n{self.log_tail()}")

    def ask_to_end(self) -> None:
        """Tells the front end, as an operator would; the others are for it to end."""
        assert self._process is not None
        self._process.terminate()

    def wait_until_ended(self, timeout: float = START_TIMEOUT) -> int:
        """Waits for a process that ends by itself or was asked to, and returns its exit status.

        Raises subprocess.TimeoutExpired.
        """
        assert self._process is not None
        return self._process.wait(timeout)

    def complete(self, prompt: str, max_tokens: int = 24) -> str:
        """The greedy continuation of `prompt`."""
        body = {"model": "model", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._port}/v1/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            return str(json.load(response)["choices"][0]["text"])

    def report(self, rank: int = 0) -> dict[str, Any]:
        """What Netloader has reported of the load of that rank."""
        report: dict[str, Any] = json.loads(Path(f"{self._report}{rank}.json").read_text())
        return report

    @property
    def address(self) -> str:
        """The address at which its first rank serves its weights."""
        return Path(f"{self._address}0.txt").read_text().strip()

    def kill(self) -> None:
        """Ends the process group at once, as a crash does."""
        self._signal(signal.SIGKILL)

    def terminate(self) -> None:
        """Asks it to end, as an orchestrator does, and waits for that. Raises subprocess.TimeoutExpired."""
        self._signal(signal.SIGTERM)
        self.wait_until_ended(60)

    def processes(self) -> dict[int, str]:
        """Names of the processes of this instance that exist, by process id."""
        assert self._process is not None
        return dict(_session(self._process.pid))

    def stop(self) -> None:
        """Ends the instance in an orderly way, or by force if that takes more than ten seconds. Idempotent."""
        if self._process is None:
            return
        self._signal(signal.SIGTERM)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            pass
        finally:
            self._signal(signal.SIGKILL)
            self._process.wait()

    def last_log_line(self) -> str:
        return self.log_tail(1).strip()

    def log_tail(self, lines: int = 30) -> str:
        text = self.log.read_text(errors="replace").splitlines()
        return "\n".join([line for line in text if line.strip()][-lines:])

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/health", timeout=2) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return


def _session(leader: int) -> Iterator[tuple[int, str]]:
    """The processes of the session that `leader` began; proc(5)."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):  # it ends while we look
                if os.getsid(int(entry.name)) == leader and "State:\tZ" not in (entry / "status").read_text():
                    yield int(entry.name), (entry / "cmdline").read_text().replace("\0", " ").strip()


def _every_second_until(end: float) -> Iterator[None]:
    while time.monotonic() < end:
        yield
        time.sleep(1)


def telling(name: str) -> Callable[[str], None]:
    """An argument for `wait_until_ready`, which prints the latest log line every ten seconds."""
    begun = last = time.monotonic()

    def tell(line: str) -> None:
        nonlocal last
        if time.monotonic() - last >= 10:
            last = time.monotonic()
            print(f"{name}: starting for {last - begun:.0f} s ... {line[-100:]}", flush=True)

    return tell
