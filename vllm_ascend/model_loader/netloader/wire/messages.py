"""The messages of the protocol: what each one says, who sends it and when, what answers it, and how large it may be.

A message is one tagged struct in msgpack. `conversation` holds their order as one table, and how they are framed.

Peers compare PROTOCOL_VERSION in the greeting and refuse each other if it differs. Within a version, a message may gain
fields with defaults, which older peers ignore. Identity, coordinates and manifest gain none, because they are compared
as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Final

import msgspec

from vllm_ascend.model_loader.netloader.weights.identity import Difference, ModelIdentity, RankCoordinates

PROTOCOL_VERSION: Final = 2
REQUEST_LIMIT: Final = 64 << 10
"""Bytes of a frame to a server, which bounds what a stranger can make it hold. The largest, Join, is below 4 KiB."""
REPLY_LIMIT: Final = 64 << 20
"""Bytes of a frame to a client. A refusal may carry the manifest of a model with 500,000 tensors."""
STRANGER_REPLY_LIMIT: Final = 1 << 20
"""Bytes of a frame from a source that is not trusted: enough for everything but a manifest."""
FILES_LIMIT: Final = 64
"""Small files of one model."""
PART_LIMIT: Final = 1 << 20
"""Bytes of a small file in one message."""
FETCH_LIMIT: Final = 4 << 20
"""Bytes that one Fetch may ask for: those of a chunk."""
DIGESTS_LIMIT: Final = 256
"""Digests in one message. For these, a server may have to read 1 GiB in the little time that inference leaves it."""
REFERRALS_LIMIT: Final = 64
"""Endpoints in one message."""
RANKS_LIMIT: Final = 4096
"""Ranks of one instance in one Status."""
NEWS_LIMIT: Final = 4096
"""Chunks of one kind in one News. What a source has at first may take several."""
DIFFERENCES_LIMIT: Final = 64
"""Differing fields in one refusal. Identity and coordinates have fewer."""
ATTRIBUTES_LIMIT: Final = 1 << 16
"""Attributes in one Accept: flags and numbers that loading sets on a model of many layers."""
PUBLISH_LIMIT: Final = 8 << 10
"""Bytes of one value in a rendezvous. The largest, HCCL's root info, has 4,108."""
KEY_LIMIT: Final = 256
"""Characters of the key of such a value."""

ShortText = Annotated[str, msgspec.Meta(max_length=4096)]
ShortBytes = Annotated[bytes, msgspec.Meta(max_length=64)]
Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
SessionId = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
Referrals = Annotated[tuple[ShortText, ...], msgspec.Meta(max_length=REFERRALS_LIMIT)]
Chunks = Annotated[tuple[Count, ...], msgspec.Meta(max_length=NEWS_LIMIT)]
Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
Parameters = Mapping[ShortText, ShortText | int]
AttributeValue = bool | int | float | ShortText | None
"""A value that loading sets on a model beside its tensors, of a type that can travel."""


class Message(msgspec.Struct, frozen=True, tag=True):
    """Base of all messages; the name of the class is the tag."""


# The greeting, on every connection


class Hello(Message, frozen=True):
    """Client, first on every connection.

    A server with a token answers Challenge, one without a token Welcome, and one of another version Refuse. `challenge`
    is random and used once; a server with the token proves itself by it, and others ignore it.
    """

    protocol: Count = PROTOCOL_VERSION
    challenge: ShortBytes = b""


class Challenge(Message, frozen=True):
    """Server, in answer to Hello: the client must prove that it knows the token. Answered by Prove.

    `challenge` is random and used once.
    """

    challenge: ShortBytes
    protocol: Count = PROTOCOL_VERSION


class Prove(Message, frozen=True):
    """Client, in answer to Challenge. Answered by Welcome, or by Refuse where the proof is wrong.

    `proof` is an HMAC over both challenges under the token (`access.Proofs`).
    """

    proof: ShortBytes


class Welcome(Message, frozen=True):
    """Server, at the end of the greeting. The client goes on with Join, Attach or Announce, or asks first: Inquire,
    Describe, AskFiles, ReadFile.

    After a Challenge, `proof` shows that the server knows the token too; otherwise it is empty.
    """

    protocol: Count = PROTOCOL_VERSION
    proof: ShortBytes = b""


# A session, on its control connection


