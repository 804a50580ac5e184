from __future__ import annotations

import pytest

from vllm_ascend.model_loader.netloader.transport import digests

CHUNK = 1024


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "CHUNK_BYTES", CHUNK)
