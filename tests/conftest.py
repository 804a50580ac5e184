"""What every test leaves as it found it."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def _no_memory_of_an_accelerator_is_kept() -> Iterator[None]:
    """Other tests start processes on the same accelerator, and vLLM refuses one on which too much is taken.

    torch keeps what a module has freed, for each stream by itself.
    """
    yield
    torch = sys.modules.get("torch")
    if torch is not None and torch.accelerator.is_available():
        gc.collect()
        torch.get_device_module().empty_cache()
