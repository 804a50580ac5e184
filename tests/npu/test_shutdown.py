"""A server on an NPU ends when it is told to, and nobody has to be killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.vllm import checkpoints
from support.vllm.instance import Instance

pytestmark = pytest.mark.slow


def test_a_server_ends_by_itself_when_it_is_told_to(tmp_path: Path) -> None:
    """Within two minutes, where by default it has five seconds: what hangs does not end then either."""
    arguments = ("--skip-tokenizer-init", "--shutdown-timeout", "120")
    with Instance("server", checkpoints.dense(tmp_path), tmp_path, None, *arguments, npus="0") as server:
        server.wait_until_ready()
        server.ask_to_end()
        assert server.wait_until_ended() == 0, server.log_tail()
    log = server.log.read_text()
    assert "EngineCore: exiting busy loop" in log
    assert "force killing" not in log
