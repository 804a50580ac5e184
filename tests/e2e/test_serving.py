"""Whole `vllm serve` instances: weights go from one to the next, and every answer is the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from instance import Instance

PROMPTS = ("The capital of France is", "def fibonacci(n):", "Once upon a time,")


@pytest.fixture
def instances() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def answers(instance: Instance) -> list[str]:
    return [instance.complete(prompt) for prompt in PROMPTS]


@pytest.mark.timeout(900)
def test_a_chain_of_instances_gives_equal_answers(smollm2: str, tmp_path: Path, instances: ExitStack) -> None:
    """A loads from disk, B from A; A is killed; C from B by tcp and D from B by a process group, at the same time."""

    def start(name: str, extra: dict[str, object] | None = None) -> Instance:
        return instances.enter_context(Instance(name, smollm2, tmp_path, extra))

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
    fourth = start("D", {"SOURCE": [second.address], "TRANSPORT": ["process_group"], "FALLBACK": "error"})
    for instance, transport in ((third, "tcp"), (fourth, "process_group")):
        instance.wait_until_ready()
        report = instance.report()
        assert (report["outcome"], report["source"], report["transport"]) == ("p2p", second.address, transport)
        assert answers(instance) == expected
    assert [attempt["source"] for attempt in third.report()["attempts"]] == [gone]
    assert answers(second) == expected
