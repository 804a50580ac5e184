"""What was found, on disk after every test, and as tables."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import msgspec

from tools.upstream_e2e.verdict import Verdict


class Result(msgspec.Struct, frozen=True):
    verdict: Verdict
    reason: str
    seconds: float


class Found(msgspec.Struct):
    date: str
    commit: str
    results: dict[str, Result] = {}
    """By the name that pytest gives the test."""
    ended: list[str] = []
    """Files of which all tests have results."""

    def nothing_left_in(self, file: str) -> bool:
        results = [result for test, result in self.results.items() if test.partition("::")[0] == file]
        return file in self.ended and all(result.verdict != "failed" for result in results)

    def save(self, path: Path) -> None:
        """Replaces `path` in one step: an interruption leaves the former file or this one."""
        scratch = path.with_name(f"{path.name}.new")
        scratch.write_bytes(msgspec.json.format(msgspec.json.encode(self)))
        os.replace(scratch, path)

    @staticmethod
    def load(path: Path) -> Found:
        """Raises msgspec.DecodeError or msgspec.ValidationError if `path` was not written by `save`."""
        return msgspec.json.decode(path.read_bytes(), type=Found)


def by_file(results: dict[str, Result]) -> dict[str, list[Result]]:
    files: dict[str, list[Result]] = {}
    for test, result in sorted(results.items()):
        files.setdefault(test.partition("::")[0], []).append(result)
    return files


def counts(results: list[Result]) -> str:
    """In words, like "3 passed, 1 failed"."""
    found = Counter(result.verdict for result in results)
    return ", ".join(
        f"{found[verdict]} {verdict}" for verdict in ("passed", "failed", "not runnable") if found[verdict]
    )


def text_report(found: Found) -> Iterator[str]:
    for file, results in by_file(found.results).items():
        yield f"{file}: {counts(results)}"
        for reason, number in Counter(result.reason for result in results if result.reason).items():
            yield f"    {number} x {reason}"
    yield f"in all: {counts(list(found.results.values()))}"


def markdown_report(found: Found, prefix: str = "tests/e2e/") -> Iterator[str]:
    """A table with a row for each file."""
    yield "| Tests | passed | failed | not runnable | Why |"
    yield "|---|---|---|---|---|"
    for file, results in by_file(found.results).items():
        number = Counter(result.verdict for result in results)
        reasons = "; ".join(dict.fromkeys(result.reason for result in results if result.reason)).replace("|", "\\|")
        columns = [
            file.removeprefix(prefix),
            number["passed"],
            number["failed"],
            number["not runnable"],
            reasons,
        ]
        yield f"| {' | '.join(str(column or '') for column in columns)} |"