class Offer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A transport that a client can use, as a part of Join.

    It works only with a server that sees the same `scope`; an empty one means any server. Where pages are mapped,
    `waits` says that the client gets nothing elsewhere, and so can wait for a server that still fills them.
    """

    transport: ShortText
    scope: ShortText = ""
    waits: bool = False


class Join(Message, frozen=True):
    """Client, after the greeting: asks for the weights of one rank. Answered by Accept, Wait or Refuse.

    `manifest_digest` is that of the client's own model, and `offers` are the transports it can use, best first.
    """

    identity: ModelIdentity
    coordinates: RankCoordinates
    manifest_digest: ShortText
    offers: tuple[Offer, ...]


class Wait(Message, frozen=True):
    """Server, in answer to Join while all turns are taken. Repeated until Accept or Refuse follows.

    `served` clients have a turn, and `ahead` others come first. `referrals` are endpoints that take or took the same
    weights from this server, written as in Refuse. The server vouches for none of them: they are to be believed only if
    what they hold has the root digest `root`, which is empty until it is known. `fingerprint` is that of the
    checkpoint, on the word of this server alone. `filling` says that the server itself still loads these weights.
    """

    ahead: Count
    referrals: Referrals = ()
    root: ShortText = ""
    fingerprint: ShortText = ""
    served: Count = 0
    filling: bool = False


class Accept(Message, frozen=True):
    """Server, in answer to Join: opens the session. The client goes on with AskDigests, Gather, Follow, Fetch, Done or
    Leave.

    `transport` is the one of the client's offers that the server has chosen, and `parameters` are what the client's
    half of it must know. `digest` names the kind of the chunks' digests, empty where the server has none. `attributes`
    belong to the weights: what else loading has set on the model, by qualified name. `fingerprint` is that of the
    server's checkpoint, for a client that has none and will serve these weights in turn. `root` is the root digest of
    the contents, empty until it is known. `filling` says that the server itself still loads these weights: it has only
    the chunks of which it tells in News.
    """

    session: SessionId
    generation: Count
    transport: ShortText
    parameters: Parameters
    attributes: Annotated[Mapping[ShortText, AttributeValue], msgspec.Meta(max_length=ATTRIBUTES_LIMIT)] = {}
    fingerprint: ShortText = ""
    digest: ShortText = ""
    root: ShortText = ""
    filling: bool = False


class Refuse(Message, frozen=True):
    """Server, instead of greeting, or in answer to Join or Attach. Ends the connection.

    `differences` are seen from the server: its own value, then the client's. `manifest` is the server's where the
    tensors are what differs, so that the client can name them. `referrals` are endpoints of other ranks of the same
    instance that hold what was asked for; one without a host (":19001") is on the host by which the client reached this
    server.
    """

    reason: ShortText
    differences: Annotated[tuple[Difference, ...], msgspec.Meta(max_length=DIFFERENCES_LIMIT)] = ()
    manifest: bytes = b""
    referrals: Referrals = ()


class AskDigests(Message, frozen=True):
    """Client, within a session: asks for the digests of `count` chunks from number `first` on. Answered by Digests."""

    first: Count
    count: Annotated[int, msgspec.Meta(gt=0, le=DIGESTS_LIMIT)]


class Digests(Message, frozen=True):
    """Server, in answer to AskDigests: the digests of those of the chunks that exist, in their order."""

    digests: Annotated[tuple[ShortBytes, ...], msgspec.Meta(max_length=DIGESTS_LIMIT)]


class Gather(Message, frozen=True):
    """Client, within a session: both sides begin to make a process group. Followed by Publish from either side.

    Only the transport process_group gathers.
    """


class Publish(Message, frozen=True):
    """Either side, between Gather and Gathered: a value that the other rank's communication library waits for.

    It has no answer.
    """

    key: Annotated[str, msgspec.Meta(max_length=KEY_LIMIT)]
    value: Annotated[bytes, msgspec.Meta(max_length=PUBLISH_LIMIT)]


class Gathered(Message, frozen=True):
    """Either side: the process group works at this end. The client says so first and the server answers with the same.

    After that, neither publishes any more.
    """


class Fetch(Message, frozen=True):
    """Client, within a session or on a data connection: asks for bytes [offset, offset + length) of the address space.

    They are one whole chunk. The transport brings them: on a data connection they follow unframed, in the order of the
    requests, of which several may be sent ahead.
    """

    offset: Count
    length: Annotated[int, msgspec.Meta(gt=0, le=FETCH_LIMIT)]


class Follow(Message, frozen=True):
    """Client, within a session: wants to hear what is new here from now on. Answered by News, at once and ever again.

    The client itself can be asked for these weights on `port` of its address from now on, even while it still loads
    them; 0 means that it cannot. Digests and a process group are to be had before. Said again, it is a sign of life,
    which is answered too.
    """

    port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 0


class News(Message, frozen=True):
    """Server, to a client that follows: what has become new since the last News. There is no answer.

    `chunks` are those that can be fetched here, each of which is told once; a server that has all of them from the
    beginning tells none. `sent` are chunks that were sent to some client, each told once. `peers` are endpoints that
    hold or load the same weights, written as in Refuse, for none of which the server vouches. `whole` says that this
    server has all chunks, has had them confirmed, and knows that the digests are those of what it has loaded.
    """

    chunks: Chunks = ()
    sent: Chunks = ()
    peers: Referrals = ()
    whole: bool = False


class Done(Message, frozen=True):
    """Client, at the end of a session: it has all bytes. Answered by Confirm."""


class Confirm(Message, frozen=True):
    """Server, in answer to Done. Ends the session.

    `generation` is the one that the server holds now; if it is not the one of Accept, the bytes may be mixed. `root` is
    the root digest of the contents, empty where it is not known. `filling` says that this server still loads these
    weights itself, so that it can confirm nothing.
    """

    generation: Count
    root: ShortText = ""
    filling: bool = False


class End(Message, frozen=True):
    """Server, at any point of a session: it ends before the client has all bytes. There is no answer.

    `denies` says that the server has these weights no longer, or may have others by now; not so if it just goes away.
    """

    reason: ShortText
    denies: bool = True


class Leave(Message, frozen=True):
    """Client, at any point of a session where it may speak: it gives up. There is no answer."""

    reason: ShortText


# Connections of other kinds, after the greeting


class Attach(Message, frozen=True):
    """Client: makes this connection a data connection of `session`. Answered by Attached or Refuse."""

    session: SessionId


class Attached(Message, frozen=True):
    """Server, in answer to Attach: it knows the session, and answers Fetches on this connection from now on."""


class Announce(Message, frozen=True):
    """Client: having taken the weights in `session`, it now serves them itself, on `port` of its address.

    There is no answer, and the connection ends.
    """

    session: SessionId
    port: Port


class Inquire(Message, frozen=True):
    """Client: asks what the server holds. Answered by Status; the client may ask again, or go on with Join."""


class Holding(msgspec.Struct, frozen=True):
    """One model that a server holds, as a part of Status. Who has no model of its own joins by what is in here.

    `nbytes` are the bytes of its `tensors` tensors, of which it has `held` already. `root` is the root digest in
    hexadecimal, empty until it is known. `manifest` is the digest of the manifest, by which Describe asks for it.
    """

    role: str
    identity: ModelIdentity
    coordinates: RankCoordinates
    tensors: Count
    nbytes: Count
    generation: Count
    root: str = ""
    held: Count = 0
    manifest: str = ""


class RankPlace(msgspec.Struct, frozen=True):
    """Where a rank of an instance serves, as a part of Status. `endpoint` is written as in Refuse."""

    coordinates: RankCoordinates
    endpoint: ShortText


class Status(Message, frozen=True):
    """Server, in answer to Inquire.

    `sessions` clients take weights now, and `waiting` others have not had their turn yet. `declined` says, by role, why
    this process cannot serve it. `ranks` are all ranks of the instance that serve, this one included, as far as they
    have met.
    """

    holdings: tuple[Holding, ...]
    sessions: int
    transports: tuple[str, ...]
    declined: Mapping[str, str] = {}
    waiting: int = 0
    ranks: Annotated[tuple[RankPlace, ...], msgspec.Meta(max_length=RANKS_LIMIT)] = ()


class Describe(Message, frozen=True):
    """Client: asks for the manifest that has this `digest`, of something that Status has named.

    Answered by Description, after which the client may go on as after Status, or by Refuse where it is not held.
    """

    digest: ShortText


class Description(Message, frozen=True):
    """Server, in answer to Describe: the manifest in its encoded form."""

    manifest: bytes


class AskFiles(Message, frozen=True):
    """Client: asks for the small files that the target model has beside its weights.

    Answered by Files, after which the client may go on as after Status, or by Refuse where there are none.
    """


class SmallFile(msgspec.Struct, frozen=True):
    """A small file of the model's directory, as a part of Files: its path in there, bytes, and SHA-256."""

    name: ShortText
    size: Count
    digest: ShortBytes


class Files(Message, frozen=True):
    """Server, in answer to AskFiles.

    `identity` is that of the model which is served with these files. `resolved` is what the engine has found out from
    the weight files beside: values of its configuration that are not those in the files.
    """

    files: Annotated[tuple[SmallFile, ...], msgspec.Meta(max_length=FILES_LIMIT)]
    identity: ModelIdentity
    resolved: Annotated[Mapping[ShortText, AttributeValue], msgspec.Meta(max_length=FILES_LIMIT)] = {}


class ReadFile(Message, frozen=True):
    """Client: asks for the bytes of the small file `name` from `offset` on. Answered by FilePart or Refuse."""

    name: ShortText
    offset: Count


class FilePart(Message, frozen=True):
    """Server, in answer to ReadFile: the bytes up to the limit of a message; fewer only at the end of the file."""

    data: Annotated[bytes, msgspec.Meta(max_length=PART_LIMIT)]
