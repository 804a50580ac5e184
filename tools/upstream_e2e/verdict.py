"""What the end of a test means: passed, failed, or not runnable and why.

The reason is taken from what the process itself said: refusals of this platform and of vLLM, packages and parts of
upstream's package that are not here, upstream's own marks. `EXPECTED` is for the rest: tests that a small random model
cannot pass, each with the error that is then expected. Another error of such a test is a failure like any other.
"""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass
from typing import Literal

from tools.upstream_e2e.running import Outcome

Verdict = Literal["passed", "failed", "not runnable"]
LONGEST_REASON = 240


@dataclass(frozen=True)
class Judgement:
    verdict: Verdict
    reason: str


@dataclass(frozen=True)
class Expected:
    test: str
    """A pattern of names as of files."""
    error: str
    """A pattern of what is then said."""
    reason: str


EXPECTED: list[Expected] = [
    Expected(
        "*/test_spec_decode.py::test_hang",
        r"update the filler if the tokenizer changed",
        "wants prompts of an exact number of tokens, which only the named model's tokenizer makes of their text",
    ),
]

REFUSALS = [
    re.compile(pattern)
    for pattern in (
        r"(?:ValueError: |Value error, )(not supported on NPUs: [^\n\[]+)",
        r"(quantization '\w+' is not supported on NPUs)",
        r"Value error, (Unknown quantization method: \w+)",
        r"(?:ValueError: |Value error, )(VLLM_USE_V2_MODEL_RUNNER: [^\n\[]+)",
        r"(?:ValueError: |Value error, )([\w.]+ is not supported on NPUs[^\n\[]*)",
    )
]
NOT_READ = re.compile(r"additional_config changes nothing on this platform[^\n]*: ([\w, ]+)")
MISSING = [
    (re.compile(r"No module named '(vllm_ascend\.[\w.]+)'"), "tests a part of upstream's package: {}"),
    (re.compile(r"cannot import name '(\w+)' from 'vllm_ascend"), "tests a part of upstream's package: {}"),
    (re.compile(r"ModuleNotFoundError: No module named '([\w.]+)'"), "needs the Python package {}"),
    (re.compile(r"ImportError: ([\w ]+) is required for"), "needs the Python package {}"),
    (
        re.compile(r"Model architectures \['(\w+ForConditionalGeneration)'\] failed to be inspected"),
        "a multimodal model, {}, whose code in vLLM needs the Python package torchvision",
    ),
    (
        re.compile(r"(--quantization ascend) is for checkpoints of ModelSlim"),
        "needs a quantised model ({}), and the tool makes none",
    ),
    (
        re.compile(r"HTTPSConnectionPool\(host='([\w.-]+)'"),
        "loads a file from {} while it runs, and the tests run without the internet",
    ),
]


def judge(outcome: Outcome) -> Judgement:
    if outcome.kind == "passed":
        without = NOT_READ.search(outcome.text)
        return Judgement("passed", f"with {_short(without[1])} ignored" if without else "")
    if outcome.kind == "skipped":
        return Judgement("not runnable", f"skipped by upstream: {_short(outcome.text.removeprefix('Skipped: '))}")
    for pattern in REFUSALS:
        if found := pattern.search(outcome.text):
            return Judgement("not runnable", _short(found[1]))
    for pattern, reason in MISSING:
        if found := pattern.search(outcome.text):
            return Judgement("not runnable", reason.format(found[1]))
    for expected in EXPECTED:
        if fnmatch.fnmatchcase(outcome.test, expected.test) and re.search(expected.error, outcome.text):
            return Judgement("not runnable", expected.reason)
    return Judgement("failed", _short(last_error(outcome.text)))


def last_error(text: str) -> str:
    """The line that names the error, as pytest marks it; the last line if there is none."""
    marked = [line[2:].strip() for line in text.splitlines() if line.startswith("E ")]
    return marked[0] if marked else (text.strip().splitlines() or ["no reason was told"])[-1]


def _short(text: str) -> str:
    one_line = " ".join(text.split())
    return one_line if len(one_line) <= LONGEST_REASON else f"{one_line[: LONGEST_REASON - 3]}..."
