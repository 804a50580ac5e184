from __future__ import annotations

import contextlib
import logging
import random
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.clock import Clock
from vllm_ascend.model_loader.netloader.errors import Damaged, PeerError, SourceTooSlow
from vllm_ascend.model_loader.netloader.transport import digests
from vllm_ascend.model_loader.netloader.transport.chunks.arrival import Arrival, Progress
from vllm_ascend.model_loader.netloader.transport.chunks.delivery import TRIES_PER_CHUNK, Delivery
from vllm_ascend.model_loader.netloader.transport.chunks.inventory import Chunk, Inventory
from vllm_ascend.model_loader.netloader.transport.chunks.requests import InOrder
from vllm_ascend.model_loader.netloader.transport.digests import digest_of
from vllm_ascend.model_loader.netloader.transport.rate import LeastRate
from vllm_ascend.model_loader.netloader.weights.arena import Arena
from vllm_ascend.model_loader.netloader.weights.manifest import chunks

CHUNK, PIECE = 64, 16


@pytest.fixture(autouse=True, scope="module")
def small_chunks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digests, "CHUNK_BYTES", CHUNK)
        patch.setattr(digests, "PIECE_BYTES", PIECE)
        yield


def content_of(nbytes: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(nbytes)


def digests_of(content: bytes) -> tuple[bytes, ...]:
    return tuple(digest_of(memoryview(content)[at : at + n]) for at, n in chunks(len(content), CHUNK))


def altered(content: bytes, *numbers: int) -> bytes:
    """`content` with one bit of each of these chunks changed."""
    result = bytearray(content)
    for number in numbers:
        result[number * CHUNK + 3] ^= 1
    return bytes(result)


def writable(delivery: Delivery) -> memoryview:
    """The memory that is being filled, to be spoilt."""
    assert isinstance(delivery.memory, Arena)
    return delivery.memory.writable()


def next_chunk(delivery: Delivery) -> Chunk:
    chunk = delivery.take()
    assert chunk is not None
    return chunk


class Receiving:
    """An arena to be filled with `content`, and what has been noted of it."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.inventory = Inventory(len(content))
        self.arena = Arena.create(len(content))
        self.progress = 0
        self._bar = Progress(self._advance)

    def close(self) -> None:
        self.arena.close()

    @contextlib.contextmanager
    def delivery(self, digests: tuple[bytes, ...] | None, least: LeastRate | None = None) -> Iterator[Delivery]:
        requests = InOrder(self.inventory, digests)
        self._bar.set(self.inventory.nbytes_held)
        delivery = Delivery(
            self.arena, requests, digests, progress=self._bar, source="10.0.0.1:19000", least_rate=least
        )
        try:
            yield delivery
        finally:
            delivery.close()

    def _advance(self, nbytes: int) -> None:
        self.progress += nbytes

    def bring(self, delivery: Delivery, chunk: Chunk, content: bytes | None = None) -> None:
        """All of `chunk`, with the bytes of `content` where those are others."""
        source = content if content is not None else self.content
        arrival = delivery.begin(chunk)
        arrival.landing.host[:] = source[chunk.offset : chunk.offset + chunk.length]
        arrival.advance(chunk.length)
        delivery.finish(arrival)

    def bring_all(self, delivery: Delivery, content: bytes | None = None) -> list[int]:
        """Returns the numbers of the chunks, in order."""
        numbers = []
        while chunk := delivery.take():
            self.bring(delivery, chunk, content)
            numbers.append(chunk.number)
        return numbers

    def assert_complete(self) -> None:
        self.inventory.require_complete()
        with self.arena.writable() as data:
            assert data == self.content


@pytest.fixture
def receiving() -> Iterator[Callable[[bytes], Receiving]]:
    with contextlib.ExitStack() as arenas:

        def make(content: bytes) -> Receiving:
            return arenas.enter_context(contextlib.closing(Receiving(content)))

        yield make


Receive = Callable[[bytes], Receiving]


@pytest.mark.timeout(60)
def test_each_chunk_is_handed_out_once_however_many_take_them(receiving: Receive) -> None:
    content = content_of(400 * CHUNK + 1)
    received = receiving(content)
    taken: Counter[int] = Counter()
    together, lock = threading.Barrier(8), threading.Lock()

    def work(delivery: Delivery) -> None:
        together.wait()
        while chunk := delivery.take():
            with lock:
                taken[chunk.number] += 1
            received.bring(delivery, chunk)

    with received.delivery(digests_of(content)) as delivery:
        threads = [threading.Thread(target=work, args=(delivery,), daemon=True) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (delivery.received, delivery.remaining, delivery.take()) == (len(content), 0, None)
    assert taken == dict.fromkeys(range(401), 1)
    assert received.progress == len(content)
    received.assert_complete()


@pytest.mark.timeout(60)
def test_chunks_that_arrive_damaged_at_several_threads_are_fetched_until_they_pass(receiving: Receive) -> None:
    content = content_of(100 * CHUNK)
    received = receiving(content)
    still_damaged = Counter({number: number % TRIES_PER_CHUNK for number in range(100)})
    damaged_in_all, wrong = still_damaged.total(), altered(content, *range(100))
    together = threading.Barrier(4)

    def work(delivery: Delivery) -> None:
        together.wait()
        while chunk := delivery.take():
            still_damaged[chunk.number] -= 1
            received.bring(delivery, chunk, wrong if still_damaged[chunk.number] >= 0 else None)

    with received.delivery(digests_of(content)) as delivery:
        threads = [threading.Thread(target=work, args=(delivery,), daemon=True) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert delivery.damaged == damaged_in_all
        assert delivery.received == (100 + damaged_in_all) * CHUNK
    assert received.progress == len(content)
    received.assert_complete()


def test_a_damaged_chunk_returns_to_the_queue(receiving: Receive, caplog: pytest.LogCaptureFixture) -> None:
    content = content_of(3 * CHUNK)
    received = receiving(content)
    with received.delivery(digests_of(content)) as delivery, caplog.at_level(logging.WARNING):
        chunk = next_chunk(delivery)
        received.bring(delivery, chunk, altered(content, 0))
        assert (delivery.remaining, delivery.damaged, received.progress) == (3, 1, 0)
        with pytest.raises(PeerError, match="3 of 3 chunks did not arrive"):
            received.inventory.require_complete()
        assert received.bring_all(delivery) == [1, 2, 0]
        assert delivery.received == 4 * CHUNK
    assert caplog.messages == [
        "chunk 0 (bytes 0 to 63) from 10.0.0.1:19000 arrived damaged: its digest differs; fetching it again"
    ]
    received.assert_complete()


@pytest.mark.parametrize(
    ("number", "place"),
    [(0, "chunk 0 (bytes 0 to 63)"), (1, "chunk 1 (bytes 64 to 127)"), (2, "chunk 2 (bytes 128 to 137)")],
    ids=["first", "second", "short"],
)
def test_a_chunk_that_is_damaged_too_often_ends_the_delivery_by_name(
    receiving: Receive, number: int, place: str
) -> None:
    content = content_of(2 * CHUNK + 10)
    received = receiving(content)
    with received.delivery(digests_of(content)) as delivery:
        with pytest.raises(Damaged, match=rf"^{re.escape(place)} arrived damaged {TRIES_PER_CHUNK} times$"):
            received.bring_all(delivery, altered(content, number))
        assert delivery.damaged == TRIES_PER_CHUNK
        assert delivery.received == len(content) + (TRIES_PER_CHUNK - 1) * received.inventory.chunks[number].length
    assert received.progress == len(content) - received.inventory.chunks[number].length


def test_each_chunk_has_its_own_tries_and_each_source_too(receiving: Receive) -> None:
    content = content_of(4 * CHUNK)
    wrong = altered(content, 0, 1, 2, 3)
    received = receiving(content)
    for _ in range(2):
        with received.delivery(digests_of(content)) as delivery:
            for _ in range((TRIES_PER_CHUNK - 1) * 4):
                chunk = next_chunk(delivery)
                received.bring(delivery, chunk, wrong)
            assert delivery.damaged == (TRIES_PER_CHUNK - 1) * 4
    with received.delivery(digests_of(content)) as delivery:
        assert sorted(received.bring_all(delivery)) == [0, 1, 2, 3]
    received.assert_complete()


@pytest.mark.parametrize("verified", [True, False], ids=["verified", "not verified"])
@pytest.mark.parametrize("arrived", [0, 1, PIECE, CHUNK - 1])
def test_a_chunk_of_which_bytes_are_missing_does_not_pass(receiving: Receive, verified: bool, arrived: int) -> None:
    content = content_of(CHUNK)
    received = receiving(content)
    with received.delivery(digests_of(content) if verified else None) as delivery:
        chunk = next_chunk(delivery)
        writable(delivery)[:] = content
        arrival = delivery.begin(chunk)
        arrival.advance(arrived)
        delivery.finish(arrival)
        assert (delivery.damaged, delivery.remaining, delivery.received) == (1, 1, arrived)
        assert received.progress == 0
        received.bring_all(delivery)
    assert received.progress == CHUNK
    received.assert_complete()


def test_without_digests_whatever_arrives_passes(receiving: Receive) -> None:
    content = content_of(2 * CHUNK)
    received = receiving(content)
    with received.delivery(None) as delivery:
        assert received.bring_all(delivery, altered(content, 1)) == [0, 1]
        assert delivery.damaged == 0
    received.inventory.require_complete()


def test_bytes_are_digested_as_they_come(receiving: Receive) -> None:
    """What is changed in the arena behind the digest is no more seen: the digest has read each byte once."""
    content = content_of(CHUNK)
    received = receiving(content)
    with received.delivery(digests_of(content)) as delivery:
        chunk = next_chunk(delivery)
        arrival = delivery.begin(chunk)
        writable(delivery)[:PIECE] = content[:PIECE]
        arrival.advance(PIECE)
        writable(delivery)[:] = bytes(PIECE) + content[PIECE:]
        arrival.advance(CHUNK - PIECE)
        assert arrival.passes()


@pytest.mark.parametrize("nbytes", [0, 1, CHUNK, CHUNK + 1, 3 * CHUNK])
def test_a_transport_that_leaves_out_a_chunk_is_seen(receiving: Receive, nbytes: int) -> None:
    content = content_of(nbytes)
    received = receiving(content)
    count = len(received.inventory.chunks)
    assert count == -(-nbytes // CHUNK)
    with received.delivery(digests_of(content)) as delivery:
        for left in range(count, 0, -1):
            with pytest.raises(PeerError, match=f"{left} of {count} chunks did not arrive"):
                received.inventory.require_complete()
            chunk = next_chunk(delivery)
            received.bring(delivery, chunk)
        assert delivery.take() is None
    received.assert_complete()


@st.composite
def two_sources(draw: st.DrawFn) -> tuple[bytes, set[int], set[int]]:
    """The contents, the chunks that the first source brings, and those that the second holds differently."""
    content = content_of(draw(st.integers(1, 6 * CHUNK)))
    numbers = st.sets(st.integers(0, (len(content) - 1) // CHUNK))
    return content, draw(numbers), draw(numbers)


def change(content: bytes, numbers: set[int]) -> bytes:
    changed = bytearray(content)
    for number in numbers:
        changed[number * CHUNK] ^= 0xFF
    return bytes(changed)


@given(case=two_sources())
def test_what_one_source_brought_is_kept_unless_the_next_holds_it_differently(
    case: tuple[bytes, set[int], set[int]],
) -> None:
    content, brought, differing = case
    theirs = change(content, differing)
    with contextlib.closing(Receiving(content)) as received:
        with received.delivery(digests_of(content)) as delivery:
            while chunk := delivery.take():
                if chunk.number in brought:
                    received.bring(delivery, chunk)
        assert received.progress == sum(chunk.length for chunk in received.inventory.chunks if chunk.number in brought)
        received.content = theirs
        everything = {chunk.number for chunk in received.inventory.chunks}
        with received.delivery(digests_of(theirs)) as delivery:
            assert set(received.bring_all(delivery)) == everything - (brought - differing)
        assert received.progress == len(content)
        received.assert_complete()


def test_digests_are_compared_and_bytes_are_not_read_again(receiving: Receive) -> None:
    content = content_of(3 * CHUNK)
    received = receiving(content)
    with received.delivery(digests_of(content)) as delivery:
        received.bring_all(delivery)
        writable(delivery)[:] = bytes(len(content))
        assert received.inventory.missing(digests_of(content)) == []


def test_a_source_that_differs_in_one_chunk_brings_exactly_that_one(receiving: Receive) -> None:
    content = content_of(5 * CHUNK)
    received = receiving(content)
    with received.delivery(digests_of(content)) as delivery:
        received.bring_all(delivery)
    theirs = altered(content, 3)
    received.content = theirs
    with received.delivery(digests_of(theirs)) as delivery:
        assert received.progress == 4 * CHUNK
        assert received.bring_all(delivery) == [3]
        assert delivery.received == CHUNK
    received.assert_complete()


@pytest.mark.parametrize(
    ("first", "second"), [(True, False), (False, True), (False, False)], ids=["then not", "then", "never"]
)
def test_what_cannot_be_compared_is_fetched_again(receiving: Receive, first: bool, second: bool) -> None:
    content = content_of(3 * CHUNK)
    received = receiving(content)
    for verified in (first, second):
        with received.delivery(digests_of(content) if verified else None) as delivery:
            assert received.progress == 0
            assert received.bring_all(delivery) == [0, 1, 2]
        assert received.progress == len(content)
    received.assert_complete()


def test_chunks_of_several_sources_are_all_kept(receiving: Receive) -> None:
    content = content_of(4 * CHUNK)
    received = receiving(content)
    for number in range(4):
        with received.delivery(digests_of(content)) as delivery:
            assert received.progress == number * CHUNK
            chunk = next_chunk(delivery)
            assert (chunk.number, delivery.remaining) == (number, 3 - number)
            received.bring(delivery, chunk)
    received.assert_complete()


def test_progress_takes_back_what_a_source_did_not_bring_to_its_end(receiving: Receive) -> None:
    content = content_of(3 * CHUNK)
    received = receiving(content)
    with received.delivery(digests_of(content)) as delivery:
        chunk = next_chunk(delivery)
        received.bring(delivery, chunk)
        chunk = next_chunk(delivery)
        delivery.begin(chunk).advance(PIECE + 1)
        assert received.progress == CHUNK + PIECE + 1
    with received.delivery(digests_of(content)) as delivery:
        assert received.progress == CHUNK
        assert received.bring_all(delivery) == [1, 2]
    assert received.progress == len(content)


@st.composite
def arrivals(draw: st.DrawFn) -> tuple[int, list[tuple[int, int, bool]], dict[int, int]]:
    """Bytes in all; who comes next, how many bytes they bring, and whether they go on to another chunk before they
    finish this one; how often each chunk arrives damaged.
    """
    nbytes = draw(st.integers(0, 6 * CHUNK))
    steps = st.tuples(st.integers(0, 3), st.integers(1, CHUNK), st.booleans())
    damaged = st.dictionaries(st.integers(0, 5), st.integers(0, TRIES_PER_CHUNK - 1))
    return nbytes, draw(st.lists(steps, max_size=60)), draw(damaged)


class Connection:
    """Brings one chunk after another, a few bytes at a time."""

    def __init__(self, delivery: Delivery, content: bytes, left_damaged: Counter[int]) -> None:
        self._delivery = delivery
        self._content = content
        self._left_damaged = left_damaged
        self._arrival: Arrival | None = None
        self._position = 0
        self._spoils_at: int | None = None

    def step(self, nbytes: int, finish_at_once: bool = True) -> bool:
        """Whether there was anything to do."""
        if self._arrival is None:
            chunk = self._delivery.take()
            if chunk is None:
                return False
            self._arrival = self._delivery.begin(chunk)
            self._position = chunk.offset
            self._spoils_at = None
            if self._left_damaged[chunk.number] > 0:
                self._left_damaged[chunk.number] -= 1
                self._spoils_at = chunk.offset + nbytes % chunk.length
            return True
        chunk = self._arrival.chunk
        end = min(self._position + nbytes, chunk.offset + chunk.length)
        if end > self._position:
            piece = bytearray(self._content[self._position : end])
            if self._spoils_at is not None and self._position <= self._spoils_at < end:
                piece[self._spoils_at - self._position] ^= 0x10
            writable(self._delivery)[self._position : end] = piece
            self._arrival.advance(end - self._position)
            self._position = end
        if self._position == chunk.offset + chunk.length and finish_at_once:
            self._delivery.finish(self._arrival)
            self._arrival = None
        return True


@given(case=arrivals())
def test_in_whatever_order_bytes_arrive_all_are_there_and_right(
    case: tuple[int, list[tuple[int, int, bool]], dict[int, int]],
) -> None:
    nbytes, steps, damaged = case
    content = content_of(nbytes)
    with contextlib.closing(Receiving(content)) as received:
        left_damaged = Counter(damaged)
        lengths = {chunk.number: chunk.length for chunk in received.inventory.chunks}
        damaged_bytes = sum(lengths[number] * times for number, times in damaged.items() if number in lengths)
        with received.delivery(digests_of(content)) as delivery:
            connections = [Connection(delivery, content, left_damaged) for _ in range(4)]
            for who, count, finish_at_once in steps:
                connections[who].step(count, finish_at_once)
                assert 0 <= received.progress <= nbytes
            while any(connection.step(CHUNK) for connection in connections):
                pass
            assert delivery.received == nbytes + damaged_bytes
        assert received.progress == nbytes
        received.assert_complete()


def drip(least: LeastRate, clock: Clock, nbytes: int, seconds: float) -> None:
    for _ in range(int(seconds)):
        clock.now += 1.0
        least.note(nbytes)


@pytest.mark.parametrize(("per_second", "is_left"), [(1, True), (99, True), (100, False), (10_000, False)])
def test_a_source_that_drips_is_left_after_the_window(per_second: int, is_left: bool) -> None:
    clock = Clock(0.0)
    least = LeastRate(100, 30.0, clock=clock)
    drip(least, clock, per_second, 29)
    if is_left:
        slow = f"it sent {30 * per_second} bytes in 30 s: less than MIN_BANDWIDTH, 100 "
        with pytest.raises(SourceTooSlow, match=slow):
            drip(least, clock, per_second, 1)
    else:
        drip(least, clock, per_second, 300)


def test_a_source_that_begins_to_drip_is_left_one_window_later_whatever_it_sent_before() -> None:
    clock = Clock(0.0)
    least = LeastRate(100, 30.0, clock=clock)
    drip(least, clock, 1_000_000, 45)
    with pytest.raises(SourceTooSlow):
        drip(least, clock, 1, 60)
    assert clock.now <= 45 + 2 * 30 + 1


def test_a_source_that_drips_is_kept_for_as_long_as_there_is_no_other_way() -> None:
    clock, others = Clock(0.0), list[str]()
    least = LeastRate(100, 30.0, lambda: bool(others), clock)
    drip(least, clock, 1, 1000)
    others.append("another source")
    with pytest.raises(SourceTooSlow):
        drip(least, clock, 1, 31)


def test_a_rate_of_zero_leaves_nobody() -> None:
    clock = Clock(0.0)
    drip(LeastRate(0, 30.0, clock=clock), clock, 0, 1000)


def test_a_delivery_that_is_too_slow_fails_where_its_bytes_arrive(receiving: Receive) -> None:
    content, clock = content_of(2 * CHUNK), Clock(0.0)
    received = receiving(content)
    with received.delivery(digests_of(content), LeastRate(100, 30.0, clock=clock)) as delivery:
        arrival = delivery.begin(next_chunk(delivery))
        arrival.advance(1)
        clock.now = 31.0
        with pytest.raises(SourceTooSlow):
            arrival.advance(1)


def test_a_delivery_that_is_broken_off_hands_out_nothing_more_and_takes_in_what_is_on_its_way(
    receiving: Receive,
) -> None:
    content = content_of(3 * CHUNK)
    received = receiving(content)
    with received.delivery(digests_of(content)) as delivery:
        chunk = next_chunk(delivery)
        delivery.break_off()
        assert delivery.take() is None
        received.bring(delivery, chunk)
        assert not delivery.over.is_set()
    assert delivery.over.is_set()
    assert [chunk.number for chunk in received.inventory.missing(digests_of(content))] == [1, 2]
