from __future__ import annotations

import math
import secrets

import pytest

from vllm_ascend.model_loader.netloader.client import neighbours
from vllm_ascend.model_loader.netloader.client.search import search


@pytest.fixture(autouse=True)
def one_source_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy the machine is, nobody helps a source that delivers, unless a test wants it."""
    monkeypatch.setattr(search, "HELP_AFTER", math.inf)


@pytest.fixture(autouse=True)
def neighbours_of_this_test_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others on this machine may run the same test at this moment."""
    monkeypatch.setattr(neighbours, "PURPOSE", secrets.token_bytes(16))
