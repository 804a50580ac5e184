"""Whole `vllm serve` instances: weights go from one to the next, and every answer is the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from instance import Instance
from loaders import two_free_ports

PROMPTS = ("The capital of France is", "def fibonacci(n):", "Once upon a time,")


@pytest.fixture
def instances() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def answers(instance: Instance) -> list[str]:
    return [instance.complete(prompt) for prompt in PROMPTS]


@pytest.mark.timeout(900)
def test_a_chain_of_instances_gives_equal_answers(smollm2: str, tmp_path: Path, instances: ExitStack) -> None:
    """A loads from disk, B from A; A is killed; C from B by tcp and D, two replicas, from B by process groups."""

    def start(name: str, extra: dict[str, object] | None = None, *arguments: str) -> Instance:
        return instances.enter_context(Instance(name, smollm2, tmp_path, extra, *arguments))

    first = start("A")
    first.wait_until_ready()
    expected = answers(first)
    assert " Paris" in expected[0]

    second = start("B", {"SOURCE": [first.address], "FALLBACK": "error"})
    second.wait_until_ready()
    assert answers(second) == expected
    assert (second.report()["outcome"], second.report()["transport"]) == ("p2p", "shared_memory")
    gone = first.address
    first.kill()

    third = start("C", {"SOURCE": [gone, second.address], "TRANSPORT": ["tcp"], "FALLBACK": "error"})
    third.wait_until_ready()
    assert_came_from(second, third, "tcp")
    assert answers(third) == expected
    assert [attempt["source"] for attempt in third.report()["attempts"]] == [gone]
    third.stop()

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


def assert_came_from(source: Instance, client: Instance, transport: str, rank: int = 0) -> None:
    report = client.report(rank)
    assert (report["outcome"], report["source"], report["transport"]) == ("p2p", source.address, transport)
