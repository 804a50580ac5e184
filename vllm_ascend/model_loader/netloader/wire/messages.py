"""What two peers say to each other: the messages, and the limits on their fields.

A message is one tagged struct in msgpack. `conversation` says who may say which of them when, and how they travel.

Compatibility: peers compare PROTOCOL_VERSION in the greeting. Within a version, messages may gain fields with defaults,
which older peers ignore; identity, coordinates and manifest do not change, since they are compared as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Final

import msgspec

from vllm_ascend.model_loader.netloader.weights.identity import Difference, ModelIdentity, RankCoordinates

PROTOCOL_VERSION: Final = 1
REQUEST_LIMIT: Final = 64 << 10
"""Bytes of one frame to a server: the largest, Join, is below 4 KiB. Bounds what a stranger can make it hold."""
REPLY_LIMIT: Final = 64 << 20
"""Bytes of one frame to a client: a refusal may carry the manifest of a model with 500,000 tensors."""
FETCH_LIMIT: Final = 16 << 20
"""Bytes of one Fetch: those of a chunk."""
DIGESTS_LIMIT: Final = 64
"""Digests in one message: the server may have to read 1 GiB for them, with the little time that inference leaves it."""
REFERRALS_LIMIT: Final = 64
DIFFERENCES_LIMIT: Final = 64
"""In one refusal: identity and coordinates have fewer fields."""
ATTRIBUTES_LIMIT: Final = 1 << 16
"""Flags and numbers that loading has set, on a model of many layers."""
STRANGER_REPLY_LIMIT: Final = 1 << 20
"""Bytes of one frame from a source that is not trusted: room for all but a manifest."""
PUBLISH_LIMIT: Final = 8 << 10
"""Bytes of one value of a rendezvous: the largest, HCCL's root info, has 4,108."""
KEY_LIMIT: Final = 256

ShortText = Annotated[str, msgspec.Meta(max_length=4096)]
Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
SessionId = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
ShortBytes = Annotated[bytes, msgspec.Meta(max_length=64)]
Referrals = Annotated[tuple[ShortText, ...], msgspec.Meta(max_length=REFERRALS_LIMIT)]
Parameters = Mapping[ShortText, ShortText | int]
AttributeValue = bool | int | float | ShortText | None
"""What loading sets on a model beside its weights, as far as it travels."""


class Message(msgspec.Struct, frozen=True, tag=True):
    """Base of all messages; the class name is the tag."""


class Hello(Message, frozen=True):
    """Opens every connection. `challenge` is for a server that knows the token, which others ignore."""

    protocol: Count = PROTOCOL_VERSION
    challenge: ShortBytes = b""


class Challenge(Message, frozen=True):
    """Wants to see that the client knows the token."""

    challenge: ShortBytes
    protocol: Count = PROTOCOL_VERSION


class Prove(Message, frozen=True):
    """Shows it."""

    proof: ShortBytes


class Welcome(Message, frozen=True):
    """Ends the greeting; after a Challenge with the proof that the server knows the token too."""

    protocol: Count = PROTOCOL_VERSION
    proof: ShortBytes = b""


