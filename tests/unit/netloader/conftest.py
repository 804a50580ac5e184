from __future__ import annotations

import math

import pytest

from vllm_ascend.model_loader.netloader.client.search import search


@pytest.fixture(autouse=True)
def one_source_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy the machine is, nobody helps a source that delivers, unless a test wants it."""
    monkeypatch.setattr(search, "HELP_AFTER", math.inf)
