"""Digests of chunks, by which a client knows that the bytes it has received are the ones that were served.

Every chunk has a BLAKE3 digest (https://github.com/BLAKE3-team/BLAKE3-specs), whoever serves it and whatever protects
the connection. One root digest over the manifest, the attributes and the digests of all chunks names the contents of a
store. It depends on nothing else, and nobody can make other contents with the same root. So a client that knows the
root from a source that it trusts can take the bytes from anybody; what one source has brought counts with the next; and
two instances hold the same weights if their roots are equal.

With a token, digests travel in frames that carry a tag (`wire.conversation`), and under TLS they are encrypted, so
nobody on the way can replace them.

The digests of a store are made once, from memory that no longer changes: ahead by a thread, or when they are first
asked for. Whoever has verified a whole store passes it on with the digests that it was verified by, so the next client
would notice damage that happened in between.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol

import msgspec
from blake3 import blake3

from vllm_ascend.model_loader.netloader.weights.manifest import chunks
from vllm_ascend.model_loader.netloader.weights.memory import Readable
from vllm_ascend.model_loader.netloader.wire.pacing import give_way

logger = logging.getLogger(__name__)

BLAKE3: Final = "blake3"
DIGEST_BYTES: Final = 32
CHUNK_BYTES: Final = 4 << 20
"""Bytes that are asked for, moved, verified, passed on and, if they are damaged, fetched again together.

They are few because a chain of clients is only as fast as its chunks are small, and because each connection of a client
that takes from several sources needs a bucket for one.
"""
PIECE_BYTES: Final = 1 << 20
"""Bytes that are digested at a time: so few that they are still in the processor's cache when they have arrived."""
_ROOT_CONTEXT: Final = "vllm-ascend netloader 2026-11 root digest of contents"
"""Keeps roots apart from every other BLAKE3 digest of the same bytes."""


class Running(Protocol):
    """A digest that is being made of bytes which come one after another."""

    def update(self, data: memoryview, /) -> Any:
        """Takes in the next bytes."""

    def digest(self) -> bytes:
        """The digest of all bytes so far: DIGEST_BYTES bytes."""


def start() -> Running:
    """A new digest of no bytes yet, to be updated with those of a chunk in their order."""
    return blake3()


def digest_of(data: memoryview) -> bytes:
    """The digest of `data`, a whole chunk: DIGEST_BYTES bytes."""
    running = start()
    for offset, length in chunks(data.nbytes, PIECE_BYTES):
        running.update(data[offset : offset + length])
    return running.digest()


def root_of(manifest_digest: str, attributes: Mapping[str, Any], chunk_digests: Sequence[bytes]) -> str:
    """The root digest of contents, in hexadecimal.

    `manifest_digest` is `Manifest.digest`, `attributes` are what loading sets on the model beside its tensors, and
    `chunk_digests` are those of all chunks, in order.
    """
    told = msgspec.msgpack.encode((manifest_digest, CHUNK_BYTES, sorted(attributes.items())))
    running = blake3(derive_key_context=_ROOT_CONTEXT)
    running.update(len(told).to_bytes(8, "big") + told)
    running.update(b"".join(chunk_digests))
    return running.hexdigest()


class StoreDigests:
    """The digests of the chunks of a store, each made when it is first wanted, or ahead by a thread.

    Digests that are known from a source show any damage to the data by themselves. Those that are made here would fit
    whatever the data has become meanwhile, so once they exist, it is asked whether the data is as it was loaded.
    """

    def __init__(
        self, data: Readable, known: Sequence[bytes] = (), is_as_loaded: Callable[[], bool] | None = None
    ) -> None:
        """`data` must not change. `known` are the digests of all its chunks where they exist already."""
        self._data = data
        self._chunks = tuple(chunks(data.nbytes, CHUNK_BYTES))
        self._digests: list[bytes | None] = list(known) or [None] * len(self._chunks)
        assert len(self._digests) == len(self._chunks), "the digests are those of other data"
        self._is_as_loaded = None if known else is_as_loaded
        self._proving = threading.Lock()
        self._is_proven = self._is_as_loaded is None
        self._stop = threading.Event()
        self._maker: threading.Thread | None = None

    def make_ahead(self) -> None:
        """Starts a thread that makes the digests which do not exist yet; `stop` ends it.

        Where no thread can be had, that is logged, and the digests are made when they are asked for.
        """
        if self.complete:
            return
        self._stop.clear()
        maker = threading.Thread(target=self._make_all, name="netloader-digests", daemon=True)
        try:
            maker.start()
        except RuntimeError as error:
            logger.warning(
                "no thread can be had to digest the weights ahead (%s): the first client waits for it", error
            )
            return
        self._maker = maker

    @property
    def count(self) -> int:
        """The number of chunks, and so of digests."""
        return len(self._chunks)

    @property
    def complete(self) -> bool:
        """Whether all digests exist and are proven to be those of what was loaded, so that nothing has to be read."""
        return None not in self._digests and self._is_proven

    @property
    def stopped(self) -> bool:
        """Whether the thread that makes digests ahead has been told to end."""
        return self._stop.is_set()

    def stop(self) -> None:
        """Returns when the thread no longer reads the data. A later `make_ahead` goes on where it was."""
        self._stop.set()
        if self._maker is not None and self._maker is not threading.current_thread():
            self._maker.join()

    def prove(self) -> bool:
        """Whether the digests are those of what was loaded. Makes those that do not exist yet."""
        self.all()
        with self._proving:
            if self._is_as_loaded is not None:
                self._is_proven, self._is_as_loaded = self._is_as_loaded(), None
            return self._is_proven

    def part(self, first: int, count: int) -> tuple[bytes, ...]:
        """The digests of up to `count` chunks, from number `first` on; fewer where there are fewer chunks.

        Makes those that do not exist yet.
        """
        return tuple(self._digest(number) for number in range(first, min(first + count, len(self._chunks))))

    def all(self) -> tuple[bytes, ...]:
        """The digests of all chunks, in order. Makes those that do not exist yet."""
        return self.part(0, len(self._chunks))

    def _digest(self, number: int) -> bytes:
        digest = self._digests[number]
        if digest is None:  # two threads may make the same one; both come to the same
            offset, length = self._chunks[number]
            digest = self._digests[number] = digest_of(self._data[offset : offset + length])
        return digest

    def _make_all(self) -> None:
        give_way()
        for number in range(len(self._chunks)):
            if self.stopped:
                return
            self._digest(number)
        if not self.stopped:
            self.prove()
