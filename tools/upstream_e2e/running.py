"""Runs tests by pytest in a process of their own, and takes away whatever they leave behind.

pytest is followed by the events that the plugin writes. A test that takes too long, or takes the process with it, is a
failure, and those after it are run in another process. This process is the parent of all orphans below it, so that
engines whose test is gone are found and killed; their ports and devices are free for the next file.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

PR_SET_CHILD_SUBREAPER = 36
POLL = 0.2
COLLECTING = 300.0
"""Seconds until the first test must have begun: vLLM is imported before."""


@dataclass
class Outcome:
    test: str
    kind: str
    """passed, failed or skipped, as pytest says it."""
    text: str
    seconds: float


@dataclass
class Following:
    """What the events of one pytest process have told so far."""

    collected: list[str] | None = None
    current: str = ""
    since: float = field(default_factory=time.monotonic)
    reports: list[tuple[str, str]] = field(default_factory=list)
    done: list[Outcome] = field(default_factory=list)

    def take(self, line: str) -> None:
        event = json.loads(line)
        match event["event"]:
            case "collected":
                self.collected = event["tests"]
            case "uncollected":
                self.done.append(Outcome(event["test"], event["outcome"], event["text"], 0.0))
            case "start":
                self.current, self.since, self.reports = event["test"], time.monotonic(), []
            case "report":
                self.reports.append((event["outcome"], event["text"]))
            case "finish":
                self.finish()

    def finish(self, failure: str = "") -> None:
        """Of the current test; `failure` says what ended it if it did not end by itself."""
        kinds = {kind for kind, _ in self.reports} | ({"failed"} if failure else set())
        kind = next((each for each in ("failed", "skipped") if each in kinds), "passed")
        text = "\n".join([*(text for _, text in self.reports), failure]).strip()
        self.done.append(Outcome(self.current, kind, text, time.monotonic() - self.since))
        self.current, self.since = "", time.monotonic()

    def left(self) -> list[str]:
        over = {outcome.test for outcome in self.done}
        return [test for test in self.collected or () if test not in over]


def adopt_orphans() -> None:
    """Makes this process the parent of processes below it whose own parent dies. Raises OSError where it cannot."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def run_tests(
    tests: Sequence[str], *, scratch: Path, environment: dict[str, str], log: Path, timeout: float
) -> Iterator[Outcome]:
    """Runs `tests`, files or names of tests, in `scratch`, and yields what became of each of them as it ends."""
    remaining = list(tests)
    while remaining:
        following = Following()
        yield from _run_once(remaining, following, scratch, environment, log=log, timeout=timeout)
        remaining = following.left()


def _run_once(
    tests: Sequence[str], following: Following, scratch: Path, environment: dict[str, str], *, log: Path, timeout: float
) -> Iterator[Outcome]:
    events = Path(environment["UPSTREAM_E2E_EVENTS"])
    events.write_text("")
    options = ["-p", "upstream_e2e_events", "-p", "no:cacheprovider", "--rootdir", ".", "-q"]
    with events.open() as told, log.open("ab") as output:
        begin = output.tell()
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *options, *tests],
            cwd=scratch,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while process.poll() is None:
                yield from _read(told, following)
                allowed = timeout if following.collected is not None else max(timeout, COLLECTING)
                if time.monotonic() - following.since > allowed:
                    what = "the test" if following.current else "pytest, before a test or after one,"
                    yield from _give_up(following, f"timed out: {what} took more than {allowed:.0f} s", tests)
                    break
                time.sleep(POLL)
            else:
                yield from _read(told, following)
                if following.current or (following.collected is None and not following.done):
                    ending = f"pytest ended with status {process.returncode}: {_output(log, begin)}"
                    yield from _give_up(following, ending, tests)
        finally:
            end_processes()


def _read(told: Iterator[str], following: Following) -> Iterator[Outcome]:
    before = len(following.done)
    for line in told:
        following.take(line)
    yield from following.done[before:]


def _give_up(following: Following, failure: str, tests: Sequence[str]) -> Iterator[Outcome]:
    before = len(following.done)
    if following.current:
        following.finish(failure)
    elif following.collected is None:
        following.done += [Outcome(test, "failed", failure, 0.0) for test in tests]
    elif left := following.left():
        following.done.append(Outcome(left[0], "failed", failure, 0.0))
    yield from following.done[before:]


def _output(log: Path, begin: int) -> str:
    """The end of what was printed since `begin`."""
    return log.read_bytes()[begin:][-2000:].decode(errors="replace").strip()


def end_processes() -> None:
    """Kills all processes below this one, and waits until they are gone."""
    while children := psutil.Process().children(recursive=True):
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(POLL)


def end_with_processes(number: int, _frame: object) -> None:
    """A handler of signals: nothing that was started stays behind."""
    end_processes()
    sys.exit(128 + number)


def install_signal_handlers() -> None:
    signal.signal(signal.SIGTERM, end_with_processes)
