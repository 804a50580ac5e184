"""A server that behaves except where it is told not to, what it may be told to do, and a client that outlives it."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

from support.logs import LINE_LIMIT
from support.peers.messages import SESSION, payload
from support.peers.strangers import Line, netloader_threads
from support.sources import SMALL, Tensors, client_for
from support.wait import wait_until
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import SourcesExhausted
from vllm_ascend.model_loader.netloader.transport import digests
from vllm_ascend.model_loader.netloader.transport.base import Timeouts, Transport
from vllm_ascend.model_loader.netloader.transport.digests import BLAKE3, digest_of, root_of
from vllm_ascend.model_loader.netloader.transport.registry import transports
from vllm_ascend.model_loader.netloader.weights.manifest import chunks
from vllm_ascend.model_loader.netloader.wire.conversation import Role, frame
from vllm_ascend.model_loader.netloader.wire.messages import Accept, Attached, Confirm, Digests, Message, News, Welcome

Act = Callable[[Line, dict[str, Any]], object]
"""What an impostor does on a message that it has heard."""


class Misbehaved(Exception):
    """Raised by an act: the impostor has done what it was told to do, and ends all connections."""


class Impostor:
    """A server that offers `tensors` by tcp, and behaves except where `acts` say otherwise.

    An act is called with each message of the name under which it is given.
    """

    def __init__(self, acts: Mapping[str, Act], tensors: Tensors = SMALL, host: str = "127.0.0.1") -> None:
        self.acts: dict[str, Act] = dict.fromkeys(
            ("Hello", "Join", "Attach", "AskDigests", "Follow", "Fetch", "Done"), self._answer
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
        """The right answer to a message of a client, given its name. None for Fetch, which bytes answer."""
        return {
            "Hello": Welcome(),
            "Join": Accept(SESSION, 1, "tcp", {}, digest=BLAKE3),
            "Attach": Attached(),
            "AskDigests": Digests(self.digests),
            "Follow": News(whole=True),
            "Done": Confirm(1, self.root),
        }.get(kind)


def saying(*contents: bytes | Message) -> Act:
    """An act: says these messages, or frames with these contents, and ends all connections."""

    def act(line: Line, _: dict[str, Any]) -> None:
        for content in contents:
            line.say_content(content if isinstance(content, bytes) else payload(content))
        raise Misbehaved

    return act


def sending(*pieces: bytes) -> Act:
    """An act: sends these bytes without framing them, and ends all connections."""

    def act(line: Line, _: dict[str, Any]) -> None:
        for piece in pieces:
            line.send(piece)
        raise Misbehaved

    return act


def answering(message: Message) -> Act:
    """An act: says `message` and goes on behaving."""
    return lambda line, _: line.say(message)


def silent(_: Line, __: dict[str, Any]) -> None:
    """An act: neither answers nor hangs up."""


def hanging_up(_: Line, __: dict[str, Any]) -> None:
    raise Misbehaved


def resetting(line: Line, _: dict[str, Any]) -> None:
    line.reset()
    raise Misbehaved


@contextlib.contextmanager
def source_that_says(*messages: Message) -> Iterator[Endpoint]:
    """A source that says `messages` to the first who comes, whatever it is asked."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def reply() -> None:
            with listener.accept()[0] as connection:
                connection.sendall(b"".join(map(frame, messages)))
                while connection.recv(4096):
                    pass

        thread = threading.Thread(target=reply, daemon=True)
        thread.start()
        yield Endpoint("127.0.0.1", listener.getsockname()[1])
        thread.join()


CONTROL = "no\x1b[2J\r\nmemory\x00\u2028for \u202eit"
"""A reason or a name that would write elsewhere on a terminal, and into other lines of a log."""


def accepting(transport: str = "tcp", digest: str = BLAKE3, **parameters: str | int) -> Accept:
    """An answer to Join that accepts it."""
    return Accept(SESSION, 1, transport, parameters, digest=digest)


def outlives(
    impostor: Impostor, tensors: Tensors = SMALL, kinds: Sequence[Transport] | None = None, **options: Any
) -> str:
    """How a client ends that asks `impostor`: with every byte right, or with one line for each attempt."""
    client = client_for(tensors, kinds or transports(["tcp"]), **{"timeouts": Timeouts(20.0, 20.0), **options})
    reasons: tuple[str, ...] = ()
    try:
        fetched = client.fetch([impostor.endpoint])
    except SourcesExhausted as error:
        reasons = error.reasons
    else:
        tensors.assert_in(fetched.memory)
        fetched.memory.close()
    assert not [reason[:200] for reason in reasons if len(reason) > LINE_LIMIT or not reason.isprintable()]
    wait_until(lambda: not netloader_threads())
    return "\n".join(reasons)
