"""The tool that runs upstream's tests: what it makes of their ends, and a run on a checkout in miniature."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tools.upstream_e2e.__main__ import files_of, processes
from tools.upstream_e2e.report import Found, Result, markdown_report, text_report
from tools.upstream_e2e.running import Following, Outcome
from tools.upstream_e2e.verdict import EXPECTED, Expected, Judgement, judge
from tools.upstream_e2e.workspace import copy_tests, group_of

ROOT = Path(__file__).resolve().parents[2]


def failed(text: str, test: str = "tests/e2e/test_a.py::test_b") -> Judgement:
    return judge(Outcome(test, "failed", text, 1.0))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "E   ValueError: not supported on NPUs: LoRA adapters (enable_lora)",
            "not supported on NPUs: LoRA adapters (enable_lora)",
        ),
        (
            "E   pydantic_core.ValidationError: 1 validation error for VllmConfig\n"
            "E     Value error, not supported on NPUs: MLA; quantization 'ascend' [type=value_error, input_value=...]",
            "not supported on NPUs: MLA; quantization 'ascend'",
        ),
        (
            "E   ModuleNotFoundError: No module named 'sentence_transformers'",
            "needs the Python package sentence_transformers",
        ),
        (
            "E   ModuleNotFoundError: No module named 'vllm_ascend.compilation.passes'",
            "tests a part of upstream's package: vllm_ascend.compilation.passes",
        ),
        (
            '    raise ValueError("VLLM_USE_V2_MODEL_RUNNER: it needs Triton")\n'
            "E   ValueError: VLLM_USE_V2_MODEL_RUNNER: it needs Triton",
            "VLLM_USE_V2_MODEL_RUNNER: it needs Triton",
        ),
        (
            "E   ImportError: cannot import name 'enable_custom_op' from 'vllm_ascend.utils' (/here/utils.py)",
            "tests a part of upstream's package: enable_custom_op",
        ),
        (
            "E   ImportError: Arctic Inference is required for suffix decoding. Install it.",
            "needs the Python package Arctic Inference",
        ),
        (
            "E     Value error, Unknown quantization method: ascend. Must be one of ['awq', 'fp8']. [type=value_error]",
            "Unknown quantization method: ascend",
        ),
        (
            "E     Value error, Model architectures ['Qwen3_5ForConditionalGeneration'] failed to be inspected. Please",
            "a multimodal model, Qwen3_5ForConditionalGeneration, whose code in vLLM needs the Python package "
            "torchvision",
        ),
        (
            "E     Value error, --quantization ascend is for checkpoints of ModelSlim, which have a file",
            "needs a quantised model (--quantization ascend), and the tool makes none",
        ),
        (
            "E   NameResolutionError: HTTPSConnectionPool(host='assets.example.com', port=443): Failed",
            "loads a file from assets.example.com while it runs, and the tests run without the internet",
        ),
    ],
)
def test_why_a_test_is_not_runnable_is_what_the_process_said(text: str, reason: str) -> None:
    assert failed(f"a line before\n{text}\na line after") == Judgement("not runnable", reason)


def test_another_error_is_a_failure_with_the_first_line_that_pytest_marks() -> None:
    text = "    assert a == b\nE   AssertionError: answers differ\nE   assert 1 == 2\n"
    assert failed(text) == Judgement("failed", "AssertionError: answers differ")
    assert failed("the process is gone") == Judgement("failed", "the process is gone")
    assert failed("WARNING no profiler: No module named 'scalene'\nE   assert 1 == 2").reason == "assert 1 == 2"


def test_a_test_that_upstream_skips_is_not_runnable() -> None:
    judgement = judge(Outcome("tests/e2e/test_a.py::test_b", "skipped", "Skipped: fix me", 0.0))
    assert judgement == Judgement("not runnable", "skipped by upstream: fix me")


def test_a_test_that_passes_says_which_of_its_options_were_ignored() -> None:
    warning = "WARNING additional_config changes nothing on this platform, which reads none of it: scheduler_config\n"
    assert judge(Outcome("a", "passed", warning, 1.0)) == Judgement("passed", "with scheduler_config ignored")
    assert judge(Outcome("a", "passed", "other output", 1.0)) == Judgement("passed", "")


def test_an_expected_error_excuses_its_test_and_no_other_error(monkeypatch: pytest.MonkeyPatch) -> None:
    excuse = Expected("tests/e2e/test_a.py::*", "differs from the golden text", "a random model does not know it")
    monkeypatch.setattr("tools.upstream_e2e.verdict.EXPECTED", [excuse])

    assert failed("E  AssertionError: differs from the golden text").reason == "a random model does not know it"
    assert failed("E  RuntimeError: the engine died").verdict == "failed"
    assert failed("E  differs from the golden text", "tests/e2e/test_c.py::test_b").verdict == "failed"


def test_every_expectation_has_a_reason() -> None:
    assert all(each.reason and each.error for each in EXPECTED)


def test_a_test_ends_as_its_worst_phase_and_one_that_never_ends_fails() -> None:
    following = Following()
    for event in [
        {"event": "collected", "tests": ["a", "b", "c"]},
        {"event": "start", "test": "a"},
        {"event": "report", "test": "a", "outcome": "passed", "text": ""},
        {"event": "report", "test": "a", "outcome": "failed", "text": "in its teardown"},
        {"event": "finish", "test": "a"},
        {"event": "start", "test": "b"},
    ]:
        following.take(json.dumps(event))
    following.finish("gone")

    assert [(each.test, each.kind, each.text) for each in following.done] == [
        ("a", "failed", "in its teardown"),
        ("b", "failed", "gone"),
    ]
    assert following.left() == ["c"]


def test_results_are_kept_and_told_by_file(tmp_path: Path) -> None:
    found = Found("2026-11-26", "182b75e")
    found.results = {
        "tests/e2e/x/test_a.py::test_2": Result("not runnable", "needs the Python package ray", 0.1),
        "tests/e2e/x/test_a.py::test_1[a|b]": Result("passed", "", 61.5),
        "tests/e2e/x/test_b.py::test_1": Result("failed", "AssertionError: 1 | 2", 3.0),
    }
    found.ended = ["tests/e2e/x/test_a.py", "tests/e2e/x/test_b.py"]
    found.save(tmp_path / "found.json")
    found = Found.load(tmp_path / "found.json")

    assert list(text_report(found)) == [
        "tests/e2e/x/test_a.py: 1 passed, 1 not runnable",
        "    1 x needs the Python package ray",
        "tests/e2e/x/test_b.py: 1 failed",
        "    1 x AssertionError: 1 | 2",
        "in all: 1 passed, 1 failed, 1 not runnable",
    ]
    assert list(markdown_report(found))[2:] == [
        "| x/test_a.py | 1 |  | 1 | needs the Python package ray |",
        "| x/test_b.py |  | 1 |  | AssertionError: 1 \\| 2 |",
    ]
    assert found.nothing_left_in("tests/e2e/x/test_a.py")
    assert not found.nothing_left_in("tests/e2e/x/test_b.py")
    assert not found.nothing_left_in("tests/e2e/x/test_c.py")


def test_files_of_a_group_with_one_server_share_a_process() -> None:
    robot = "tests/e2e/weekly/single_node/engine_func_test_robot"
    files = [
        "tests/e2e/test_a.py",
        f"{robot}/tests/test_n.py",
        f"{robot}/tests/test_stop.py",
        "tests/e2e/test_b.py::test_c",
    ]

    assert processes(files) == [files[:1], files[1:3], files[3:]]
    assert group_of(files[1]).one_process
    assert not group_of(files[0]).models


CHECKOUT = {
    "vllm_ascend/__init__.py": "raise AssertionError('the package of the checkout is imported')",
    "tests/__init__.py": "",
    "tests/e2e/conftest.py": "import pytest, vllm_ascend",
    "tests/e2e/short/test_ends.py": """
