"""One end of a connection between two peers, without I/O: the order of the messages, and their framing.

A `Conversation` is fed the bytes that have been received, yields messages, and encodes those that are to be sent. Which
side may say what in which state is one table; anything else from the peer raises ProtocolError.

A frame is a 4-byte big-endian length and that many bytes: one message and a checksum. The length is compared with a
limit before anything is allocated. After Attached, the server answers each Fetch with the raw bytes of the range,
unframed. Only the transport process_group gathers; whatever its library has to tell the other rank travels in Publish,
in either direction.

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
    Follow                 ->
                           <-  News ...
    ... the transport moves the bytes ...
                           <-  End, or:
    Done | Leave           ->
                           <-  Confirm

The checksum is the CRC-32 of the message. Where the server has a token, the greeting is Hello, Challenge, Prove,
Welcome, and every frame after it ends in an HMAC-SHA256 instead, cut to 16 bytes. It is made over the role of the
sender, the number of the frame and the message, with a key that belongs to this connection.
"""

from __future__ import annotations

import enum
import hmac
import zlib
from typing import Final

import msgspec

from vllm_ascend.model_loader.netloader.errors import ProtocolError, one_line
from vllm_ascend.model_loader.netloader.wire import foreign
from vllm_ascend.model_loader.netloader.wire.foreign import ForeignProtocol
from vllm_ascend.model_loader.netloader.wire.messages import (
    REPLY_LIMIT,
    REQUEST_LIMIT,
    Accept,
    Announce,
    AskDigests,
    AskFiles,
    Attach,
    Attached,
    Challenge,
    Confirm,
    Describe,
    Description,
    Digests,
    Done,
    End,
    Fetch,
    FilePart,
    Files,
    Follow,
    Gather,
    Gathered,
    Hello,
    Inquire,
    Join,
    Leave,
    Message,
    News,
    Prove,
    Publish,
    ReadFile,
    Refuse,
    Status,
    Wait,
    Welcome,
)

_LENGTH_BYTES: Final = 4
_CHECKSUM_BYTES: Final = 4
_TAG_BYTES: Final = 16


class Role(enum.Enum):
    """The two ends of a connection: the one that has connected, and the one that has accepted."""

    CLIENT = "client"
    SERVER = "server"


class State(enum.Enum):
    """How far a connection is. Both ends compute it from the same messages."""

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
    FOLLOWING = enum.auto()
    CONFIRMING = enum.auto()
    INQUIRING = enum.auto()
    DESCRIBING = enum.auto()
    LISTING = enum.auto()
    READING = enum.auto()
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
        Describe: State.DESCRIBING,
        AskFiles: State.LISTING,
        ReadFile: State.READING,
        Announce: State.ENDED,
    },
    (State.JOINING, Role.SERVER): {Wait: State.JOINING, Accept: State.TRANSFER, Refuse: State.ENDED},
    (State.TRANSFER, Role.CLIENT): {
        AskDigests: State.DIGESTING,
        Gather: State.GATHERING,
        Follow: State.FOLLOWING,
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
    (State.FOLLOWING, Role.CLIENT): {
        Follow: State.FOLLOWING,
        Fetch: State.FOLLOWING,
        Done: State.CONFIRMING,
        Leave: State.ENDED,
    },
    (State.FOLLOWING, Role.SERVER): {News: State.FOLLOWING, End: State.ENDED},
    (State.CONFIRMING, Role.SERVER): {News: State.CONFIRMING, Confirm: State.ENDED, End: State.ENDED},
    (State.INQUIRING, Role.SERVER): {Status: State.READY},
    (State.DESCRIBING, Role.SERVER): {Description: State.READY, Refuse: State.ENDED},
    (State.LISTING, Role.SERVER): {Files: State.READY, Refuse: State.ENDED},
    (State.READING, Role.SERVER): {FilePart: State.READY, Refuse: State.ENDED},
    (State.ATTACHING, Role.SERVER): {Attached: State.DATA, Refuse: State.ENDED},
    (State.DATA, Role.CLIENT): {Fetch: State.DATA},
}

