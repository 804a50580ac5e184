"""A load on the oldest vLLM that Netloader was tried with, in an environment of its own beside the one of the tests."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.vllm.loaders import ROOT, Pool
from vllm_ascend import versions

OLDEST = f"{versions.NETLOADER[0]}.0"
PROMPTS = [[1, 5, 9, 13, 17], [2, 4, 8, 16, 32, 64, 128]]


@pytest.fixture
def on_oldest(tmp_path: Path) -> Iterator[Pool]:
    environment = ROOT / f".venv-vllm-{OLDEST}"
    script = ROOT / "tools" / "setup_vllm_version.sh"
    made = subprocess.run(
        [script, sys.prefix, environment, OLDEST], capture_output=True, text=True, timeout=900, check=False
    )
    assert made.returncode == 0, f"{script} failed:\n{made.stdout[-4000:]}{made.stderr[-4000:]}"
    pool = Pool(tmp_path, str(environment / "bin" / "python"))
    yield pool
    pool.end()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_oldest_vllm_takes_weights_and_serves_them(untied: str, fine_tune: str, on_oldest: Pool) -> None:
    plain = on_oldest.load(untied, load_format="auto", prompts=PROMPTS).finish_loading()
    assert f"engine (v{OLDEST})" in plain.log_text()
    expected = plain.answers
    plain.end()
    server = on_oldest.load(untied, prompts=PROMPTS).finish_loading()
    assert (server.report["outcome"], server.answers) == ("disk", expected)
    assert "was not tried" not in server.log_text()
    for transport in ("shared_memory", "tcp"):
        source = {"SOURCE": [server.address], "TRANSPORT": [transport]}
        client = on_oldest.load(untied, source, prompts=PROMPTS).finish_loading()
        assert (client.report["outcome"], client.report["transport"]) == ("p2p", transport)
        assert (client.digests, client.answers) == (server.digests, expected)
        client.end()

    server.reload(PROMPTS, weights_path=fine_tune)
    reloaded = server.finish_loading().answers
    fresh = on_oldest.load(fine_tune, load_format="auto", prompts=PROMPTS).finish_loading()
    assert reloaded == fresh.answers != expected
