from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator

import pytest

from support.peers.faults import CHUNK
from support.wait import wait_until
from vllm_ascend.model_loader.netloader.client.session import connections
from vllm_ascend.model_loader.netloader.transport import digests


@pytest.fixture
def small_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small chunks, so that small weights have many, and a client that does not listen long for explanations."""
    monkeypatch.setattr(digests, "CHUNK_BYTES", CHUNK)
    monkeypatch.setattr(connections, "EXPLANATION_SECONDS", 0.1)


@pytest.fixture
def nothing_is_left_behind(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """After the test, no thread and no descriptor of proxy, server or client is there that was not before."""
    threads, descriptors, failed = set(threading.enumerate()), open_descriptors(), request.session.testsfailed
    yield
    if request.session.testsfailed > failed:
        return  # its traceback keeps what it had
    caplog.get_records("call").clear()  # logged errors have tracebacks too

    def nothing_is_left() -> bool:
        return set(threading.enumerate()) <= threads and open_descriptors() <= descriptors

    if not nothing_is_left():
        gc.collect()
    wait_until(nothing_is_left)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
