"""Whole `vllm serve` instances: weights go from one to the next, and every answer is the same."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from support.ports import two_free_ports
from support.vllm.instance import START_TIMEOUT, Instance
from support.vllm.loaders import Pool
from support.wait import wait_until
from vllm_ascend.model_loader.netloader.client.inquiry import inquire
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.transport.digests import CHUNK_BYTES
from vllm_ascend.model_loader.netloader.transport.tcp import CONNECTIONS

PROMPTS = ("The capital of France is", "def fibonacci(n):", "Once upon a time,")


@pytest.fixture
def instances(pool: Pool) -> Iterator[ExitStack]:
    pool.end_idle()
    with ExitStack() as stack:
        yield stack


def answers(instance: Instance) -> list[str]:
    return [instance.complete(prompt) for prompt in PROMPTS]


@pytest.mark.timeout(900)
def test_a_chain_of_instances_gives_equal_answers(smollm2: str, tmp_path: Path, instances: ExitStack) -> None:
    """A loads from disk, B from A; A is killed while C takes from both; B brings the rest, and D's two replicas all.

    In the end, neither an orderly stop nor the crash of an engine leaves anything behind.
    """

    def start(name: str, extra: dict[str, object] | None = None, *arguments: str) -> Instance:
        return instances.enter_context(Instance(name, smollm2, tmp_path, extra, *arguments))

    first = start("A", {"MAX_BANDWIDTH": 10_000_000})
    first.wait_until_ready()
    expected = answers(first)
    assert " Paris" in expected[0]

    transports = ["shared_memory", "tcp", "process_group"]
    extra = {"SOURCE": [first.address], "FALLBACK": "error", "TRANSPORT": transports, "MAX_BANDWIDTH": 30_000_000}
    second = start("B", extra)
    second.wait_until_ready()
    assert answers(second) == expected
    assert (second.report()["outcome"], second.report()["transport"]) == ("p2p", "shared_memory")

    killed = first.address
    third = start("C", {"SOURCE": [killed, second.address], "TRANSPORT": ["tcp"], "FALLBACK": "error"})
    wait_until(lambda: inquire(Endpoint.parse(killed), 10).sessions == 1, START_TIMEOUT, interval=0.2)
    time.sleep(2)  # of the 7 that both take for all
    first.kill()
    third.wait_until_ready()
    assert_came_from(second, third, "tcp")
    assert answers(third) == expected
    report = third.report()
    assert {attempt["source"] for attempt in report["attempts"]} == {killed}
    assert report["received"][killed] >= CHUNK_BYTES
    assert report["bytes"] <= sum(report["received"].values()) <= 1.01 * report["bytes"] + CONNECTIONS * CHUNK_BYTES
    third.terminate()
    wait_until(lambda: third.processes() == {}, START_TIMEOUT, interval=0.2)

    port = two_free_ports()
    extra = {"SOURCE": [second.address], "TRANSPORT": ["process_group"], "FALLBACK": "error", "LISTEN_PORT": port}
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
        fourth = start("D", extra, "--data-parallel-size", "2")
    fourth.wait_until_ready()
    for replica in range(2):
        assert_came_from(second, fourth, "process_group", replica)
        assert fourth.report(replica)["listening"] == f"127.0.0.1:{port + replica}"
    assert answers(fourth) == expected
    assert answers(second) == expected

    engine = next(process for process, command in second.processes().items() if "EngineCore" in command)
    os.kill(engine, signal.SIGKILL)
    second.wait_until_ended(60)
    wait_until(lambda: second.processes() == {}, START_TIMEOUT, interval=0.2)
    fourth.terminate()
    wait_until(lambda: fourth.processes() == {}, START_TIMEOUT, interval=0.2)
    assert "@netloader-" not in Path("/proc/net/unix").read_text()


def assert_came_from(source: Instance, client: Instance, transport: str, rank: int = 0) -> None:
    report = client.report(rank)
    assert (report["outcome"], report["source"], report["transport"]) == ("p2p", source.address, transport)
