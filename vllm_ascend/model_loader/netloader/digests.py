"""Digests of chunks, by which whoever receives bytes knows that they are the ones that were served.

Without a token the digest is XXH3-128, which catches every kind of accident at memory speed. With one it is
AES-256-GMAC (NIST SP 800-38D with all data as additional data) under a key that is derived from the token and a salt of
the store, so that nobody without the token can make bytes that pass. A salt belongs to one set of contents, and the
number of the chunk is the nonce: no key meets the same nonce with other data.

A store's digests are made once, from memory that stays as it is: ahead by a thread, or when first asked for. Whoever
has verified a whole store serves it on with the digests that it was verified by, so that damage in between would be
seen at the next station.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import xxhash
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from vllm_ascend.model_loader.netloader.access import derive_key
from vllm_ascend.model_loader.netloader.errors import ProtocolError
from vllm_ascend.model_loader.netloader.manifest import chunks
from vllm_ascend.model_loader.netloader.memory import Readable
from vllm_ascend.model_loader.netloader.pacing import give_way

XXH3: Final = "xxh3_128"
GMAC: Final = "aes256_gmac"
DIGEST_BYTES: Final = 16
CHUNK_BYTES: Final = 16 << 20
"""Bytes that are asked for, moved, verified and, when damaged, fetched again as one."""
PIECE_BYTES: Final = 1 << 20
"""Bytes that are digested at a time: small enough to be in the processor's cache still when they have just arrived."""
_SALT_BYTES: Final = 16
_WHOLE: Final = 1 << 64
"""The nonce of the digest over all digests, beyond the number of any chunk."""


class Running(Protocol):
    """A digest of bytes that come one after another."""

    def update(self, data: memoryview) -> None: ...

    def finish(self) -> bytes: ...


@dataclass(frozen=True)
class Algorithm:
    """How the digests of one store are made; peers with the same token make the same ones."""

    name: str
    salt: bytes = b""
    key: bytes = field(default=b"", repr=False)

    @classmethod
    def of_new_store(cls, token: bytes | None) -> Algorithm:
        return cls.named(XXH3, b"", None) if token is None else cls.named(GMAC, secrets.token_bytes(_SALT_BYTES), token)

    @classmethod
    def named(cls, name: str, salt: bytes, token: bytes | None) -> Algorithm:
        """As a peer names it. Raises ProtocolError for one that does not fit to whether there is a token."""
        expected = XXH3 if token is None else GMAC
        if name != expected:
            raise ProtocolError(f"the digests are {name!r}: expected {expected!r}")
        return cls(name, salt, derive_key(token, b"netloader data key", salt) if token is not None else b"")

    def start(self, number: int) -> Running:
        """The digest of chunk `number`."""
        return _Gmac(self.key, number) if self.name == GMAC else _Xxh3()

    def of(self, data: memoryview, number: int) -> bytes:
        running = self.start(number)
        for offset, length in chunks(data.nbytes, PIECE_BYTES):
            running.update(data[offset : offset + length])
        return running.finish()

    def whole(self, digests: Sequence[bytes]) -> bytes:
        """The digest over the digests of all chunks, in order."""
        return self.of(memoryview(b"".join(digests)), _WHOLE)


class _Xxh3:
    def __init__(self) -> None:
        self._state = xxhash.xxh3_128()

    def update(self, data: memoryview) -> None:
        self._state.update(data)

    def finish(self) -> bytes:
        return self._state.digest()


class _Gmac:
    def __init__(self, key: bytes, number: int) -> None:
        self._state = Cipher(algorithms.AES(key), modes.GCM(number.to_bytes(12, "big"))).encryptor()

    def update(self, data: memoryview) -> None:
        self._state.authenticate_additional_data(data)

    def finish(self) -> bytes:
        self._state.finalize()
        return self._state.tag


@dataclass(frozen=True)
class Seal:
    """What a whole store was verified by."""

    algorithm: Algorithm
    digests: tuple[bytes, ...]


class StoreDigests:
    """The digests of the chunks of `data`, which must not change. `known` spares making them."""

    def __init__(self, data: Readable, algorithm: Algorithm, known: Sequence[bytes] = ()) -> None:
        self.algorithm = algorithm
        self._data = data
        self._chunks = tuple(chunks(data.nbytes, CHUNK_BYTES))
        self._digests: list[bytes | None] = list(known) or [None] * len(self._chunks)
        assert len(self._digests) == len(self._chunks), "the digests are those of other data"
        self._stop = threading.Event()
        self._maker: threading.Thread | None = None

    def make_ahead(self) -> None:
        """Makes those that there are not in a thread, which `stop` ends."""
        if None in self._digests:
            self._stop.clear()
            self._maker = threading.Thread(target=self._make_all, name="netloader-digests", daemon=True)
            self._maker.start()

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

    @property
    def whole(self) -> bytes:
        return self.algorithm.whole(self.part(0, len(self._chunks)))

    def _digest(self, number: int) -> bytes:
        digest = self._digests[number]
        if digest is None:  # two threads may make the same one; both come to the same
            offset, length = self._chunks[number]
            digest = self._digests[number] = self.algorithm.of(self._data[offset : offset + length], number)
        return digest

    def _make_all(self) -> None:
        give_way()
        for number in range(len(self._chunks)):
            if self.stopped:
                return
            self._digest(number)
