"""Peers that keep to no rules: they frame and authenticate what they say by themselves, and say anything at any time.

`Corpus` makes frames that are almost right. `Intruder` is such a client. `Impostor` is such a server, which behaves
except where it is told not to.
"""

from __future__ import annotations

import contextlib
import hmac
import itertools
import math
import random
import socket
import ssl
import struct
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import msgspec

from support.sources import IDENTITY, SMALL, Tensors
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.server.server import WeightServer
from vllm_ascend.model_loader.netloader.transport import digests
from vllm_ascend.model_loader.netloader.transport.digests import BLAKE3, digest_of, root_of
from vllm_ascend.model_loader.netloader.weights.identity import Difference, RankCoordinates
from vllm_ascend.model_loader.netloader.weights.manifest import chunks
from vllm_ascend.model_loader.netloader.wire.access import Access, Proofs
from vllm_ascend.model_loader.netloader.wire.conversation import Role
from vllm_ascend.model_loader.netloader.wire.messages import (
    REPLY_LIMIT,
    REQUEST_LIMIT,
    Accept,
    Announce,
    AskDigests,
    Attach,
    Attached,
    Challenge,
    Confirm,
    Digests,
    Done,
    End,
    Fetch,
    Gather,
    Gathered,
    Hello,
    Holding,
    Inquire,
    Join,
    Leave,
    Message,
    Offer,
    Prove,
    Publish,
    Refuse,
    Status,
    Wait,
    Welcome,
)

SESSION = bytes(range(16))
SAID_BY: dict[Role, tuple[Message, ...]] = {
    Role.CLIENT: (
        Hello(challenge=bytes(32)),
        Prove(bytes(32)),
        Join(IDENTITY, RankCoordinates(), SMALL.manifest.digest, (Offer("shared_memory", "boot/4/7"), Offer("tcp"))),
        AskDigests(0, 1),
        Gather(),
        Publish("0/1", bytes(170)),
        Gathered(),
        Done(),
        Leave("the transport failed"),
        Announce(SESSION, 19001),
        Attach(SESSION),
        Fetch(0, 64),
        Inquire(),
    ),
    Role.SERVER: (
        Welcome(proof=bytes(32)),
        Challenge(bytes(32)),
        Wait(3, (":19001", "node-3:19001"), "5eed" * 16, "f00d"),
        Attached(),
        Accept(
            SESSION,
            3,
            "tcp",
            {"host": "10.0.0.1", "port": 40000},
            {"has_own_lm_head": True, "layers.0.rank": -7, "ratio": 0.5, "note": "draft", "window": None},
            "f00d",
            BLAKE3,
        ),
        Digests((bytes(16), bytes(range(16)))),
        Publish("0/0", bytes(170)),
        Gathered(),
        Refuse(
            "the tensors differ",
            (Difference("tensor w0", "float32 [16, 8]", ""),),
            SMALL.manifest.encoded,
            (":19001", "node-3:19001"),
        ),
        Confirm(3, "5eed" * 16),
        End("its weights were replaced by new ones"),
        Status((Holding("target", IDENTITY, RankCoordinates(), 3, 4096, 3),), 2, ("tcp",), {"draft": "w is sparse"}),
    ),
}
LIMITS = {Role.CLIENT: REQUEST_LIMIT, Role.SERVER: REPLY_LIMIT}
"""Of a frame that the role sends."""
CHECKSUM_BYTES = 4
TAG_BYTES = 16
GARBAGE = (
    b"GET / HTTP/1.1\r\nHost: node-3:19000\r\n\r\n",
    b"SSH-2.0-OpenSSH_9.6\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"\x00" * 4096,
    b"\xff" * 4096,
)


def payload(message: Message) -> bytes:
    return msgspec.msgpack.encode(message)


def with_length(content: bytes) -> bytes:
    return len(content).to_bytes(4, "big") + content


def tag(key: bytes | None, role: Role, number: int, content: bytes) -> bytes:
    """What a frame of `role` ends in, made here once more from its description."""
    if key is None:
        return zlib.crc32(content).to_bytes(CHECKSUM_BYTES, "big")
    return hmac.digest(key, role.value.encode() + number.to_bytes(8, "big") + content, "sha256")[:TAG_BYTES]


