"""The versions of vLLM that this package was tried with, as docs/source/getting_started.md lists them.

Nothing else here depends on a version. Netloader asks vLLM for little that changes, and is broken where an import
fails, which `netloader.installation` tells. The platform for NPUs reaches deep into vLLM's worker, so that it would
fail late and in many ways on a version older than the one it is written for. What is newer than all that was tried may
work.
"""

from __future__ import annotations

import functools
import logging
import re
from typing import Final

logger = logging.getLogger(__name__)

NETLOADER: Final = ("0.30", "0.31", "0.32")
NPU_PLATFORM: Final = ("0.32",)
"""Series, in ascending order."""


@functools.cache
def warn_if_untried(what: str, version: str, tried: tuple[str, ...]) -> None:
    """Logs that `what` was not tried with vLLM `version`, once in a process."""
    series, is_release = _parsed(version)
    if not is_release or series not in [_numbers(each) for each in tried]:
        logger.warning(
            "%s was not tried with vLLM %s, only with %s: what goes wrong may be due to that",
            what,
            version,
            in_words(tried),
        )


def require_not_older(what: str, version: str, tried: tuple[str, ...]) -> None:
    """Raises ValueError if vLLM `version` is of an older series than `what` was ever made for."""
    series, _ = _parsed(version)
    if series is not None and series < _numbers(tried[0]):
        raise ValueError(
            f"{what} cannot run on vLLM {version}, because it is made for {in_words(tried)}: install that vLLM, or a "
            f"version of vllm-ascend for yours"
        )


def in_words(series: tuple[str, ...]) -> str:
    *others, last = series
    return f"{', '.join(others)} and {last}" if others else last


def _parsed(version: str) -> tuple[tuple[int, ...] | None, bool]:
    """The series, None where there is none, and whether it is a release: PEP 440 without what follows a plus sign."""
    found = re.match(r"(\d+\.\d+)((?:\.\d+)*(?:\.post\d+)?$)?", version.partition("+")[0])
    return (_numbers(found[1]), found[2] is not None) if found else (None, False)


def _numbers(series: str) -> tuple[int, ...]:
    return tuple(map(int, series.split(".")))