class Offer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A transport that the client can use, given that the server sees the same `scope` (empty: any server)."""

    transport: ShortText
    scope: ShortText = ""


class Join(Message, frozen=True):
    """Asks for the weights of one rank; `offers` come best first."""

    identity: ModelIdentity
    coordinates: RankCoordinates
    manifest_digest: ShortText
    offers: tuple[Offer, ...]


class Wait(Message, frozen=True):
    """All turns are taken: `served` clients have one, and `ahead` others come first. Repeated until the turn has come.

    `referrals` are endpoints that took the same weights from this server, written as in `Refuse`. The server vouches
    for none of them: they are to be believed only if what they hold has this `root` (see `digests`), and it is the
    server who says by which `fingerprint` it is known.
    """

    ahead: Count
    referrals: Referrals = ()
    root: ShortText = ""
    fingerprint: ShortText = ""
    served: Count = 0


class Accept(Message, frozen=True):
    """Opens the session: `parameters` are the chosen transport's own; `digest` names the kind of the chunks' digests,
    empty where there are none.

    `attributes` belong to the weights: what else loading has set on the model, by qualified name. `fingerprint` is that
    of the server's checkpoint, for a client that has none and will serve these weights in turn.
    """

    session: SessionId
    generation: Count
    transport: ShortText
    parameters: Parameters
    attributes: Annotated[Mapping[ShortText, AttributeValue], msgspec.Meta(max_length=ATTRIBUTES_LIMIT)] = {}
    fingerprint: ShortText = ""
    digest: ShortText = ""


class AskDigests(Message, frozen=True):
    """Asks for the digests of `count` chunks from number `first` on."""

    first: Count
    count: Annotated[int, msgspec.Meta(gt=0, le=DIGESTS_LIMIT)]


class Digests(Message, frozen=True):
    """Those of the chunks that exist."""

    digests: Annotated[tuple[ShortBytes, ...], msgspec.Meta(max_length=DIGESTS_LIMIT)]


class Refuse(Message, frozen=True):
    """Says no.

    `manifest` is the server's, where that is what differs, so that the client can name the tensors. `referrals` are
    endpoints of other ranks of the same instance that hold what was asked for; one without a host (":19001") is on the
    host under which the client reached this server.
    """

    reason: ShortText
    differences: Annotated[tuple[Difference, ...], msgspec.Meta(max_length=DIFFERENCES_LIMIT)] = ()
    manifest: bytes = b""
    referrals: Referrals = ()


class Done(Message, frozen=True):
    """The client has all bytes."""


class Confirm(Message, frozen=True):
    """The generation that the server holds now; another than in Accept means that the bytes may be mixed.

    `root` is the root digest of the contents, empty where the client has not asked for digests.
    """

    generation: Count
    root: ShortText = ""


class End(Message, frozen=True):
    """The server ends the session before the client has all bytes, and why."""

    reason: ShortText


class Leave(Message, frozen=True):
    """The client gives up, and why."""

    reason: ShortText


class Announce(Message, frozen=True):
    """The client that took the weights in `session` now serves them itself, on `port` of its address."""

    session: SessionId
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)]


class Attach(Message, frozen=True):
    """Makes this connection a data connection of a session, where the server answers Attached."""

    session: SessionId


class Attached(Message, frozen=True):
    """The server knows the session, and serves Fetches on this connection."""


class Fetch(Message, frozen=True):
    """Asks for a chunk: the bytes [offset, offset + length) of the manifest's address space."""

    offset: Count
    length: Annotated[int, msgspec.Meta(gt=0, le=FETCH_LIMIT)]


class Gather(Message, frozen=True):
    """Begins a process group of the two: until Gathered, both make it."""


class Publish(Message, frozen=True):
    """Tells the other rank of the group a value that its library waits for."""

    key: Annotated[str, msgspec.Meta(max_length=KEY_LIMIT)]
    value: Annotated[bytes, msgspec.Meta(max_length=PUBLISH_LIMIT)]


class Gathered(Message, frozen=True):
    """The group works at this end. The client says so first; after the answer neither publishes any more."""


class Inquire(Message, frozen=True):
    """Asks what the server holds."""


class Holding(msgspec.Struct, frozen=True):
    """One model of a `Status`; sizes in bytes. `root` is the root digest in hexadecimal, empty until it is known."""

    role: str
    identity: ModelIdentity
    coordinates: RankCoordinates
    tensors: int
    nbytes: int
    generation: int
    root: str = ""


class Status(Message, frozen=True):
    """`declined` says of a role why this process cannot serve it; `waiting` clients have not had their turn yet."""

    holdings: tuple[Holding, ...]
    sessions: int
    transports: tuple[str, ...]
    declined: Mapping[str, str] = {}
    waiting: int = 0
