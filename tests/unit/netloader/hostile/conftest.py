from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from vllm_ascend.model_loader.netloader.client.session import connections


@pytest.fixture
def opened() -> Iterator[contextlib.ExitStack]:
    """For connections, which are closed at the end of the test."""
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture
def brief_explanations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Impostors have nothing to explain when they break off, and time goes by while a client listens for it."""
    monkeypatch.setattr(connections, "EXPLANATION_SECONDS", 0.02)
