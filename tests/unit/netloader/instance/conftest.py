from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from support.engines import close_listeners


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Each test begins and ends without a listener."""
    yield
    gc.collect()
    close_listeners()
