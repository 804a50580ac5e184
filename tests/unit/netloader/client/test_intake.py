"""What a client has taken in: memory that is made once, kept from source to source, and given up with the fetch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from support.sources import SMALL
from vllm_ascend.model_loader.netloader.client.intake import Intake
from vllm_ascend.model_loader.netloader.client.options import FetchOptions
from vllm_ascend.model_loader.netloader.client.verification import Evidence
from vllm_ascend.model_loader.netloader.errors import PeerError, SourceFailed, UnsupportedModel
from vllm_ascend.model_loader.netloader.transport.base import Timeouts
from vllm_ascend.model_loader.netloader.transport.chunks.delivery import Delivery
from vllm_ascend.model_loader.netloader.transport.digests import digest_of
from vllm_ascend.model_loader.netloader.transport.rate import LeastRate
from vllm_ascend.model_loader.netloader.weights.arena import Arena
from vllm_ascend.model_loader.netloader.weights.manifest import Manifest

NBYTES = SMALL.manifest.nbytes
CONTENTS = bytes(range(256)) * (NBYTES // 256 + 1)
EVIDENCE = Evidence((digest_of(memoryview(CONTENTS)[:NBYTES]),), "c0ffee")


class Memory(Arena):
    """An arena that knows whether it was discarded."""

    discarded = False

    def discard(self) -> None:
        self.discarded = True
        super().discard()


class Made:
    """The memories that were made, and the bytes that the progress bar shows."""

    def __init__(self) -> None:
        self.memories: list[Memory] = []
        self.shown: list[int] = []
        options = FetchOptions(
            SMALL.request(), Timeouts(), allocate=self._allocate, progress=self.shown.append, verify=True
        )
        self.intake = Intake(options)

    def _allocate(self, manifest: Manifest) -> Memory:
        memory = Memory.create(manifest.nbytes)
        assert isinstance(memory, Memory)
        self.memories.append(memory)
        return memory

    @contextlib.contextmanager
    def delivery(self, evidence: Evidence | None = EVIDENCE) -> Iterator[Delivery]:
        self.intake.make_memory()
        requests = self.intake.alone() if evidence is None else self.intake.share(evidence, "f00d", has_all=True)
        with contextlib.closing(
            self.intake.delivery(requests, evidence, "10.0.0.1:19000", LeastRate(0, 30.0))
        ) as delivery:
            yield delivery

    def bring(self) -> Memory:
        with self.delivery() as delivery:
            while chunk := delivery.take():
                arrival = delivery.begin(chunk)
                arrival.landing.host[:] = CONTENTS[: chunk.length]
                arrival.advance(chunk.length)
                delivery.finish(arrival)
            assert isinstance(delivery.memory, Memory)
            return delivery.memory


@pytest.fixture
def made() -> Made:
    return Made()


def test_memory_is_made_for_the_first_delivery_and_kept_for_the_next(made: Made) -> None:
    with made.intake:
        assert made.memories == []
        with made.delivery() as first, made.delivery() as second:
            assert [first.memory] == [second.memory] == made.memories


def test_what_one_delivery_brought_is_not_missing_in_the_next(made: Made) -> None:
    with made.intake as intake:
        with pytest.raises(PeerError, match="1 of 1 chunks did not arrive"):
            intake.inventory.require_complete()
        made.bring()
        intake.inventory.require_complete()
        assert intake.is_complete
        assert intake.nbytes_held == NBYTES
        with made.delivery() as delivery:
            assert delivery.remaining == 0
        with made.delivery(None) as delivery:
            assert delivery.remaining == 1
    assert sum(made.shown) == 0


def test_memory_that_nobody_takes_is_discarded_at_the_end(made: Made) -> None:
    with made.intake:
        made.bring()
    assert [memory.discarded for memory in made.memories] == [True]


def test_memory_that_was_released_is_the_callers(made: Made) -> None:
    with made.intake as intake:
        intake.release(made.bring())
    assert [memory.discarded for memory in made.memories] == [False]


def test_where_another_memory_is_released_the_one_that_was_filled_is_discarded(made: Made) -> None:
    with contextlib.closing(Arena.create(NBYTES)) as mapped:
        with made.intake as intake:
            made.bring()
            intake.release(mapped)
    assert [memory.discarded for memory in made.memories] == [True]


def test_where_there_is_no_memory_nothing_is_delivered() -> None:
    def refuse(_: Manifest) -> Arena:
        raise UnsupportedModel("w is sparse")

    with Intake(FetchOptions(SMALL.request(), Timeouts(), allocate=refuse)) as intake:
        with pytest.raises(UnsupportedModel):
            intake.make_memory()


def test_pages_of_another_process_are_all_that_has_to_come(made: Made) -> None:
    with made.intake as intake:
        pages = sealed()
        intake.adopt(pages, EVIDENCE, "f00d")
        assert intake.is_complete
        intake.make_memory()
        with made.delivery() as delivery:
            assert delivery.is_complete
            assert delivery.memory is pages
        intake.settle(EVIDENCE)
        intake.release(pages)
    assert made.memories == []
    assert bytes(pages.reader()) == CONTENTS[:NBYTES]
    assert sum(made.shown) == NBYTES


def test_pages_of_another_process_are_never_filled_with_other_contents(made: Made) -> None:
    """The source that should have confirmed them has others by then. They would be served as they were."""
    pages = sealed()
    with made.intake as intake:
        intake.adopt(pages, Evidence((digest_of(memoryview(CONTENTS)[:NBYTES]),), "0ld"), "f00d")
        with made.delivery(EVIDENCE) as delivery:
            assert delivery.remaining == 1
            assert [delivery.memory] == made.memories
        assert made.bring() is not pages
        intake.settle(EVIDENCE)
    assert sum(made.shown) == NBYTES


def test_pages_of_another_process_come_too_late_where_others_bring_something(made: Made) -> None:
    with made.intake as intake, made.delivery(), contextlib.closing(sealed()) as pages:
        with pytest.raises(SourceFailed, match="comes from elsewhere already"):
            intake.adopt(pages, EVIDENCE, "f00d")
        assert pages.servable


def sealed() -> Arena:
    arena = Arena.create(NBYTES)
    arena.writable()[:] = CONTENTS[:NBYTES]
    arena.seal()
    return arena
