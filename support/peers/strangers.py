"""Clients that keep to no rules: they frame and authenticate by themselves, and say anything at any time."""

from __future__ import annotations

import contextlib
import itertools
import socket
import ssl
import struct
import threading
from collections.abc import Iterator
from typing import Any, Self

import msgspec

from support.peers.messages import CHECKSUM_BYTES, TAG_BYTES, payload, tag, with_length
from support.sources import IDENTITY, SMALL, Tensors
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.server.server import WeightServer
from vllm_ascend.model_loader.netloader.weights.identity import RankCoordinates
from vllm_ascend.model_loader.netloader.wire.access import Access, Proofs
from vllm_ascend.model_loader.netloader.wire.conversation import Role
from vllm_ascend.model_loader.netloader.wire.messages import (
    Attach,
    Attached,
    Challenge,
    Hello,
    Join,
    Message,
    Offer,
    Prove,
    Welcome,
)


class Line:
    """A connection on which a test speaks as `role`, without any rules."""

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
        """The next frame, with `content` and the ending that belongs to it."""
        ending = tag(self._key, self._role, self._said, content)
        self._said += 1
        return with_length(content + ending)

    def send(self, data: bytes) -> Self:
        self.socket.sendall(data)
        return self

    def hear(self) -> dict[str, Any]:
        """The next message, whose ending is not checked. Raises EOFError if the peer has closed the connection."""
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
        """The next `count` bytes, whatever they are. Raises EOFError if the peer has closed the connection."""
        return self._read(count)

    def hear_out(self) -> None:
        """Returns when the peer has ended the connection."""
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            while self.socket.recv(1 << 16):
                pass

    def shut_down(self) -> None:
        """Ends the connection in both directions, for other threads that use it too."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.socket, socket.SHUT_RDWR)

    def reset(self) -> None:
        """Closes the connection such that the peer sees a reset."""
        with contextlib.suppress(OSError):  # the peer may have been the first
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


class Intruder(Line):
    """A client that connects from the address `host` of this machine."""

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
        """Joins and waits for its turn. Returns the identifier of its session."""
        self.join(transport, tensors)
        while (heard := self.hear())["type"] == "Wait":
            pass
        assert heard["type"] == "Accept", heard
        session: bytes = heard["session"]
        return session

    def attach(self, session: bytes) -> Self:
        """Makes this a data connection of `session`."""
        self.say(Attach(session)).hear_kind(Attached)
        return self


def many_hosts() -> Iterator[str]:
    """Addresses of this machine, without end. The clients of the tests themselves come from none of them."""
    return (f"127.7.{number // 250}.{number % 250 + 1}" for number in itertools.cycle(range(50_000)))


def netloader_threads() -> list[str]:
    """The names of the threads that serve or fetch now, in this process."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("netloader")]


def is_idle(server: WeightServer) -> bool:
    """Whether the server has no connection, session or waiting client left."""
    return server.state().is_idle and netloader_threads() == ["netloader-accept"]
