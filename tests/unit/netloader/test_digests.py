from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise

import pytest
import xxhash
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from vllm_ascend.model_loader.netloader import digests
from vllm_ascend.model_loader.netloader.access import derive_key
from vllm_ascend.model_loader.netloader.digests import (
    DIGEST_BYTES,
    GMAC,
    PIECE_BYTES,
    XXH3,
    Algorithm,
    StoreDigests,
)
from vllm_ascend.model_loader.netloader.errors import ProtocolError

CHUNK = 64
TOKEN, OTHER_TOKEN = b"the same on all instances", b"that of another deployment"
PLAIN = Algorithm.named(XXH3, b"", None)
KEYED = Algorithm.named(GMAC, bytes(16), TOKEN)
ALGORITHMS = {"xxh3": PLAIN, "gmac": KEYED}
algorithms = pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS.keys())


@pytest.fixture(autouse=True, scope="module")
def small_chunks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digests, "CHUNK_BYTES", CHUNK)
        yield


def of(algorithm: Algorithm, data: bytes, number: int = 0) -> bytes:
    return algorithm.of(memoryview(data), number)


def gmac(key: bytes, number: int, data: bytes) -> bytes:
    """The tag of no plaintext with `data` as additional data, as the library makes it in one call."""
    return AESGCM(key).encrypt(number.to_bytes(12, "big"), b"", data)


def test_the_digest_without_a_token_is_that_of_the_library() -> None:
    assert of(PLAIN, b"netloader") == xxhash.xxh3_128_digest(b"netloader")
    assert of(PLAIN, b"netloader").hex() == "085eb64ea48db1172985710a7be702ff"
    assert of(PLAIN, b"").hex() == "99aa06d3014798d86001c324468d497f"


def test_the_digest_with_a_token_is_that_of_the_library() -> None:
    key = derive_key(TOKEN, b"netloader data key", bytes(16))
    assert KEYED.key == key
    assert of(KEYED, b"netloader", 7) == gmac(key, 7, b"netloader")
    known = Algorithm(GMAC, b"", bytes(range(32)))
    assert of(known, b"netloader", 7).hex() == "44419170de16f0904de1025adb2160aa"
    assert of(known, b"", 7) == gmac(known.key, 7, b"")


