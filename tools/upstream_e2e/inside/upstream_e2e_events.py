"""A pytest plugin, loaded into the process that runs upstream's tests: it tells the tool what happens, line by line.

A line is written when a test begins, so that the tool knows which one hangs or takes the process with it.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

KEPT = 60_000
"""Characters of an error and of its output, from their end, in which the tool looks for a reason."""


def tell(**event: Any) -> None:
    with open(os.environ["UPSTREAM_E2E_EVENTS"], "a") as file:
        file.write(json.dumps(event) + "\n")


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.outcome != "passed":
        tell(event="uncollected", test=report.nodeid, outcome=report.outcome, text=_reason(report))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    over = set(Path(os.environ["UPSTREAM_E2E_OVER"]).read_text().splitlines())
    items[:] = [item for item in items if item.nodeid not in over]


def pytest_collection_finish(session: pytest.Session) -> None:
    # Modules that ask for ModelScope have been imported by now. Names of both hubs are in one cache.
    os.environ["VLLM_USE_MODELSCOPE"] = "False"
    tell(event="collected", tests=[item.nodeid for item in session.items])


def pytest_runtest_logstart(nodeid: str) -> None:
    tell(event="start", test=nodeid, at=time.time())


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.outcome != "passed" or report.when == "call":
        tell(event="report", test=report.nodeid, when=report.when, outcome=report.outcome, text=_reason(report))


def pytest_runtest_logfinish(nodeid: str) -> None:
    tell(event="finish", test=nodeid, at=time.time())


def _reason(report: pytest.CollectReport | pytest.TestReport) -> str:
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2]
    output = "\n".join(text for _, text in report.sections)
    return f"{output[-KEPT:]}\n{report.longreprtext[-KEPT:]}"
