"""What two peers say to each other, without I/O.

A frame is a 4-byte big-endian length and that many bytes: one tagged struct in msgpack, and a checksum. The length is
checked against a limit before anything is allocated. `Conversation` is one end of one connection: it is fed received
bytes, yields messages, and encodes what is sent; which message may be said by whom in which state is one table.
Anything else from the peer raises ProtocolError. After Attached, the server answers each Fetch with the raw bytes of
the range, unframed. Only the process_group transport gathers: what its library wants the other rank to know travels in
Publish, in either direction.

    control connection                                     data connection (tcp transport)
    client                     server                      client                    server
    Hello                  ->                              Hello                 ->
                           <-  Welcome                                           <-  Welcome
    Join                   ->                              Attach                ->
                           <-  Wait ...                                          <-  Attached | Refuse
                           <-  Accept | Refuse             Fetch                 ->
    AskDigests             ->                                                    <-  raw bytes
                           <-  Digests                     Fetch                 ->
    Gather, Publish ...    ->                                                    <-  raw bytes
                           <-  Publish ...
    Gathered               ->
                           <-  Gathered
    ... the transport moves the bytes ...
                           <-  End, or:
    Done | Leave           ->
                           <-  Confirm

The checksum is the payload's CRC-32. With a token, the greeting is Hello, Challenge, Prove, Welcome; every frame after
it ends instead in an HMAC-SHA256, cut to 16 bytes, over the sender's role, the number of the frame and the payload,
under a key that belongs to this connection.

Compatibility: peers compare PROTOCOL_VERSION in the greeting. Within a version, messages may gain fields with defaults,
which older peers ignore; identity, coordinates and manifest do not change, since they are compared as a whole.
"""

from __future__ import annotations

import enum
import hmac
import zlib
from collections.abc import Mapping
from typing import Annotated, Final

import msgspec

from vllm_ascend.model_loader.netloader.errors import ProtocolError, one_line
from vllm_ascend.model_loader.netloader.weights.identity import Difference, ModelIdentity, RankCoordinates
from vllm_ascend.model_loader.netloader.wire import foreign
from vllm_ascend.model_loader.netloader.wire.foreign import ForeignProtocol

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
_LENGTH_BYTES: Final = 4
_CHECKSUM_BYTES: Final = 4
_TAG_BYTES: Final = 16

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


class Role(enum.Enum):
    CLIENT = "client"
    SERVER = "server"


class State(enum.Enum):
    START = enum.auto()
    GREETED = enum.auto()
    CHALLENGED = enum.auto()
    PROVING = enum.auto()
    READY = enum.auto()
    JOINING = enum.auto()
    TRANSFER = enum.auto()
    DIGESTING = enum.auto()
    GATHERING = enum.auto()
    GATHERED = enum.auto()
    CONFIRMING = enum.auto()
    INQUIRING = enum.auto()
    ATTACHING = enum.auto()
    DATA = enum.auto()
    ENDED = enum.auto()


_TRANSITIONS: Final[dict[tuple[State, Role], dict[type[Message], State]]] = {
    (State.START, Role.CLIENT): {Hello: State.GREETED},
    (State.START, Role.SERVER): {Refuse: State.ENDED},
    (State.GREETED, Role.SERVER): {Welcome: State.READY, Challenge: State.CHALLENGED, Refuse: State.ENDED},
    (State.CHALLENGED, Role.CLIENT): {Prove: State.PROVING},
    (State.PROVING, Role.SERVER): {Welcome: State.READY, Refuse: State.ENDED},
    (State.READY, Role.CLIENT): {
        Join: State.JOINING,
        Attach: State.ATTACHING,
        Inquire: State.INQUIRING,
        Announce: State.ENDED,
    },
    (State.JOINING, Role.SERVER): {Wait: State.JOINING, Accept: State.TRANSFER, Refuse: State.ENDED},
    (State.TRANSFER, Role.CLIENT): {
        AskDigests: State.DIGESTING,
        Gather: State.GATHERING,
        Fetch: State.TRANSFER,
        Done: State.CONFIRMING,
        Leave: State.ENDED,
    },
    (State.TRANSFER, Role.SERVER): {End: State.ENDED},
    (State.DIGESTING, Role.SERVER): {Digests: State.TRANSFER, End: State.ENDED},
    (State.GATHERING, Role.CLIENT): {Publish: State.GATHERING, Gathered: State.GATHERED, Leave: State.ENDED},
    (State.GATHERING, Role.SERVER): {Publish: State.GATHERING, End: State.ENDED},
    (State.GATHERED, Role.CLIENT): {Leave: State.ENDED},
    (State.GATHERED, Role.SERVER): {Publish: State.GATHERED, Gathered: State.TRANSFER, End: State.ENDED},
    (State.CONFIRMING, Role.SERVER): {Confirm: State.ENDED, End: State.ENDED},
    (State.INQUIRING, Role.SERVER): {Status: State.READY},
    (State.ATTACHING, Role.SERVER): {Attached: State.DATA, Refuse: State.ENDED},
    (State.DATA, Role.CLIENT): {Fetch: State.DATA},
}

