from __future__ import annotations

import pytest

from support.members import CHUNK
from vllm_ascend.model_loader.netloader.client.search import search
from vllm_ascend.model_loader.netloader.transport import digests


@pytest.fixture(autouse=True)
def small_chunks_and_help_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "CHUNK_BYTES", CHUNK)
    monkeypatch.setattr(search, "HELP_AFTER", 0.0)