@algorithms
@pytest.mark.parametrize("surplus", [-1, 0, 1])
def test_a_chunk_of_more_than_one_piece_has_the_digest_of_the_library(algorithm: Algorithm, surplus: int) -> None:
    data = bytes(range(256)) * (2 * PIECE_BYTES // 256) + b"and a little more"
    data = data[: 2 * PIECE_BYTES + surplus]
    expected = xxhash.xxh3_128_digest(data) if algorithm is PLAIN else gmac(algorithm.key, 3, data)
    assert of(algorithm, data, 3) == expected


@algorithms
@given(data=st.binary(max_size=300), cuts=st.lists(st.integers(0, 300)), number=st.integers(0, 1 << 64))
def test_the_pieces_in_which_bytes_come_do_not_matter(
    algorithm: Algorithm, data: bytes, cuts: list[int], number: int
) -> None:
    running = algorithm.start(number)
    for begin, end in pairwise([0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]):
        running.update(memoryview(data)[begin:end])
    assert running.finish() == of(algorithm, data, number)
    assert len(of(algorithm, data, number)) == DIGEST_BYTES


@algorithms
@given(data=st.binary(min_size=1, max_size=100), place=st.integers(0, 99), bit=st.integers(0, 7))
def test_every_bit_matters(algorithm: Algorithm, data: bytes, place: int, bit: int) -> None:
    altered = bytearray(data)
    altered[place % len(data)] ^= 1 << bit
    assert of(algorithm, bytes(altered)) != of(algorithm, data)


def test_with_a_token_the_same_bytes_in_another_place_have_another_digest() -> None:
    first, second = b"a" * CHUNK, b"b" * CHUNK
    assert of(KEYED, first, 0) != of(KEYED, first, 1)
    swapped = {of(KEYED, second, 0), of(KEYED, first, 1)}
    assert swapped.isdisjoint({of(KEYED, first, 0), of(KEYED, second, 1)})


@algorithms
def test_the_order_of_chunks_matters_to_the_digests_of_a_store_and_to_that_of_the_whole(algorithm: Algorithm) -> None:
    first, second = b"a" * CHUNK, b"b" * CHUNK
    straight, swapped = (StoreDigests(memoryview(data), algorithm) for data in (first + second, second + first))
    assert all(one != other for one, other in zip(straight.part(0, 2), swapped.part(0, 2), strict=True))
    assert straight.whole != swapped.whole


@algorithms
def test_the_whole_is_the_digest_over_all_digests_under_a_nonce_of_its_own(algorithm: Algorithm) -> None:
    parts = [of(algorithm, bytes([n]), n) for n in range(3)]
    joined = b"".join(parts)
    expected = xxhash.xxh3_128_digest(joined) if algorithm is PLAIN else gmac(algorithm.key, 1 << 64, joined)
    assert algorithm.whole(parts) == expected
    assert algorithm.whole(parts) != algorithm.whole(parts[::-1])
    assert algorithm.whole(parts) != algorithm.whole(parts[:2])


@pytest.mark.parametrize(
    "other",
    [
        Algorithm.named(GMAC, bytes(15) + b"\x01", TOKEN),
        Algorithm.named(GMAC, bytes(16), OTHER_TOKEN),
        Algorithm(GMAC, bytes(16), bytes(32)),
    ],
    ids=["salt", "token", "key"],
)
def test_the_digest_depends_on_what_only_peers_know(other: Algorithm) -> None:
    assert of(other, b"netloader") != of(KEYED, b"netloader")
    assert other != KEYED


def test_peers_with_the_same_token_make_the_same_digests() -> None:
    here = Algorithm.of_new_store(TOKEN)
    there = Algorithm.named(here.name, here.salt, TOKEN)
    assert there == here
    assert of(there, b"netloader", 5) == of(here, b"netloader", 5)


def test_each_new_store_with_a_token_has_a_salt_of_its_own() -> None:
    made = [Algorithm.of_new_store(TOKEN) for _ in range(20)]
    assert {algorithm.name for algorithm in made} == {GMAC}
    assert {len(algorithm.salt) for algorithm in made} == {16}
    assert len({algorithm.salt for algorithm in made}) == len({algorithm.key for algorithm in made}) == 20


def test_a_new_store_without_a_token_needs_no_salt() -> None:
    assert Algorithm.of_new_store(None) == PLAIN


def test_the_key_is_not_shown() -> None:
    algorithm = Algorithm.named(GMAC, b"salt of a store!", TOKEN)
    assert repr(algorithm.key) not in repr(algorithm)
    assert algorithm.key.hex() not in repr(algorithm)


@pytest.mark.parametrize(
    ("name", "token", "expected"),
    [(XXH3, TOKEN, GMAC), (GMAC, None, XXH3), ("crc32", None, XXH3), ("crc32", TOKEN, GMAC), ("", None, XXH3)],
    ids=["weak with a token", "strong without", "unknown without a token", "unknown with one", "empty"],
)
def test_an_algorithm_that_does_not_fit_is_refused(name: str, token: bytes | None, expected: str) -> None:
    with pytest.raises(ProtocolError, match=f"the digests are '{name}': expected '{expected}'"):
        Algorithm.named(name, bytes(16), token)


class CountingAlgorithm:
    """Tells how often the digest of each chunk was made, and makes one only when `gate` is open."""

    def __init__(self) -> None:
        self.made: Counter[int] = Counter()
        self.began = threading.Event()
        self.gate = threading.Event()
        self.gate.set()

    def of(self, data: memoryview, number: int) -> bytes:
        self.began.set()
        self.gate.wait()
        self.made[number] += 1
        return of(PLAIN, bytes(data), number)

    def whole(self, parts: Sequence[bytes]) -> bytes:
        return PLAIN.whole(parts)


DATA = bytes(range(256))
EXPECTED = tuple(of(PLAIN, DATA[offset : offset + CHUNK]) for offset in range(0, len(DATA), CHUNK))


def store_digests(algorithm: object, data: bytes = DATA, known: Sequence[bytes] = ()) -> StoreDigests:
    return StoreDigests(memoryview(data), algorithm, known)  # type: ignore[arg-type]


def join_maker() -> None:
    for thread in threading.enumerate():
        if thread.name == "netloader-digests":
            thread.join()


def test_digests_are_made_when_asked_for_and_once() -> None:
    algorithm = CountingAlgorithm()
    store = store_digests(algorithm)
    assert algorithm.made == {}
    assert store.part(1, 2) == EXPECTED[1:3]
    assert algorithm.made == {1: 1, 2: 1}
    assert store.part(0, 4) == EXPECTED
    assert store.whole == PLAIN.whole(EXPECTED)
    assert algorithm.made == dict.fromkeys(range(4), 1)


@pytest.mark.timeout(60)
def test_digests_that_were_made_ahead_are_not_made_again() -> None:
    algorithm = CountingAlgorithm()
    store = store_digests(algorithm)
    store.make_ahead()
    join_maker()
    assert algorithm.made == dict.fromkeys(range(4), 1)
    assert store.part(0, 4) == EXPECTED
    assert algorithm.made == dict.fromkeys(range(4), 1)


@pytest.mark.timeout(60)
def test_making_ahead_leaves_out_what_was_asked_for_before() -> None:
    algorithm = CountingAlgorithm()
    store = store_digests(algorithm)
    store.part(2, 1)
    store.make_ahead()
    join_maker()
    assert algorithm.made == dict.fromkeys(range(4), 1)


@pytest.mark.timeout(60)
def test_making_ahead_ends_with_the_chunk_at_which_it_is_stopped_and_goes_on_from_there() -> None:
    algorithm = CountingAlgorithm()
    algorithm.gate.clear()
    store = store_digests(algorithm)
    store.make_ahead()
    algorithm.began.wait()
    stopping = threading.Thread(target=store.stop, daemon=True)
    stopping.start()
    while not store.stopped:
        time.sleep(0.001)
    algorithm.gate.set()
    stopping.join()
    assert algorithm.made == {0: 1}
    store.make_ahead()
    join_maker()
    assert algorithm.made == dict.fromkeys(range(4), 1)
    assert store.part(0, 4) == EXPECTED


@pytest.mark.timeout(60)
def test_what_was_verified_before_is_served_on_with_the_digests_it_was_verified_by() -> None:
    algorithm = CountingAlgorithm()
    store = store_digests(algorithm, b"?" * len(DATA), EXPECTED)
    store.make_ahead()
    join_maker()
    assert store.part(0, 4) == EXPECTED
    assert store.whole == PLAIN.whole(EXPECTED)
    assert algorithm.made == {}


def test_digests_of_other_data_are_not_taken() -> None:
    with pytest.raises(AssertionError, match="the digests are those of other data"):
        store_digests(PLAIN, DATA, EXPECTED[:3])


@pytest.mark.parametrize(
    ("first", "count", "expected"),
    [(0, 99, EXPECTED), (3, 2, EXPECTED[3:]), (4, 1, ()), (1 << 61, 1, ())],
    ids=["more than there are", "beyond the last", "behind the last", "far behind"],
)
def test_only_digests_of_chunks_that_exist_are_told(first: int, count: int, expected: tuple[bytes, ...]) -> None:
    assert store_digests(PLAIN).part(first, count) == expected


@pytest.mark.parametrize("length", [CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK - 1])
@algorithms
def test_the_last_chunk_may_be_shorter(algorithm: Algorithm, length: int) -> None:
    data = DATA[:length]
    offsets = range(0, length, CHUNK)
    expected = tuple(of(algorithm, data[at : at + CHUNK], number) for number, at in enumerate(offsets))
    assert store_digests(algorithm, data).part(0, 99) == expected


@algorithms
def test_an_empty_store_has_no_digests_but_one_of_the_whole(algorithm: Algorithm) -> None:
    store = store_digests(algorithm, b"")
    store.make_ahead()
    assert store.part(0, 64) == ()
    assert store.whole == of(algorithm, b"", 1 << 64)
