"""Digests of chunks, by which whoever receives bytes knows that they are the ones that were served.

Every chunk has a BLAKE3 digest (https://github.com/BLAKE3-team/BLAKE3-specs), whoever serves it and whatever protects
the connection. One root digest over the manifest, the attributes and the digests of all chunks names the contents of a
store: it depends on nothing else, and nobody can make other contents with the same root. So a client that knows the
root from a source it trusts can take the bytes from anybody, what one source brought counts with the next, and two
instances are the same if their roots are.

With a token, digests travel in frames that carry a tag (`wire.conversation`), and under TLS encrypted, so nobody on the
way can put others in their place.

A store's digests are made once, from memory that stays as it is: ahead by a thread, or when first asked for. Whoever
has verified a whole store serves it on with the digests that it was verified by, so that damage in between would be
seen at the next station.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

import msgspec
from blake3 import blake3

from vllm_ascend.model_loader.netloader.weights.manifest import chunks
from vllm_ascend.model_loader.netloader.weights.memory import Readable
from vllm_ascend.model_loader.netloader.wire.pacing import give_way

logger = logging.getLogger(__name__)

BLAKE3: Final = "blake3"
DIGEST_BYTES: Final = 32
CHUNK_BYTES: Final = 16 << 20
"""Bytes that are asked for, moved, verified and, when damaged, fetched again as one."""
PIECE_BYTES: Final = 1 << 20
"""Bytes that are digested at a time: small enough to be in the processor's cache still when they have just arrived."""
_ROOT_CONTEXT: Final = "vllm-ascend netloader 2026-11 root digest of contents"
"""Keeps roots apart from every other BLAKE3 digest of the same bytes."""


class Running(Protocol):
    """A digest of bytes that come one after another."""

    def update(self, data: memoryview, /) -> Any: ...

    def digest(self) -> bytes: ...


def start() -> Running:
    """The digest of a chunk, to be updated with its bytes in order."""
    return blake3()


def digest_of(data: memoryview) -> bytes:
    """The digest of a whole chunk: DIGEST_BYTES bytes."""
    running = start()
    for offset, length in chunks(data.nbytes, PIECE_BYTES):
        running.update(data[offset : offset + length])
    return running.digest()


def root_of(manifest_digest: str, attributes: Mapping[str, Any], chunk_digests: Sequence[bytes]) -> str:
    """The root digest of contents, in hexadecimal.

    `manifest_digest` is that of `Manifest.digest`; `attributes` are what loading sets beside the weights.
    """
    told = msgspec.msgpack.encode((manifest_digest, CHUNK_BYTES, sorted(attributes.items())))
    running = blake3(derive_key_context=_ROOT_CONTEXT)
    running.update(len(told).to_bytes(8, "big") + told)
    running.update(b"".join(chunk_digests))
    return running.hexdigest()


class StoreDigests:
    """The digests of the chunks of `data`, which must not change. `known` spares making them."""

    def __init__(self, data: Readable, known: Sequence[bytes] = ()) -> None:
        self._data = data
        self._chunks = tuple(chunks(data.nbytes, CHUNK_BYTES))
        self._digests: list[bytes | None] = list(known) or [None] * len(self._chunks)
        assert len(self._digests) == len(self._chunks), "the digests are those of other data"
        self._stop = threading.Event()
        self._maker: threading.Thread | None = None

    def make_ahead(self) -> None:
        """Makes those that there are not in a thread, which `stop` ends."""
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
        """Of chunks."""
        return len(self._chunks)

    @property
    def complete(self) -> bool:
        """Whether all digests exist, so that asking for them reads nothing."""
        return None not in self._digests

    @property
    def stopped(self) -> bool:
        return self._stop.is_set()

    def stop(self) -> None:
        """Returns when the thread no longer reads the data; `make_ahead` goes on where it was."""
        self._stop.set()
        if self._maker is not None and self._maker is not threading.current_thread():
            self._maker.join()

    def part(self, first: int, count: int) -> tuple[bytes, ...]:
        """The digests of `count` chunks from number `first`, of those that exist."""
        return tuple(self._digest(number) for number in range(first, min(first + count, len(self._chunks))))

    def all(self) -> tuple[bytes, ...]:
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