class Corpus:
    """Frames that are almost right, or not at all; the same for the same `seed`."""

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
        """Of a frame: `original`, or any valid message of the role, changed."""
        content = original if original is not None else self.random.choice(self._messages)
        for _ in range(self.random.choice((1, 1, 1, 2))):
            content = self.random.choice(self._ways)(content)
        return content

    def stream(self, content: bytes) -> bytes:
        """`content` as it goes over the wire, mostly with its true length."""
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
    """Where a value can be replaced, at any depth."""
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


class Line:
    """One connection, spoken on as `role`."""

    def __init__(self, sock: socket.socket, role: Role) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = sock
        self._role = role
        self._key: bytes | None = None
        self._said = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def authenticate(self, key: bytes) -> None:
        self._key = key

    def say(self, *messages: Message) -> Self:
        for message in messages:
            self.say_content(payload(message))
        return self

    def say_content(self, content: bytes) -> Self:
        return self.send(self.tagged(content))

    def tagged(self, content: bytes) -> bytes:
        """The next frame."""
        ending = tag(self._key, self._role, self._said, content)
        self._said += 1
        return with_length(content + ending)

    def send(self, data: bytes) -> Self:
        self.socket.sendall(data)
        return self

    def hear(self) -> dict[str, Any]:
        """The next message, unchecked. Raises EOFError where the peer has closed the connection."""
        content = self._read(int.from_bytes(self._read(4), "big"))
        heard: dict[str, Any] = msgspec.msgpack.decode(content[: -TAG_BYTES if self._key else -CHECKSUM_BYTES])
        return heard

    def hear_kind(self, kind: type[Message]) -> dict[str, Any]:
        heard = self.hear()
        assert heard["type"] == kind.__name__, heard
        return heard

    def _read(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            piece = self.socket.recv(count - len(data))
            if not piece:
                raise EOFError
            data += piece
        return bytes(data)

    def read(self, count: int) -> bytes:
        """Unframed bytes."""
        return self._read(count)

    def hear_out(self) -> None:
        """Returns when the peer has ended the connection."""
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            while self.socket.recv(1 << 16):
                pass

    def shut_down(self) -> None:
        """Ends the connection for threads that use it."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.socket, socket.SHUT_RDWR)

    def reset(self) -> None:
        """Ends the connection without a word."""
        with contextlib.suppress(OSError):  # the peer may have been the first
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


class Intruder(Line):
    """A client on the address `host` of this machine."""

    def __init__(self, source: Endpoint, host: str = "127.0.0.3", access: Access | None = None) -> None:
        self._access = access or Access()
        sock = socket.create_connection(source, timeout=30, source_address=(host, 0))
        if self._access.client_tls is not None:
            sock = self._access.client_tls.wrap_socket(sock)
        super().__init__(sock, Role.CLIENT)

    def greet(self) -> Self:
        ours = bytes(32)
        self.say(Hello(challenge=ours))
        if self._access.token is not None:
            proofs = Proofs(self._access.token, ours, self.hear_kind(Challenge)["challenge"])
            self.say(Prove(proofs.client))
            self.hear_kind(Welcome)
            self.authenticate(proofs.frame_key)
            self._said = 0
        else:
            self.hear_kind(Welcome)
        return self

    def join(self, transport: str = "tcp", tensors: Tensors = SMALL) -> Self:
        offer = Offer(transport, "gloo" if transport == "process_group" else "")
        return self.say(Join(IDENTITY, RankCoordinates(), tensors.manifest.digest, (offer,)))

    def accepted(self, transport: str = "tcp", tensors: Tensors = SMALL) -> bytes:
        """Joins and waits for its turn. The session that it has then."""
        self.join(transport, tensors)
        while (heard := self.hear())["type"] == "Wait":
            pass
        assert heard["type"] == "Accept", heard
        session: bytes = heard["session"]
        return session

    def attach(self, session: bytes) -> Self:
        """Makes this a data connection."""
        self.say(Attach(session)).hear_kind(Attached)
        return self


def many_hosts() -> Iterator[str]:
    """Addresses of this machine, none of them one that a test's own client has."""
    return (f"127.7.{number // 250}.{number % 250 + 1}" for number in itertools.cycle(range(50_000)))


Act = Callable[[Line, dict[str, Any]], object]
"""What an impostor does on a message that it has heard."""


class Misbehaved(Exception):
    """The impostor has done what it was told to do, and ends all connections."""


class Impostor:
    """A server of `tensors` by tcp, and of anything by `acts`, which say what is done on a message by its name."""

    def __init__(self, acts: Mapping[str, Act], tensors: Tensors = SMALL, host: str = "127.0.0.1") -> None:
        self.acts: dict[str, Act] = dict.fromkeys(
            ("Hello", "Join", "Attach", "AskDigests", "Fetch", "Done"), self._answer
        )
        self.acts.update(acts)
        self._listener = socket.create_server((host, 0), backlog=128)
        self.endpoint = Endpoint(host, self._listener.getsockname()[1])
        self._lines: set[Line] = set()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self.heard: list[str] = []
        store = tensors.store()
        self._bytes = bytes(store.bytes[:])
        store.close()
        pieces = chunks(len(self._bytes), digests.CHUNK_BYTES)
        self.digests = tuple(digest_of(memoryview(self._bytes)[offset : offset + length]) for offset, length in pieces)
        self.root = root_of(tensors.manifest.digest, {}, self.digests)

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._hang_up()
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def _start(self, target: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=target, args=arguments, name="impostor", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the listener is shut down
            while True:
                line = Line(self._listener.accept()[0], Role.SERVER)
                with self._lock:
                    self._lines.add(line)
                self._start(self._converse, line)

    def _converse(self, line: Line) -> None:
        try:
            while True:
                heard = line.hear()
                self.heard.append(heard["type"])
                if (act := self.acts.get(heard["type"])) is not None:
                    act(line, heard)
        except Misbehaved:
            self._hang_up()
        except (EOFError, OSError):
            pass
        finally:
            with self._lock:
                self._lines.discard(line)
                line.socket.close()

    def _hang_up(self) -> None:
        with self._lock:
            for line in self._lines:
                with contextlib.suppress(OSError):
                    line.socket.shutdown(socket.SHUT_RDWR)

    def _answer(self, line: Line, heard: dict[str, Any]) -> None:
        answer = self.right_answer(heard["type"])
        if answer is not None:
            line.say(answer)
        else:
            line.send(self._bytes[heard["offset"] : heard["offset"] + heard["length"]])

    def right_answer(self, kind: str) -> Message | None:
        """To a message of a client, by its name; None for Fetch, which bytes answer."""
        return {
            "Hello": Welcome(),
            "Join": Accept(SESSION, 1, "tcp", {}, digest=BLAKE3),
            "Attach": Attached(),
            "AskDigests": Digests(self.digests),
            "Done": Confirm(1, self.root),
        }.get(kind)


def saying(*contents: bytes | Message) -> Act:
    """Says so, and no more."""

    def act(line: Line, _: dict[str, Any]) -> None:
        for content in contents:
            line.say_content(content if isinstance(content, bytes) else payload(content))
        raise Misbehaved

    return act


def sending(*pieces: bytes) -> Act:
    """Sends unframed bytes, and no more."""

    def act(line: Line, _: dict[str, Any]) -> None:
        for piece in pieces:
            line.send(piece)
        raise Misbehaved

    return act


def answering(message: Message) -> Act:
    """Says `message` and goes on behaving."""
    return lambda line, _: line.say(message)


def silent(_: Line, __: dict[str, Any]) -> None:
    """Neither answers nor hangs up."""


def hanging_up(_: Line, __: dict[str, Any]) -> None:
    raise Misbehaved


def resetting(line: Line, _: dict[str, Any]) -> None:
    line.reset()
    raise Misbehaved


def netloader_threads() -> list[str]:
    """Those that serve or fetch now, in this process."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("netloader")]


def is_idle(server: WeightServer) -> bool:
    """Whether nothing is left of any peer."""
    return server.state().is_idle and netloader_threads() == ["netloader-accept"]