_ClientMessage = (
    Hello
    | Prove
    | Join
    | AskDigests
    | Gather
    | Publish
    | Gathered
    | Follow
    | Done
    | Leave
    | Announce
    | Attach
    | Fetch
    | Inquire
    | Describe
    | AskFiles
    | ReadFile
)
_ServerMessage = (
    Welcome
    | Challenge
    | Wait
    | Accept
    | Attached
    | Digests
    | Publish
    | Gathered
    | News
    | Refuse
    | Confirm
    | End
    | Status
    | Description
    | Files
    | FilePart
)
_decoders: Final[dict[Role, msgspec.msgpack.Decoder[Message]]] = {
    Role.CLIENT: msgspec.msgpack.Decoder(_ClientMessage),
    Role.SERVER: msgspec.msgpack.Decoder(_ServerMessage),
}
_encoder: Final = msgspec.msgpack.Encoder()


class Conversation:
    """The end of a connection that belongs to `role`. For one thread at a time."""

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
        """Whether this end may say a message of that kind now."""
        return kind in _TRANSITIONS.get((self.state, self.role), {})

    def limit_frames(self, nbytes: int) -> None:
        """From now on, a frame of more than `nbytes` from the peer raises ProtocolError."""
        self._limit = nbytes

    def send(self, message: Message) -> bytes:
        """The frame to transmit. Only a message whose turn it is may be sent: anything else is our own mistake."""
        allowed = _TRANSITIONS.get((self.state, self.role), {})
        assert type(message) in allowed, f"{type(message).__name__} may not be sent in state {self.state.name}"
        self.state = allowed[type(message)]
        payload = _encoder.encode(message)
        return _with_length(payload + self._tag(self.role, payload))

    def feed(self, data: bytes | memoryview) -> None:
        """Takes bytes that the peer has sent, in pieces of any size."""
        self._received += data

    def next_message(self) -> Message | None:
        """The next message, None where it has not arrived in full.

        Raises ProtocolError for whatever the peer may not send; the conversation cannot go on after that.
        """
        if len(self._received) < _LENGTH_BYTES:
            return None

        # The length is judged by itself, before anything that a stranger has announced is waited for.
        length = int.from_bytes(self._received[:_LENGTH_BYTES], "big")
        if length > self._limit:
            if (stranger := self._foreign()) is not None:
                raise stranger
            raise ProtocolError(f"the {self._peer.value} announces a frame of {length} bytes: at most {self._limit}")

        if len(self._received) < _LENGTH_BYTES + length:
            return None
        content = bytes(self._received[_LENGTH_BYTES : _LENGTH_BYTES + length])
        del self._received[: _LENGTH_BYTES + length]

        # Nothing is decoded before its tag has been checked, and nothing is believed before it is its turn.
        message = self._decode(self._authentic(content))
        self._advance(message)
        return message

    def _foreign(self) -> ForeignProtocol | None:
        """What the peer speaks instead, if its first bytes tell."""
        if self.state is State.START and self.role is Role.SERVER:
            return foreign.of_client(bytes(self._received))
        if self.state is State.GREETED and self.role is Role.CLIENT:
            return foreign.of_server(bytes(self._received))
        return None

    def _tag(self, role: Role, payload: bytes) -> bytes:
        """What ends the next frame of `role`. A key makes it count, so none can be left out, repeated or moved."""
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
    """The frame of `message` on a connection without a key."""
    payload = _encoder.encode(message)
    return _with_length(payload + _checksum(payload))


def _checksum(payload: bytes) -> bytes:
    return zlib.crc32(payload).to_bytes(_CHECKSUM_BYTES, "big")


def _with_length(content: bytes) -> bytes:
    return len(content).to_bytes(_LENGTH_BYTES, "big") + content
