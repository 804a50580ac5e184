"""What a cache and its engines say to each other on the cache's socket, and what travels with it.

Both are processes of one user on one host, so frames carry neither tags nor checksums. A frame is a length of 4 bytes
and a message in msgpack; the descriptor of the pages travels with its first byte. One connection carries one question
and its answer.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from vllm_ascend.model_loader.netloader.errors import ProtocolError
from vllm_ascend.model_loader.netloader.weights.identity import ModelIdentity, RankCoordinates
from vllm_ascend.model_loader.netloader.wire.messages import ATTRIBUTES_LIMIT, AttributeValue, Count, ShortText

CACHE_PROTOCOL: Final = 1
FRAME_LIMIT: Final = 128 << 20
"""Bytes of a frame. A note has the manifest of up to 500,000 tensors and the digests of up to 8 TiB."""


class CacheMessage(msgspec.Struct, frozen=True, tag=True):
    """Base of all messages; the name of the class is the tag."""


class Note(msgspec.Struct, frozen=True):
    """Everything to be known of the pages of one rank beside the pages.

    `manifest` is in its encoded form. `digests` are those of all chunks, one after another, empty where they are not
    known yet. `guards` names what kept strangers from these weights where they come from: ``token``, ``tls``.
    """

    identity: ModelIdentity
    coordinates: RankCoordinates
    manifest: bytes
    attributes: Annotated[dict[ShortText, AttributeValue], msgspec.Meta(max_length=ATTRIBUTES_LIMIT)] = {}
    digests: bytes = b""
    guards: tuple[ShortText, ...] = ()


class Want(CacheMessage, frozen=True):
    """An engine asks for the weights of one rank. Answered by Give or Lack, after any number of Coming."""

    identity: ModelIdentity
    coordinates: RankCoordinates
    manifest_digest: ShortText
    protocol: Count = CACHE_PROTOCOL


class Coming(CacheMessage, frozen=True):
    """The cache has `held` bytes so far, of which it is sure, of what the engine wants, and is getting the rest."""

    held: Count


class Give(CacheMessage, frozen=True):
    """The weights, with the descriptor of their sealed pages."""

    note: Note


class Lack(CacheMessage, frozen=True):
    """The cache has nothing of the kind, for `reason`."""

    reason: ShortText


class Hand(CacheMessage, frozen=True):
    """An engine hands over what it has loaded, with the descriptor of its sealed pages. Answered by Taken or Lack."""

    note: Note
    protocol: Count = CACHE_PROTOCOL


class Taken(CacheMessage, frozen=True):
    """The cache has the pages, and serves them as soon as it has verified them."""


class Ask(CacheMessage, frozen=True):
    """A command asks what the cache holds. Answered by State."""

    protocol: Count = CACHE_PROTOCOL


class HeldWeights(msgspec.Struct, frozen=True):
    """Weights that a cache holds, as a part of State.

    `root` is their root digest in hexadecimal, empty until all `nbytes` bytes are there and verified, of which it has
    `held`. `idle` is for how many seconds nobody has asked for them.
    """

    identity: ModelIdentity
    coordinates: RankCoordinates
    nbytes: Count
    held: Count
    root: ShortText
    idle: float


class State(CacheMessage, frozen=True):
    """What the cache holds, the latest used first, out of at most `max_bytes` bytes.

    `port` is where it serves other hosts, 0 if it does not.
    """

    holdings: tuple[HeldWeights, ...]
    nbytes: Count
    max_bytes: Count
    pid: Count
    port: Count = 0


class Drop(CacheMessage, frozen=True):
    """A command has the cache give up weights: those whose root digest begins with `selected`, or whose model has that
    name; all if it is empty. Answered by Dropped.
    """

    selected: ShortText = ""
    protocol: Count = CACHE_PROTOCOL


class Dropped(CacheMessage, frozen=True):
    """The cache has given up `count` weights, of `nbytes` bytes."""

    count: Count
    nbytes: Count


class TakeOver(CacheMessage, frozen=True):
    """A cache that starts wants all that this one has, and its place. Answered by Pass for each of them, then Over."""

    protocol: Count = CACHE_PROTOCOL


class Pass(CacheMessage, frozen=True):
    """One of the weights that the earlier cache holds, with the descriptor of the pages: the latest used last."""

    note: Note


class Over(CacheMessage, frozen=True):
    """The earlier cache has passed on everything. Answered by Taken, after which it ends."""


Said = Want | Coming | Give | Lack | Hand | Taken | Ask | State | Drop | Dropped | TakeOver | Pass | Over
CARRYING: Final = (Give, Hand, Pass)
"""The messages with which a descriptor travels."""

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Said)


def encode(message: CacheMessage) -> bytes:
    """`message` as it travels. Raises ProtocolError for one that no peer would accept."""
    data = _encoder.encode(message)
    if len(data) > FRAME_LIMIT:
        raise ProtocolError(f"a message to the cache has {len(data)} bytes: at most {FRAME_LIMIT}")
    return data


def decode(data: bytes | bytearray) -> Said:
    """The message in `data`. Raises ProtocolError if there is none, or one of another protocol."""
    try:
        message: Said = _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"a message on the socket of the cache cannot be read: {error}") from error
    protocol = getattr(message, "protocol", CACHE_PROTOCOL)
    if protocol != CACHE_PROTOCOL:
        raise ProtocolError(f"the peer speaks version {protocol} of the cache's protocol: expected {CACHE_PROTOCOL}")
    return message
