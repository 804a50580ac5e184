"""The command line."""

from __future__ import annotations

import argparse
import datetime
import sys
import tempfile
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import tools.upstream_e2e
from support.vllm.fetch_model import CACHE
from tools.upstream_e2e.report import Found, Result, markdown_report, text_report
from tools.upstream_e2e.running import adopt_orphans, install_signal_handlers, run_tests
from tools.upstream_e2e.verdict import judge
from tools.upstream_e2e.workspace import commit_of, copy_tests, environment, group_of

DEFAULT_TESTS = (
    "tests/e2e/pull_request/one_card",
    "tests/e2e/pull_request/two_card",
    "tests/e2e/vllm_interface",
    "tests/e2e/weekly/single_node/engine_func_test_robot",
)


def main() -> int:
    options = _parse()
    if options.markdown:
        print(*markdown_report(Found.load(options.json)), sep="\n")
        return 0

    adopt_orphans()
    install_signal_handlers()
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    found = Found(today, options.commit or commit_of(options.checkout))
    if options.json and options.json.exists():
        found.results = Found.load(options.json).results
    with tempfile.TemporaryDirectory(prefix="upstream-e2e-") as scratch:
        copy_tests(options.checkout, Path(scratch))
        _run(options, Path(scratch), found)
    print("", *text_report(found), sep="\n")
    return int(any(result.verdict == "failed" for result in found.results.values()))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.upstream_e2e",
        description=tools.upstream_e2e.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "tests", nargs="*", default=DEFAULT_TESTS, metavar="TEST", help="files, folders or names of tests"
    )
    parser.add_argument("--checkout", type=Path, help="the root of a checkout of vllm-ascend; it is not changed")
    parser.add_argument("--commit", default="", help="what was checked out, if git does not know it")
    parser.add_argument("--json", type=Path, help="results, written after every test; those that are there stay")
    parser.add_argument("--only-failed", action="store_true", help="leave out what passed or is not runnable in --json")
    parser.add_argument("--markdown", action="store_true", help="run nothing: print --json as a table")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one test; default: 600")
    parser.add_argument(
        "--models", type=Path, default=CACHE / "upstream-e2e", help="where the models are made and kept"
    )
    parser.add_argument("--log", type=Path, default=Path("upstream_e2e.log"), help="all that the tests print")
    options = parser.parse_args()
    if options.markdown and not options.json:
        parser.error("--markdown needs --json")
    if not options.markdown and not options.checkout:
        parser.error("--checkout is needed")
    return options


def _run(options: argparse.Namespace, scratch: Path, found: Found) -> None:
    over = (
        {test for test, result in found.results.items() if result.verdict != "failed"} if options.only_failed else set()
    )
    (scratch / "over").write_text("\n".join(over))
    for tests in processes(files_of(scratch, options.tests)):
        if options.only_failed and all(found.nothing_left_in(test) for test in tests):
            continue
        inner = environment(options.models.resolve(), group_of(tests[0]), scratch)
        log = options.log.resolve()
        for outcome in run_tests(tests, scratch=scratch, environment=inner, log=log, timeout=options.timeout):
            judgement = judge(outcome)
            found.results[outcome.test] = Result(judgement.verdict, judgement.reason, round(outcome.seconds, 1))
            print(f"{judgement.verdict} ({outcome.seconds:.0f} s) {outcome.test} {judgement.reason}", flush=True)
            _save(found, options.json)
        found.ended = sorted({*found.ended, *(test for test in tests if "::" not in test)})
        _save(found, options.json)


def _save(found: Found, path: Path | None) -> None:
    if path:
        found.save(path)


def files_of(scratch: Path, tests: Sequence[str]) -> list[str]:
    """The files below `tests`, as pytest finds them by name; names of tests in a file stay as they are."""
    found: list[str] = []
    for test in tests:
        path = scratch / test.partition("::")[0]
        if not path.exists():
            raise FileNotFoundError(f"{test} is not in the checkout")
        if path.is_dir():
            found += [str(file.relative_to(scratch)) for file in sorted(path.rglob("test_*.py"))]
        else:
            found.append(test)
    return list(dict.fromkeys(found))


def processes(tests: Sequence[str]) -> list[list[str]]:
    """Which tests run in one process: those of a file, and those of a group that shares a server."""

    def shared(test: str) -> str:
        group = group_of(test)
        return group.folder if group.one_process else test.partition("::")[0]

    return [list(each) for _, each in groupby(tests, key=shared)]


if __name__ == "__main__":
    sys.exit(main())
