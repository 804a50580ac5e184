"""Real engines that start at once from one server bring the weights to one another.

All of them share the processes of the other tests, in which vLLM has been imported by then, so that their loads begin
together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from support.ports import free_port
from support.vllm.loaders import Load, Loader
from support.wait import wait_until
from vllm_ascend.model_loader.netloader.client.inquiry import inquire
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import SourceError, TransportError

PROMPTS = [[1, 504, 3575, 282, 4649, 314], [1, 1604, 16, 6130, 24]]
SLOWLY = 16_000_000
"""Bytes per second of the first server: one copy takes seventeen seconds, longer than all take to begin."""

pytestmark = pytest.mark.timeout(600)


@dataclass(frozen=True)
class Starting:
    """An engine that loads the model from a server, and the address at which it relays meanwhile."""

    loader: Loader
    address: Endpoint

    @property
    def held(self) -> float:
        """Which part of the weights it has."""
        try:
            holdings = inquire(self.address, 10).holdings
        except (SourceError, TransportError):  # it does not listen yet
            return 0.0
        return holdings[0].held / holdings[0].nbytes if holdings else 0.0


def start(load: Load, model: str, server: Loader, **extra: object) -> Starting:
    address = Endpoint("127.0.0.1", free_port())
    extra = {"SOURCE": [server.address], "TRANSPORT": ["tcp"], "LISTEN_PORT": address.port, **extra}
    return Starting(load(model, extra, prompts=PROMPTS), address)


def finished(starting: Sequence[Starting]) -> list[Loader]:
    return [each.loader.finish_loading() for each in starting]


def test_engines_that_start_together_bring_the_weights_to_one_another(smollm2: str, untied: str, load: Load) -> None:
    """Four from one server; then two more, and the server dies when both have half."""
    warm = [load(untied, {"SERVE": False}).finish_loading() for _ in range(4)]
    server = load(smollm2, {"MAX_BANDWIDTH": SLOWLY}, prompts=PROMPTS).finish_loading()
    for loader in warm:
        loader.end()

    together = [start(load, smollm2, server, FALLBACK="error") for _ in range(4)]
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
    for loader in [load(untied, {"SERVE": False}) for _ in range(2)]:  # only those that begin anew had everything
        loader.finish_loading()
    last = [start(load, smollm2, server, STALL_TIMEOUT=5) for _ in range(2)]
    wait_until(lambda: min(each.held for each in last) > 0.5, 180, interval=0.1)
    server.process.process.kill()
    for loader in finished(last):
        assert loader.answers == server.answers
        assert loader.digests == server.digests
        assert loader.report["outcome"] in ("p2p", "disk")  # whether they had everything together is not known
        assert source in {attempt["source"] for attempt in loader.report["attempts"]}
    assert not server.process.alive
