"""Frames that are almost right, or not at all: what a peer may send by mistake, by malice, or in another protocol."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from support.peers import messages
from support.peers.messages import payload, with_length
from support.sources import IDENTITY, SMALL
from vllm_ascend.model_loader.netloader.weights.identity import RankCoordinates
from vllm_ascend.model_loader.netloader.wire.conversation import Role
from vllm_ascend.model_loader.netloader.wire.messages import (
    REPLY_LIMIT,
    REQUEST_LIMIT,
    Accept,
    AskDigests,
    Fetch,
    Join,
    Message,
    Offer,
    Refuse,
)

_OF_SMALL: tuple[Message, ...] = (
    Join(IDENTITY, RankCoordinates(), SMALL.manifest.digest, (Offer("shared_memory", "boot/4/7"), Offer("tcp"))),
    AskDigests(0, 1),
    Fetch(0, 64),
    msgspec.structs.replace(messages.EXAMPLES[Accept], transport="tcp"),
    msgspec.structs.replace(messages.EXAMPLES[Refuse], manifest=SMALL.manifest.encoded),
)
_BY_KIND = {type(message): message for message in _OF_SMALL}
SAID_BY: dict[Role, tuple[Message, ...]] = {
    role: tuple(_BY_KIND.get(type(message), message) for message in said) for role, said in messages.SAID_BY.items()
}
"""The examples of all messages, those of a session made such that they could belong to one that takes SMALL."""
LIMITS = {Role.CLIENT: REQUEST_LIMIT, Role.SERVER: REPLY_LIMIT}
"""The most bytes of a frame that the role may send."""
GARBAGE = (
    b"GET / HTTP/1.1\r\nHost: node-3:19000\r\n\r\n",
    b"SSH-2.0-OpenSSH_9.6\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"\x00" * 4096,
    b"\xff" * 4096,
)


class Corpus:
    """Makes frames of `role` that are almost right, or not at all. The same `seed` makes the same ones."""

    def __init__(self, seed: int, role: Role) -> None:
        self.random = random.Random(seed)
        self._role = role
        self._messages = [payload(message) for message in SAID_BY[role]]
        self._ways: tuple[Callable[[bytes], bytes], ...] = (
            self._flip_bits,
            self._cut,
            self._lengthen,
            self._replace_a_value,
            self._replace_a_value,
            self._replace_a_header,
            self._spoil_a_text,
            self._nest,
            self._add_what_is_no_field,
            lambda _: self.random.randbytes(self.random.randrange(200)),
        )

    def content(self, original: bytes | None = None) -> bytes:
        """The content of a frame: `original`, or else any valid message of the role, changed in one way or two."""
        content = original if original is not None else self.random.choice(self._messages)
        for _ in range(self.random.choice((1, 1, 1, 2))):
            content = self.random.choice(self._ways)(content)
        return content

    def stream(self, content: bytes) -> bytes:
        """The frame of `content`, mostly with its true length."""
        lie = self.random.randrange(12)
        if lie == 0:
            return content
        if lie == 1:
            return self._some_number(LIMITS[self._role] + 1, 0xFFFFFFFF).to_bytes(4, "big") + content
        if lie == 2:
            return self._some_number(0, 2 * len(content)).to_bytes(4, "big") + content
        return with_length(content)

    def _some_number(self, least: int, greatest: int) -> int:
        return self.random.choice((least, greatest, self.random.randint(least, greatest)))

    def _flip_bits(self, content: bytes) -> bytes:
        flipped = bytearray(content or b"\0")
        for _ in range(self.random.randint(1, 4)):
            flipped[self.random.randrange(len(flipped))] ^= 1 << self.random.randrange(8)
        return bytes(flipped)

    def _cut(self, content: bytes) -> bytes:
        return content[: self.random.randint(0, len(content))]

    def _lengthen(self, content: bytes) -> bytes:
        return content + self.random.choice((b"\xc0", content, self.random.randbytes(40)))

    def _replace_a_value(self, content: bytes) -> bytes:
        message = _decoded(content)
        if isinstance(message, dict) and message:
            container, key = self.random.choice(list(_places(message)))
            container[key] = self.random.choice(STRANGE_VALUES)
            return msgspec.msgpack.encode(message)
        return msgspec.msgpack.encode(self.random.choice(STRANGE_VALUES))

    def _replace_a_header(self, content: bytes) -> bytes:
        place = self.random.randrange(len(content) + 1)
        return content[:place] + self.random.choice(HUGE_HEADERS) + content[place:]

    def _spoil_a_text(self, content: bytes) -> bytes:
        places = [place for place, byte in enumerate(content) if 0x20 <= byte < 0x7F]
        if not places:
            return b"\xa1\xff"
        place = self.random.choice(places)
        return content[:place] + self.random.choice((b"\xff", b"\xc0", b"\xed", b"\x00")) + content[place + 1 :]

    def _nest(self, content: bytes) -> bytes:
        opening, depth = self.random.choice((b"\x91", b"\x81\xa1a", b"\x81\xc0", b"\xdc\x00\x01")), self._depth()
        message = _decoded(content)
        if not isinstance(message, dict):
            return opening * depth + b"\xc0"
        return msgspec.msgpack.encode(message | {"x": msgspec.Raw(opening * depth + b"\xc0")})

    def _depth(self) -> int:
        return self.random.choice((2, 30, 500, 500, 3000, 15_000))

    def _add_what_is_no_field(self, content: bytes) -> bytes:
        if not content or not 0x80 <= content[0] < 0x8F:
            return b"\x8f" + content
        key, value = self.random.choice(ODD_KEYS), msgspec.msgpack.encode(self.random.choice(STRANGE_VALUES))
        return bytes([content[0] + 1]) + content[1:] + key + value


def _decoded(content: bytes) -> Any:
    try:
        return msgspec.msgpack.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError, OverflowError):
        return None


def _places(container: Any) -> Iterator[tuple[Any, Any]]:
    """Every place at which a value can be replaced, at any depth: a container, and a key or index in it."""
    for key, value in list(container.items() if isinstance(container, dict) else enumerate(container)):
        yield container, key
        if isinstance(value, dict | list):
            yield from _places(value)


STRANGE_VALUES: tuple[Any, ...] = (
    None,
    True,
    0,
    1,
    -1,
    -(1 << 63),
    1 << 62,
    (1 << 63) - 1,
    (1 << 64) - 1,
    0.5,
    -0.0,
    1e308,
    math.nan,
    math.inf,
    "",
    "tcp",
    "\0\r\n\x1b[2J\u2028\u202e",
    "x" * 4096,
    "x" * 4097,
    b"",
    bytes(16),
    bytes(65),
    bytes(5000),
    [],
    [None] * 100,
    [[]],
    {},
    {"a": {"b": [1]}},
    {"": 1},
    msgspec.msgpack.Ext(1, b"x"),
    msgspec.msgpack.Ext(-128, bytes(100)),
    msgspec.msgpack.Ext(-1, bytes(12)),
    msgspec.msgpack.Ext(-1, b"no time"),
    msgspec.Raw(b"\xc1"),
    msgspec.Raw(b"\xd9\x02\xff\xfe"),
    msgspec.Raw(b"\xa3\xed\xa0\x80"),
    msgspec.Raw(b"\x81\x93\x01\x02\x03\xc0"),
    msgspec.Raw(b"\x82\xa1a\x01\xa1a\x02"),
)
HUGE_HEADERS = (
    b"\xdd\xff\xff\xff\xff",
    b"\xdf\xff\xff\xff\xff",
    b"\xdb\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
    b"\xc9\xff\xff\xff\xff\x01",
    b"\xc9\x7f\xff\xff\xff\xff",
    b"\xdc\xff\xff",
    b"\xde\xff\xff",
    b"\xd9\xff",
    b"\xcf\xff\xff\xff\xff\xff\xff\xff\xff",
    b"\xcb\x7f\xf8\x00\x00\x00\x00\x00\x00",
)
ODD_KEYS = (
    b"\xa4type",
    b"\xa1x",
    b"\x01",
    b"\xc0",
    b"\xc4\x01x",
    b"\x90",
    b"\xa1\xff",
    HUGE_HEADERS[-1],
)
