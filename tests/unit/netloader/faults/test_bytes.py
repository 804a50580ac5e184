"""Bytes that change on the way: 200 seeded faults of each of six kinds, all of which have to be seen and repaired.

The in-memory transport brings the chunks, damaged the first time; everything else is the real server and client.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest

from support.sources import Tensors, client_for, fetch, serving
from vllm_ascend.model_loader.netloader.client.fetch import Client
from vllm_ascend.model_loader.netloader.client.fetched import Fetched
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import SourcesExhausted
from vllm_ascend.model_loader.netloader.transport import digests
from vllm_ascend.model_loader.netloader.transport.chunks.delivery import TRIES_PER_CHUNK
from vllm_ascend.model_loader.netloader.transport.chunks.inventory import Chunk
from vllm_ascend.model_loader.netloader.transport.in_process import InProcessTransport
from vllm_ascend.model_loader.netloader.weights.manifest import TensorSpec, chunks
from vllm_ascend.model_loader.netloader.weights.memory import Memory
from vllm_ascend.model_loader.netloader.wire.access import Access

pytestmark = pytest.mark.timeout(120)

CHUNK = 4096
SEEDS_PER_KIND = 200
ALWAYS = 1 << 20
SHAPES = ((700,), (33, 7), (1025, 3), (5,), (64, 32), (1,), (250,))
WEIGHTS = Tensors.of_shapes(*SHAPES)
OLD_WEIGHTS = Tensors.of_shapes(*SHAPES, seed=1)
NBYTES = WEIGHTS.manifest.nbytes
CHUNKS = tuple(Chunk(number, *place) for number, place in enumerate(chunks(NBYTES, CHUNK)))
WHOLE_CHUNKS = tuple(chunk for chunk in CHUNKS if chunk.length == CHUNK)

ACCESS = {"no token": Access(), "token": Access(token=b"a token of the deployment")}

Damage = dict[int, bytes]
"""What arrives instead, by the number of the chunk."""


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "CHUNK_BYTES", CHUNK)
    monkeypatch.setattr(digests, "PIECE_BYTES", CHUNK // 3)  # so that a chunk is digested in several steps


def served_bytes(tensors: Tensors) -> bytes:
    """All bytes as a server holds them."""
    store = tensors.store(verify=False)
    contents = bytes(store.bytes[:])
    store.close()
    return contents


def contents_of(memory: Memory) -> bytes:
    return bytes(memory.contents()[:])


ORIGINAL = served_bytes(WEIGHTS)
OLD = served_bytes(OLD_WEIGHTS)


def of(chunk: Chunk, contents: bytes | bytearray = ORIGINAL) -> bytes:
    return bytes(contents[chunk.offset : chunk.offset + chunk.length])


def altered(contents: bytearray) -> Damage:
    """The chunks of `contents` that are not the original ones."""
    return {chunk.number: of(chunk, contents) for chunk in CHUNKS if of(chunk, contents) != of(chunk)}


def flipped_bit(generator: random.Random) -> Damage:
    contents = bytearray(ORIGINAL)
    contents[generator.randrange(NBYTES)] ^= 1 << generator.randrange(8)
    return altered(contents)


def truncated(generator: random.Random) -> Damage:
    chunk = generator.choice(CHUNKS)
    return {chunk.number: of(chunk)[: generator.randrange(chunk.length)]}


def swapped_chunks(generator: random.Random) -> Damage:
    one, other = generator.sample(WHOLE_CHUNKS, 2)
    return {one.number: of(other), other.number: of(one)}


def zeroed_range_or_tensor(generator: random.Random) -> Damage:
    contents = bytearray(ORIGINAL)
    begin = generator.randrange(NBYTES - 64)
    end = generator.randrange(begin + 64, NBYTES + 1)  # more than the zeros that stand between tensors
    if generator.random() < 0.5:
        tensor = any_tensor(generator)
        begin, end = tensor.offset, tensor.end
    contents[begin:end] = bytes(end - begin)
    return altered(contents)


def stale_tensor(generator: random.Random) -> Damage:
    """A tensor does not come, and its place holds what an earlier version of the weights had there."""
    contents, tensor = bytearray(ORIGINAL), any_tensor(generator)
    contents[tensor.offset : tensor.end] = OLD[tensor.offset : tensor.end]
    return altered(contents)


def repeated_chunk(generator: random.Random) -> Damage:
    one, other = generator.sample(WHOLE_CHUNKS, 2)
    return {one.number: of(other)}


def any_tensor(generator: random.Random) -> TensorSpec:
    return generator.choice(WEIGHTS.manifest.tensors)


KINDS = (flipped_bit, truncated, swapped_chunks, repeated_chunk, zeroed_range_or_tensor, stale_tensor)


class Tampering(InProcessTransport):
    """Brings damaged chunks: each the first `times`, then as it is."""

    def __init__(self, damage: Damage, times: int = 1) -> None:
        self.left = dict.fromkeys(damage, times)
        self._damage = damage
        super().__init__(self._bring)

    def _bring(self, chunk: Chunk, content: bytes) -> bytes:
        if not self.left.get(chunk.number):
            return content
        self.left[chunk.number] -= 1
        return self._damage[chunk.number]


class AlwaysTampering(Tampering):
    """Never stops. It has a name of its own, so that one source can have it and the next not."""

    traits = replace(InProcessTransport.traits, name="tampering")

    def __init__(self, damage: Damage) -> None:
        super().__init__(damage, times=ALWAYS)


def names(kind: Callable[[random.Random], Damage]) -> str:
    return kind.__name__.replace("_", " ")


@pytest.fixture(params=list(ACCESS.values()), ids=list(ACCESS))
def access(request: pytest.FixtureRequest) -> Access:
    chosen: Access = request.param
    return chosen


@pytest.fixture
def source(access: Access) -> Iterator[Endpoint]:
    with serving(WEIGHTS, (InProcessTransport(),), access=access) as (_, endpoint):
        yield endpoint


def seeds(access: Access, number: int = SEEDS_PER_KIND) -> range:
    """Half of them without a token, the others with one."""
    return range(number // 2) if access.token is None else range(number // 2, number)


def assert_repaired(client: Client, fetched: Fetched, damage: Damage, warnings: Sequence[str]) -> None:
    assert contents_of(fetched.memory) == ORIGINAL
    assert client.attempts == []
    assert sum(client.received.values()) == NBYTES + sum(map(len, damage.values()))
    seen = sorted(int(warning.split()[1]) for warning in warnings if "arrived damaged" in warning)
    assert seen == sorted(damage)


@pytest.mark.parametrize("kind", KINDS, ids=names)
def test_a_damaged_chunk_is_fetched_again(
    kind: Callable[[random.Random], Damage], access: Access, source: Endpoint, caplog: pytest.LogCaptureFixture
) -> None:
    for seed in seeds(access):
        damage = kind(random.Random(f"{kind.__name__} {seed}"))
        assert damage, "a fault that changes nothing tests nothing"
        transport = Tampering(damage)
        caplog.clear()
        moved: list[int] = []
        client, fetched = fetch(WEIGHTS, (transport,), source, access=access, progress=moved.append)
        try:
            assert not any(transport.left.values()), "the fault did not come"
            assert_repaired(client, fetched, damage, caplog.messages)
            assert sum(moved) == NBYTES
        except AssertionError as error:
            error.add_note(f"seed {seed}: chunks {sorted(damage)}")
            raise
        finally:
            fetched.memory.close()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind is not truncated], ids=names)
def test_without_verification_the_same_faults_go_through(
    kind: Callable[[random.Random], Damage], access: Access, source: Endpoint, caplog: pytest.LogCaptureFixture
) -> None:
    for seed in seeds(access, 20):
        damage = kind(random.Random(f"{kind.__name__} {seed}"))
        _, fetched = fetch(WEIGHTS, (Tampering(damage),), source, access=access, verify=False)
        expected = bytearray(ORIGINAL)
        for number, content in damage.items():
            expected[CHUNKS[number].offset : CHUNKS[number].offset + CHUNKS[number].length] = content
        assert contents_of(fetched.memory) == expected != ORIGINAL
    assert not any("arrived damaged" in message for message in caplog.messages)


def test_a_truncated_chunk_is_fetched_again_even_without_verification(access: Access, source: Endpoint) -> None:
    damage = truncated(random.Random(0))
    _, fetched = fetch(WEIGHTS, (Tampering(damage),), source, access=access, verify=False)
    assert contents_of(fetched.memory) == ORIGINAL


@pytest.mark.parametrize("kind", KINDS, ids=names)
def test_a_source_that_always_damages_a_chunk_is_left_for_the_next(
    kind: Callable[[random.Random], Damage], access: Access, source: Endpoint, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    damage = kind(random.Random(0))
    always, never = AlwaysTampering(damage), InProcessTransport()
    with serving(WEIGHTS, (always,), access=access) as (_, bad):
        client, fetched = fetch(WEIGHTS, (always, never), bad, source, access=access)
    assert contents_of(fetched.memory) == ORIGINAL
    assert (fetched.source, fetched.transport) == (source, "in_process")
    (attempt,) = client.attempts
    assert (attempt.source, attempt.transport) == (str(bad), "tampering")
    assert attempt.reason.endswith(f"arrived damaged {TRIES_PER_CHUNK} times")
    tries = [ALWAYS - left for left in always.left.values()]
    assert max(tries) == TRIES_PER_CHUNK
    assert client.received[str(source)] == sum(CHUNKS[number].length for number in damage)


def test_damage_by_the_only_source_is_an_error(access: Access) -> None:
    always = AlwaysTampering(flipped_bit(random.Random(0)))
    with serving(WEIGHTS, (always,), access=access) as (_, bad):
        client = client_for(WEIGHTS, (always,), access=access)
        with pytest.raises(SourcesExhausted, match=f"{bad} by tampering: .* arrived damaged {TRIES_PER_CHUNK} times"):
            client.fetch([bad])
