"""Chunks that several sessions bring at once: each is settled once, and is never written again."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vllm_ascend.model_loader.netloader.client.swarm import policy
from vllm_ascend.model_loader.netloader.client.swarm.pool import Pool, Share
from vllm_ascend.model_loader.netloader.client.verification import Evidence
from vllm_ascend.model_loader.netloader.transport import digests
from vllm_ascend.model_loader.netloader.transport.chunks.inventory import Chunk, Inventory

CHUNK = 64


@pytest.fixture(autouse=True, scope="module")
def _much_is_asked_for_twice() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy, "TWICE", 1)
        yield


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Pool:
    monkeypatch.setattr(digests, "CHUNK_BYTES", CHUNK)
    monkeypatch.setattr(policy, "FIRST", policy.WINDOW)
    evidence = Evidence(tuple(bytes([number]) for number in range(2)), "c0ffee")
    return Pool(Inventory(2 * CHUNK), evidence, random.Random(1), clock=lambda: 0.0)


def taken(share: Share) -> Chunk:
    chunk = share.next(wait=False)
    assert chunk is not None
    return chunk


def brought(share: Share, chunk: Chunk) -> bool:
    """Whether `chunk`, which `share` has to bring and which passes, is the first of its number."""
    if not share.claim(chunk):
        return False
    share.arrived(chunk, b"")
    return True


def test_a_chunk_arrives_in_its_place_only_where_one_session_works_alone(pool: Pool) -> None:
    first = pool.join(has_all=True)
    assert first.begin(taken(first))
    second = pool.join(has_all=True)
    assert not second.begin(taken(second))


def test_a_chunk_that_passed_is_not_written_again_by_one_who_is_late_and_alone_by_now(pool: Pool) -> None:
    late, quick = pool.join(has_all=True), pool.join(has_all=True)
    chunk = taken(late)
    assert not quick.begin(chunk)
    assert brought(quick, chunk)
    quick.close()
    assert not late.begin(chunk)
    assert not brought(late, chunk)
    assert late.begin(taken(late)), "what is missing may arrive in its place"


def test_nobody_fetches_beside_one_whose_chunk_arrives_in_its_place(pool: Pool) -> None:
    first = pool.join(has_all=True)
    chunks = {taken(first) for _ in range(2)}
    assert all(first.begin(chunk) for chunk in chunks)
    second = pool.join(has_all=True)
    assert second.next(wait=False) is None
    first.close()
    assert {taken(second), taken(second)} == chunks


def test_the_chunks_of_one_who_leaves_are_for_the_others(pool: Pool) -> None:
    first, second = pool.join(has_all=True), pool.join(has_all=True)
    chunk = taken(first)
    first.close()
    assert {taken(second), taken(second)} >= {chunk}
    assert not second.is_complete


def test_who_waits_for_a_chunk_is_told_when_all_have_passed(pool: Pool) -> None:
    first, empty = pool.join(has_all=True), pool.join(has_all=False)
    heard: list[bool] = []
    empty.listen(lambda: heard.append(empty.is_over))
    for _ in range(2):
        chunk = taken(first)
        first.begin(chunk)
        assert brought(first, chunk)
    assert heard[-1]
    assert empty.next(wait=True) is None


class Transfer(RuleBasedStateMachine):
    """Sessions come, take chunks, bring them right or damaged, and go, in any order."""

    CHUNKS = 6

    def __init__(self) -> None:
        super().__init__()
        inventory = Inventory(self.CHUNKS * digests.CHUNK_BYTES)
        evidence = Evidence(tuple(bytes([number]) for number in range(self.CHUNKS)), "c0ffee")
        self.now = 0.0
        self.pool = Pool(inventory, evidence, random.Random(1), clock=lambda: self.now)
        self.open: list[Share] = []
        self.asked: list[tuple[Share, Chunk]] = []
        self.in_place: list[tuple[Share, Chunk]] = []
        self.apart: list[tuple[Share, Chunk]] = []
        self.settled: list[int] = []
        self._bring_the_first()

    def _bring_the_first(self) -> None:
        """Quickly, so that whatever is asked for next is soon late."""
        share = self.pool.join(has_all=True)
        chunk = taken(share)
        self.now += 0.001
        assert share.begin(chunk)
        assert brought(share, chunk)
        self.settled.append(chunk.number)
        self.open.append(share)

    @precondition(lambda self: len(self.open) < 3)
    @rule(has_all=st.sampled_from([True, True, False]))
    def join(self, has_all: bool) -> None:
        self.open.append(self.pool.join(has_all=has_all))

    @precondition(lambda self: self.open)
    @rule(data=st.data(), number=st.integers(0, CHUNKS - 1))
    def hear(self, data: st.DataObject, number: int) -> None:
        data.draw(st.sampled_from(self.open)).has([number])

    @precondition(lambda self: self.open)
    @rule(data=st.data(), seconds=st.floats(0.0, 100.0))
    def take(self, data: st.DataObject, seconds: float) -> None:
        self.now += seconds
        share = data.draw(st.sampled_from(self.open))
        while (chunk := share.next(wait=False)) is not None:
            assert (share, chunk) not in [*self.asked, *self.in_place, *self.apart]
            self.asked.append((share, chunk))

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        share, chunk = self.asked.pop(data.draw(st.integers(0, len(self.asked) - 1)))
        if share.begin(chunk):
            assert chunk.number not in self.settled, "what has passed would be written again"
            assert all(other != chunk for _, other in self.in_place), "two would write to one place"
            self.in_place.append((share, chunk))
        else:
            self.apart.append((share, chunk))

    @precondition(lambda self: self.in_place or self.apart)
    @rule(data=st.data(), passes=st.booleans())
    def finish(self, data: st.DataObject, passes: bool) -> None:
        arriving = self.in_place if not self.apart or (self.in_place and data.draw(st.booleans())) else self.apart
        share, chunk = arriving.pop(data.draw(st.integers(0, len(arriving) - 1)))
        if not passes:
            share.damaged(chunk)
        elif share.claim(chunk):
            assert all(other != chunk for _, other in self.in_place), "another one writes to this place"
            self.settled.append(chunk.number)
            share.arrived(chunk, b"")
        else:
            assert arriving is self.apart, "what arrived in its place is what counts"

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        share = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        share.close()
        for each in (self.asked, self.in_place, self.apart):
            each[:] = [(other, chunk) for other, chunk in each if other is not share]

    @invariant()
    def each_chunk_settles_once(self) -> None:
        assert len(set(self.settled)) == len(self.settled)
        assert set(self.settled) == set(self.pool.passed.since(0, self.CHUNKS))
        assert self.pool.is_complete == (len(self.settled) == self.CHUNKS)

    def teardown(self) -> None:
        """Whatever has happened, one that has everything brings the rest."""
        while self.open:
            self.open.pop().close()
        last = self.pool.join(has_all=True)
        while (chunk := last.next(wait=False)) is not None:
            last.begin(chunk)
            assert brought(last, chunk)
        assert self.pool.is_complete


TestTransfer = Transfer.TestCase
