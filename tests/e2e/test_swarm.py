"""Real engines that start at once from one server bring the weights to one another.

All of them share the processes of the other tests, in which vLLM has been imported by then, so that their loads begin
together.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.ports import free_port
from support.vllm.loaders import Load, Loader
from support.wait import wait_until
from vllm_ascend.model_loader.netloader.client.inquiry import inquire
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import SourceError, TransportError
from vllm_ascend.model_loader.netloader.wire.access import Access

PROMPTS = [[1, 504, 3575, 282, 4649, 314], [1, 1604, 16, 6130, 24]]
SLOWLY = 16_000_000
"""Bytes per second of the first server: one copy takes seventeen seconds, longer than all take to begin."""

pytestmark = pytest.mark.timeout(600)


@dataclass(frozen=True)
class Starting:
    """An engine that loads the model from a server, and the address at which it relays meanwhile."""

    loader: Loader
    address: Endpoint
    access: Access

    @property
    def held(self) -> float:
        """Which part of the weights it has."""
        try:
            holdings = inquire(self.address, 10, self.access).holdings
        except (SourceError, TransportError):  # it does not listen yet
            return 0.0
        return holdings[0].held / holdings[0].nbytes if holdings else 0.0

    @property
    def clients(self) -> int:
        """How many take from it, or wait for it."""
        return inquire(self.address, 10, self.access).sessions


def start(load: Load, model: str, server: Loader, token: Path, **extra: object) -> Starting:
    address = Endpoint("127.0.0.1", free_port())
    own = {"SOURCE": [server.address], "TRANSPORT": ["tcp"], "LISTEN_PORT": address.port, "TOKEN_FILE": str(token)}
    return Starting(load(model, {**own, **extra}, prompts=PROMPTS), address, Access.load(str(token)))


def finished(starting: Sequence[Starting]) -> list[Loader]:
    return [each.loader.finish_loading() for each in starting]


def test_engines_that_start_together_bring_the_weights_to_one_another(
    smollm2: str, untied: str, load: Load, tmp_path: Path
) -> None:
    """Four from one server; two that share pages, of which one dies; then two more, and the server dies when both have
    half.
    """
    warm = [load(untied, {"SERVE": False}).finish_loading() for _ in range(4)]
    token = tmp_path / "token"  # so that engines of other runs are no neighbours
    token.write_text(secrets.token_hex(16))
    extra = {"MAX_BANDWIDTH": SLOWLY, "TRANSPORT": ["tcp"], "TOKEN_FILE": str(token)}
    server = load(smollm2, extra, prompts=PROMPTS).finish_loading()
    for loader in warm:
        loader.end()

    together = [start(load, smollm2, server, token, FALLBACK="error") for _ in range(4)]
    loaders = finished(together)
    reports = [loader.report for loader in loaders]
    nbytes, source = reports[0]["bytes"], server.address
    assert [loader.answers for loader in loaders] == [server.answers] * 4
    assert [loader.digests for loader in loaders] == [server.digests] * 4
    assert {(report["outcome"], report["source"]) for report in reports} == {("p2p", source)}
    assert [report["attempts"] for report in reports] == [[]] * 4

    # Each has taken something from another one. So has the one that was done first, when all others still loaded.
    assert all(report["received"][source] < nbytes for report in reports)
    assert sum(report["received"][source] for report in reports) < 2.5 * nbytes
    assert all(sum(report["received"].values()) < 1.1 * nbytes for report in reports)

    for loader in loaders:
        loader.end()
    sharing = [
        start(load, smollm2, server, token, TRANSPORT=["shared_memory", "tcp"], FALLBACK="error") for _ in range(2)
    ]
    wait_until(
        lambda: any(each.held > 0.5 and each.clients for each in sharing) or all(each.held == 1 for each in sharing),
        180,
        interval=0.1,
    )
    first, second = sorted(sharing, key=lambda each: each.held, reverse=True)
    assert (done := second.held) in (0, 1)  # while the first loads, the second has no memory of its own
    time.sleep(1)  # until the second has been told what the first has
    first.loader.process.process.kill()
    (loader,) = finished([second])
    assert (loader.answers, loader.digests) == (server.answers, server.digests)
    came, saved = (sum(loader.report[kind].values()) for kind in ("received", "shared"))
    assert nbytes <= came + saved < 1.1 * nbytes
    assert saved or done
    loader.end()

    for loader in [load(untied, {"SERVE": False}) for _ in range(2)]:  # only those that begin anew had everything
        loader.finish_loading()
    last = [start(load, smollm2, server, token, STALL_TIMEOUT=5) for _ in range(2)]
    wait_until(lambda: min(each.held for each in last) > 0.5, 180, interval=0.1)
    server.process.process.kill()
    for loader in finished(last):
        assert loader.answers == server.answers
        assert loader.digests == server.digests
        assert loader.report["outcome"] in ("p2p", "disk")  # whether they had everything together is not known
        assert source in {attempt["source"] for attempt in loader.report["attempts"]}
    assert not server.process.alive
