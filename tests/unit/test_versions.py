"""What the versions of vLLM mean to somebody who has another one."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from vllm_ascend import versions

PAGES = Path(versions.__file__).parents[1] / "docs" / "source"
TRIED = ("0.9", "0.10")


@pytest.fixture(autouse=True)
def _nobody_was_warned() -> None:
    versions.warn_if_untried.cache_clear()


@pytest.mark.parametrize("version", ["0.9.0", "0.10.0", "0.10.1", "0.10.0.post2", "0.10.0+cpu", "0.10.2+empty"])
def test_a_release_of_a_series_that_was_tried_is_nothing_to_tell(
    version: str, caplog: pytest.LogCaptureFixture
) -> None:
    versions.warn_if_untried("It", version, TRIED)
    assert not caplog.records


@pytest.mark.parametrize("version", ["0.8.5", "0.11.0", "1.0.0", "0.10.0rc1", "0.10.1.dev7+g0123abc.cpu", "dev"])
def test_what_was_not_tried_is_told_once(version: str, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        versions.warn_if_untried("It", version, TRIED)
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(f"It was not tried with vLLM {version}, only with 0.9 and 0.10: ")


@pytest.mark.parametrize("version", ["0.8.5", "0.8.9+empty", "0.8.10.dev3"])
def test_what_is_older_than_a_part_that_needs_more_is_refused(version: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"It cannot run on vLLM {version}, because it is made for 0.9")):
        versions.require_not_older("It", version, TRIED)


@pytest.mark.parametrize("version", ["0.9.0", "0.10.0", "0.11.0", "0.9.0rc1", "dev"])
def test_what_is_newer_or_unknown_is_not_refused(version: str) -> None:
    versions.require_not_older("It", version, TRIED)


def test_the_documentation_has_a_row_for_every_series() -> None:
    page = (PAGES / "getting_started.md").read_text()
    rows = re.findall(r"^\| (\d+\.\d+) \| (\w+)[^|]*\| (\w+)", page, flags=re.MULTILINE)
    assert tuple(series for series, netloader, _ in rows if netloader == "yes") == versions.NETLOADER
    assert tuple(series for series, _, on_npus in rows if on_npus == "yes") == versions.NPU_PLATFORM