_ClientMessage = (
    Hello | Prove | Join | AskDigests | Gather | Publish | Gathered | Done | Leave | Announce | Attach | Fetch | Inquire
)
_ServerMessage = (
    Welcome | Challenge | Wait | Accept | Attached | Digests | Publish | Gathered | Refuse | Confirm | End | Status
)
_decoders: Final[dict[Role, msgspec.msgpack.Decoder[Message]]] = {
    Role.CLIENT: msgspec.msgpack.Decoder(_ClientMessage),
    Role.SERVER: msgspec.msgpack.Decoder(_ServerMessage),
}
_encoder: Final = msgspec.msgpack.Encoder()


class Conversation:
    """One end, that of `role`, of one connection."""

    def __init__(self, role: Role) -> None:
        self.role = role
        self._peer = Role.SERVER if role is Role.CLIENT else Role.CLIENT
        self._limit = REPLY_LIMIT if role is Role.CLIENT else REQUEST_LIMIT
        self._received = bytearray()
        self._key: bytes | None = None
        self._frames = dict.fromkeys(Role, 0)
        self.state = State.START

    def authenticate(self, key: bytes) -> None:
        """From now on, every frame in either direction carries a tag made with `key`."""
        self._key = key

    def may_send(self, kind: type[Message]) -> bool:
        return kind in _TRANSITIONS.get((self.state, self.role), {})

    def limit_frames(self, nbytes: int) -> None:
        """From now on, a frame of more than `nbytes` from the peer raises ProtocolError."""
        self._limit = nbytes

    def send(self, message: Message) -> bytes:
        """The bytes to transmit."""
        allowed = _TRANSITIONS.get((self.state, self.role), {})
        assert type(message) in allowed, f"{type(message).__name__} may not be sent in state {self.state.name}"
        self.state = allowed[type(message)]
        payload = _encoder.encode(message)
        return _with_length(payload + self._tag(self.role, payload))

    def feed(self, data: bytes | memoryview) -> None:
        """Takes bytes from the peer."""
        self._received += data

    def next_message(self) -> Message | None:
        """The next complete message, or None for need of more bytes. Raises ProtocolError; then the end is broken."""
        if len(self._received) < _LENGTH_BYTES:
            return None
        length = int.from_bytes(self._received[:_LENGTH_BYTES], "big")
        if length > self._limit:
            if (stranger := self._foreign()) is not None:
                raise stranger
            raise ProtocolError(f"the {self._peer.value} announces a frame of {length} bytes: at most {self._limit}")
        if len(self._received) < _LENGTH_BYTES + length:
            return None
        message = self._decode(self._authentic(bytes(self._received[_LENGTH_BYTES : _LENGTH_BYTES + length])))
        del self._received[: _LENGTH_BYTES + length]
        self._advance(message)
        return message

    def _foreign(self) -> ForeignProtocol | None:
        if self.state is State.START and self.role is Role.SERVER:
            return foreign.of_client(bytes(self._received))
        if self.state is State.GREETED and self.role is Role.CLIENT:
            return foreign.of_server(bytes(self._received))
        return None

    def _tag(self, role: Role, payload: bytes) -> bytes:
        """With a key it counts the frames, so that none can be left out, repeated or moved."""
        if self._key is None:
            return _checksum(payload)
        number = self._frames[role].to_bytes(8, "big")
        self._frames[role] += 1
        return hmac.digest(self._key, role.value.encode() + number + payload, "sha256")[:_TAG_BYTES]

    def _authentic(self, received: bytes) -> bytes:
        size = _CHECKSUM_BYTES if self._key is None else _TAG_BYTES
        payload, tag = received[:-size], received[-size:]
        if not hmac.compare_digest(tag, self._tag(self._peer, payload)):
            raise ProtocolError(f"a frame of the {self._peer.value} was altered on the way or is not its own")
        return payload

    def _decode(self, payload: bytes) -> Message:
        try:
            return _decoders[self._peer].decode(payload)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            reason = one_line(str(error))
            raise ProtocolError(f"the {self._peer.value} sent a frame that is no message: {reason}") from error

    def _advance(self, message: Message) -> None:
        allowed = _TRANSITIONS.get((self.state, self._peer), {})
        if type(message) not in allowed:
            expected = ", ".join(kind.__name__ for kind in allowed) or "nothing"
            raise ProtocolError(
                f"the {self._peer.value} sent {type(message).__name__} in state {self.state.name}: expected {expected}"
            )
        self.state = allowed[type(message)]


def frame(message: Message) -> bytes:
    """`message` as it travels without a key."""
    payload = _encoder.encode(message)
    return _with_length(payload + _checksum(payload))


def _checksum(payload: bytes) -> bytes:
    return zlib.crc32(payload).to_bytes(_CHECKSUM_BYTES, "big")


def _with_length(content: bytes) -> bytes:
    return len(content).to_bytes(_LENGTH_BYTES, "big") + content