import pytest, subprocess, sys

def test_that_passes():
    from modelscope import snapshot_download
    from pathlib import Path
    assert (Path(snapshot_download("charent/self_cognition_Alice")) / "adapter_config.json").is_file()

def test_that_fails():
    assert 1 == 2, "one is not two"

def test_that_needs_more():
    raise ValueError("not supported on NPUs: such things")

@pytest.mark.skip(reason="broken")
def test_that_is_skipped():
    pass

def test_that_leaves_a_process():
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"], start_new_session=True)
""",
    "tests/e2e/short/test_import.py": "import package_that_nobody_has",
    "tests/e2e/short/test_hard_ends.py": """
import os, time

def test_that_takes_the_process_with_it():
    os._exit(7)

def test_that_hangs():
    time.sleep(3600)

def test_after_them():
    pass
""",
}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name, program in CHECKOUT.items():
        path = tmp_path / "checkout" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(program)
    return tmp_path / "checkout"


def run_tool(checkout: Path, folder: Path, *arguments: str) -> tuple[int, dict[str, str]]:
    """The status and, by the names of tests alone, verdicts and reasons in the JSON."""
    command = [sys.executable, "-m", "tools.upstream_e2e", "--checkout", str(checkout), "--timeout", "4", *arguments]
    places = [option for name in ("models", "json", "log") for option in (f"--{name}", str(folder / name))]
    done = subprocess.run([*command, *places], cwd=ROOT, check=False, capture_output=True, text=True, timeout=120)
    assert (folder / "json").exists(), done.stderr
    found = Found.load(folder / "json")
    return done.returncode, {
        name.rpartition("/")[2]: f"{each.verdict}: {each.reason}" for name, each in found.results.items()
    }


def test_a_checkout_is_run_to_its_end_whatever_its_tests_do(checkout: Path, tmp_path: Path) -> None:
    status, found = run_tool(checkout, tmp_path, "tests/e2e/short")

    assert status == 1
    assert "pytest ended with status 7" in found.pop("test_hard_ends.py::test_that_takes_the_process_with_it")
    assert found == {
        "test_ends.py::test_that_passes": "passed: ",
        "test_ends.py::test_that_fails": "failed: AssertionError: one is not two",
        "test_ends.py::test_that_needs_more": "not runnable: not supported on NPUs: such things",
        "test_ends.py::test_that_is_skipped": "not runnable: skipped by upstream: broken",
        "test_ends.py::test_that_leaves_a_process": "passed: ",
        "test_import.py": "not runnable: needs the Python package package_that_nobody_has",
        "test_hard_ends.py::test_that_hangs": "failed: timed out: the test took more than 4 s",
        "test_hard_ends.py::test_after_them": "passed: ",
    }
    assert not [each for each in psutil.process_iter(["cmdline"]) if "time.sleep(3600)" in str(each.info["cmdline"])]
    assert sorted(str(path.relative_to(checkout)) for path in checkout.rglob("*") if path.is_file()) == sorted(CHECKOUT)


def test_only_what_failed_runs_again(checkout: Path, tmp_path: Path) -> None:
    run_tool(checkout, tmp_path, "tests/e2e/short/test_ends.py")
    program = checkout / "tests/e2e/short/test_ends.py"
    program.write_text(program.read_text().replace("1 == 2", "1 == 1").replace("not supported on NPUs", "never told"))

    status, found = run_tool(checkout, tmp_path, "--only-failed", "tests/e2e/short/test_ends.py")

    assert status == 0
    assert found["test_ends.py::test_that_fails"] == "passed: "
    assert found["test_ends.py::test_that_needs_more"] == "not runnable: not supported on NPUs: such things"


def test_what_is_no_checkout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="has no tests/e2e"):
        copy_tests(tmp_path, tmp_path / "scratch")
    with pytest.raises(FileNotFoundError, match="is not in the checkout"):
        files_of(tmp_path, ["tests/e2e/test_a.py"])
