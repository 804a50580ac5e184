"""Chunks that several sessions bring at once: each is settled once, and is never written again."""

from __future__ import annotations

import random

import pytest

from vllm_ascend.model_loader.netloader.client.swarm.pool import Pool, Share
from vllm_ascend.model_loader.netloader.client.verification import Evidence
from vllm_ascend.model_loader.netloader.transport import digests
from vllm_ascend.model_loader.netloader.transport.chunks.inventory import Chunk, Inventory

CHUNK = 64


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Pool:
    monkeypatch.setattr(digests, "CHUNK_BYTES", CHUNK)
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
