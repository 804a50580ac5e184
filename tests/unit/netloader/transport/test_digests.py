from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from vllm_ascend.model_loader.netloader.transport import digests
from vllm_ascend.model_loader.netloader.transport.digests import (
    DIGEST_BYTES,
    PIECE_BYTES,
    StoreDigests,
    digest_of,
    root_of,
    start,
)

CHUNK = 64


@pytest.fixture(autouse=True, scope="module")
def small_chunks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digests, "CHUNK_BYTES", CHUNK)
        yield


def of(data: bytes) -> bytes:
    return digest_of(memoryview(data))


def test_the_digest_is_that_of_the_specification() -> None:
    """The first two test vectors of the BLAKE3 reference implementation."""
    assert of(b"").hex() == "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
    assert of(b"\0").hex() == "2d3adedff11b61f14c886e35afa036736dcd87a74d27b5c1510225d0f592e213"


@pytest.mark.parametrize("surplus", [-1, 0, 1])
def test_a_chunk_of_more_than_one_piece_has_the_digest_of_the_library(surplus: int) -> None:
    data = bytes(range(256)) * (2 * PIECE_BYTES // 256) + b"and a little more"
    data = data[: 2 * PIECE_BYTES + surplus]
    assert of(data) == blake3(data).digest()


@given(data=st.binary(max_size=300), cuts=st.lists(st.integers(0, 300)))
def test_the_pieces_in_which_bytes_come_do_not_matter(data: bytes, cuts: list[int]) -> None:
    running = start()
    for begin, end in pairwise([0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]):
        running.update(memoryview(data)[begin:end])
    assert running.digest() == of(data)
    assert len(of(data)) == DIGEST_BYTES


PARTS = tuple(of(bytes([number])) for number in range(3))
ROOT = root_of("c0ffee", {"lm_head.is_tied": True}, PARTS)


def test_the_root_of_given_contents_stays_what_it_is() -> None:
    """Instances of one version must agree, whenever they were built."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digests, "CHUNK_BYTES", 16 << 20)
        assert root_of("c0ffee", {"b": 1, "a": None}, PARTS) == GOLDEN_ROOT


GOLDEN_ROOT = "d2ef35fae3c4ba82be24512a3c90abc6f613ade81a06ec29c06e03d7f24d531c"


@pytest.mark.parametrize(
    ("manifest", "attributes", "parts"),
    [
        ("c0ffef", {"lm_head.is_tied": True}, PARTS),
        ("c0ffee", {"lm_head.is_tied": False}, PARTS),
        ("c0ffee", {"lm_head.is_tied": 1}, PARTS),
        ("c0ffee", {"lm_head.is_tied": 1.0}, PARTS),
        ("c0ffee", {"lm_head.is_tied": "True"}, PARTS),
        ("c0ffee", {"lm_head.is_bound": True}, PARTS),
        ("c0ffee", {}, PARTS),
        ("c0ffee", {"lm_head.is_tied": True}, PARTS[::-1]),
        ("c0ffee", {"lm_head.is_tied": True}, PARTS[:2]),
        ("c0ffee", {"lm_head.is_tied": True}, (*PARTS, PARTS[0])),
    ],
    ids=[
        "manifest",
        "value",
        "a number for a flag",
        "a fraction for a flag",
        "a text for a flag",
        "name",
        "no attributes",
        "order of chunks",
        "a chunk less",
        "a chunk more",
    ],
)
def test_the_root_differs_where_anything_of_the_contents_does(
    manifest: str, attributes: dict[str, Any], parts: tuple[bytes, ...]
) -> None:
    assert root_of(manifest, attributes, parts) != ROOT


def test_the_root_does_not_depend_on_the_order_in_which_attributes_are_told() -> None:
    assert root_of("c0ffee", {"a": 1, "b": 2}, PARTS) == root_of("c0ffee", {"b": 2, "a": 1}, PARTS)


def test_negative_zero_is_another_number_to_the_root() -> None:
    assert root_of("c0ffee", {"a": 0.0}, PARTS) != root_of("c0ffee", {"a": -0.0}, PARTS)


def test_the_root_is_no_digest_of_the_same_bytes() -> None:
    assert bytes.fromhex(root_of("", {}, ())) != of(b"")
    assert len(ROOT) == 2 * DIGEST_BYTES


class Counting:
    """Tells how often each chunk was digested, and digests one only when `gate` is open."""

    def __init__(self) -> None:
        self.made: Counter[bytes] = Counter()
        self.began = threading.Event()
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, data: memoryview) -> bytes:
        self.began.set()
        self.gate.wait()
        self.made[bytes(data)] += 1
        return of(bytes(data))


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Counting:
    counting = Counting()
    monkeypatch.setattr(digests, "digest_of", counting)
    return counting


DATA = bytes(range(256))
CHUNKS = [DATA[offset : offset + CHUNK] for offset in range(0, len(DATA), CHUNK)]
EXPECTED = tuple(map(of, CHUNKS))
ALL_ONCE = dict.fromkeys(CHUNKS, 1)


def store_digests(data: bytes = DATA, known: Sequence[bytes] = ()) -> StoreDigests:
    return StoreDigests(memoryview(data), known)


def join_maker() -> None:
    for thread in threading.enumerate():
        if thread.name == "netloader-digests":
            thread.join()


def test_digests_are_made_when_asked_for_and_once(counting: Counting) -> None:
    store = store_digests()
    assert counting.made == {}
    assert store.part(1, 2) == EXPECTED[1:3]
    assert counting.made == {CHUNKS[1]: 1, CHUNKS[2]: 1}
    assert not store.complete
    assert store.all() == EXPECTED
    assert store.complete
    assert counting.made == ALL_ONCE


@pytest.mark.timeout(60)
def test_digests_that_were_made_ahead_are_not_made_again(counting: Counting) -> None:
    store = store_digests()
    store.make_ahead()
    join_maker()
    assert counting.made == ALL_ONCE
    assert store.all() == EXPECTED
    assert counting.made == ALL_ONCE


@pytest.mark.timeout(60)
def test_making_ahead_leaves_out_what_was_asked_for_before(counting: Counting) -> None:
    store = store_digests()
    store.part(2, 1)
    store.make_ahead()
    join_maker()
    assert counting.made == ALL_ONCE


@pytest.mark.timeout(60)
def test_making_ahead_ends_with_the_chunk_at_which_it_is_stopped_and_goes_on_from_there(counting: Counting) -> None:
    counting.gate.clear()
    store = store_digests()
    store.make_ahead()
    counting.began.wait()
    stopping = threading.Thread(target=store.stop, daemon=True)
    stopping.start()
    while not store.stopped:
        time.sleep(0.001)
    counting.gate.set()
    stopping.join()
    assert counting.made == {CHUNKS[0]: 1}
    store.make_ahead()
    join_maker()
    assert counting.made == ALL_ONCE
    assert store.all() == EXPECTED


@pytest.mark.timeout(60)
def test_what_was_verified_before_is_served_on_with_the_digests_it_was_verified_by(counting: Counting) -> None:
    store = store_digests(b"?" * len(DATA), EXPECTED)
    assert store.complete
    store.make_ahead()
    join_maker()
    assert store.all() == EXPECTED
    assert counting.made == {}


def test_without_a_thread_digests_are_made_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_thread(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_thread)
    store = store_digests()
    store.make_ahead()
    assert store.all() == EXPECTED
    store.stop()


def test_digests_of_other_data_are_not_taken() -> None:
    with pytest.raises(AssertionError, match="the digests are those of other data"):
        store_digests(DATA, EXPECTED[:3])


@pytest.mark.parametrize(
    ("first", "count", "expected"),
    [(0, 99, EXPECTED), (3, 2, EXPECTED[3:]), (4, 1, ()), (1 << 61, 1, ())],
    ids=["more than there are", "beyond the last", "behind the last", "far behind"],
)
def test_only_digests_of_chunks_that_exist_are_told(first: int, count: int, expected: tuple[bytes, ...]) -> None:
    assert store_digests().part(first, count) == expected


@pytest.mark.parametrize("length", [CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK - 1])
def test_the_last_chunk_may_be_shorter(length: int) -> None:
    data = DATA[:length]
    assert store_digests(data).part(0, 99) == tuple(of(data[at : at + CHUNK]) for at in range(0, length, CHUNK))


def test_an_empty_store_has_no_digests() -> None:
    store = store_digests(b"")
    store.make_ahead()
    assert store.complete
    assert store.part(0, 64) == ()


def test_digests_that_are_made_here_count_once_the_data_is_known_to_be_as_it_was_loaded() -> None:
    asked: list[bool] = []

    def is_as_loaded() -> bool:
        asked.append(store.part(0, 99) == EXPECTED)
        return True

    store = StoreDigests(memoryview(DATA), (), is_as_loaded)
    assert store.part(0, 99) == EXPECTED
    assert not store.complete
    assert store.prove()
    assert store.prove()
    assert store.complete
    assert asked == [True]


def test_digests_of_data_that_was_changed_meanwhile_never_count() -> None:
    store = StoreDigests(memoryview(DATA), (), lambda: False)
    store.make_ahead()
    store.stop()
    assert not store.prove()
    assert not store.complete


def test_digests_that_a_source_has_told_need_no_proof() -> None:
    store = StoreDigests(memoryview(DATA), EXPECTED, lambda: False)
    assert store.complete
    assert store.prove()
