"""A worker process of a soak, and the kinds of tasks that it does."""

from __future__ import annotations

import contextlib
import gc
import logging
import random
import re
import secrets
import socket
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy

from support.peers.proxy import Fault, Proxy, Stream, close, flip, reset, throttle
from support.synthetic import IDENTITY, request_of
from tools.soak.setting import FAULTY_HOST, HOST, STRANGERS_HOST, TIMEOUTS, Kind, Result, Setting, Task, prepare_process
from vllm_ascend.model_loader.netloader.client.fetch import Client
from vllm_ascend.model_loader.netloader.client.options import FetchOptions
from vllm_ascend.model_loader.netloader.client.session import Fetched
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import SourcesExhausted
from vllm_ascend.model_loader.netloader.transport.tcp import CONNECTIONS, TcpTransport
from vllm_ascend.model_loader.netloader.weights.identity import RankCoordinates
from vllm_ascend.model_loader.netloader.wire.access import Access
from vllm_ascend.model_loader.netloader.wire.conversation import frame
from vllm_ascend.model_loader.netloader.wire.messages import AskDigests, Done, Fetch, Hello, Inquire, Join, Leave, Offer

WAIT_TIMEOUT: Final = 20.0
SLOW_RATE: Final = 256 << 10
SLOW_SECONDS: Final = 6.0
"""More than a server needs to notice that a client takes next to nothing."""
FLOOD: Final = 100
"""Connections."""
CLINGING: Final = 20
"""Connections."""
UNFRAMED_FROM: Final = 64 << 10
"""From this byte of a connection on there are only weights: messages to a client of these weights are shorter."""
FAULTS: Final = 6
"""At most so many connections of a task are cut or corrupted."""


class Worker:
    """Does the task that it is called with, and answers with the result."""

    def __init__(self, setting: Setting) -> None:
        prepare_process()
        self._setting = setting
        self._damaged = _DamageCounter()
        logging.getLogger("vllm_ascend").addHandler(self._damaged)

    def __call__(self, task: Task) -> Result:
        self._damaged.count = 0
        result = self._do(task, random.Random(task.seed))
        gc.collect()
        return replace(result, damaged=self._damaged.count)

    def _do(self, task: Task, chance: random.Random) -> Result:
        match task.kind:
            case "flood":
                flood(task, chance)
                return Result(task.kind, succeeded=True)
            case "clinging":
                cling(task, self._setting, chance)
                return Result(task.kind, succeeded=True)
            case "stranger":
                return fetch_as_stranger(task, self._setting, chance)
            case "cut" | "corrupted" | "slow":
                return fetch_by_proxies(task, self._setting, chance)
        return fetch(task, self._setting, self._setting.access(task.listener), endpoints(task))


class _DamageCounter(logging.Handler):
    """Counts the chunks that a client reports as damaged."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += "arrived damaged: its digest differs" in str(record.msg)


def endpoints(task: Task) -> list[Endpoint]:
    return [Endpoint(HOST, port) for port in task.sources]


def fetch(task: Task, setting: Setting, access: Access, sources: Sequence[Endpoint]) -> Result:
    """Takes the weights from one of the sources and compares them with the edition that they are said to be."""
    request = request_of(setting.nbytes)
    options = FetchOptions(request, TIMEOUTS, access, verify=task.verify, wait_timeout=WAIT_TIMEOUT)
    client = Client(options, (TcpTransport(),))
    try:
        fetched = client.fetch(sources)
    except SourcesExhausted as error:
        return Result(task.kind, failures=tuple(kind_of_failure(reason) for reason in error.reasons))
    failures = tuple(kind_of_failure(str(attempt)) for attempt in client.attempts)
    with contextlib.closing(fetched.memory):
        return Result(task.kind, succeeded=True, failures=failures, wrong=difference(fetched, setting))


def difference(fetched: Fetched, setting: Setting) -> str:
    """How the bytes differ from those of the edition that they are said to be. Empty where they do not."""
    edition = fetched.attributes.get("edition")
    if not isinstance(edition, int):
        return f"the weights came with the edition {edition!r}"
    expected = numpy.frombuffer(setting.contents(edition), numpy.uint8)
    differing = numpy.flatnonzero(numpy.frombuffer(fetched.memory.contents()[:], numpy.uint8) != expected)
    if not differing.size:
        return ""
    return (
        f"WRONG BYTES: {differing.size} of edition {edition}, the first at {differing[0]}, the last at {differing[-1]}"
    )


def kind_of_failure(reason: str) -> str:
    """`reason` without its source and its numbers, so that the like can be counted together."""
    text = re.sub(r"\b[0-9a-f]{16,}\b|[0-9]+", "N", reason.partition(": ")[2])
    return text if len(text) <= 100 else f"{text[:100]}..."


def fetch_by_proxies(task: Task, setting: Setting, chance: random.Random) -> Result:
    """Fetches through a faulty proxy before each server; of a slow one, only the first server has it."""
    with contextlib.ExitStack() as scope:
        sources = endpoints(task)
        for number, source in enumerate(sources[:1] if task.kind == "slow" else sources):
            faults = faults_of(task.kind, setting.nbytes, chance)
            proxy = Proxy(source, *faults, source_host=FAULTY_HOST, payload_apart=False)
            sources[number] = scope.enter_context(proxy).endpoint
        return fetch(task, setting, setting.access(task.listener), sources)


def faults_of(kind: Kind, nbytes: int, chance: random.Random) -> list[Fault]:
    """One for each of the first connections; the later ones have none."""
    share = nbytes // CONNECTIONS
    faulty = range(chance.randint(1, FAULTS))
    match kind:
        case "cut":
            return [
                Fault(
                    Stream.TO_CLIENT,
                    chance.randrange(share if chance.random() < 0.8 else 1000),
                    chance.choice((close, reset)),
                    connection,
                )
                for connection in faulty
            ]
        case "corrupted":
            return [
                Fault(Stream.TO_CLIENT, chance.randrange(UNFRAMED_FROM, UNFRAMED_FROM + share), flip(0x55), connection)
                if chance.random() < 0.8
                else Fault(Stream.TO_SERVER, chance.randrange(500), flip(0x55), connection)
                for connection in faulty
            ]
        case _:
            slowly = throttle(SLOW_RATE, SLOW_SECONDS)
            return [Fault(Stream.TO_SERVER, 0, slowly, connection) for connection in range(1 + CONNECTIONS)]


def fetch_as_stranger(task: Task, setting: Setting, chance: random.Random) -> Result:
    """Succeeds if it gets nothing."""
    unfit = {
        "open": [setting.access("token"), setting.access("tls")],
        "token": [Access(), Access(secrets.token_bytes(32)), setting.access("tls")],
        "tls": [Access(), setting.access("token")],
    }
    access = chance.choice(unfit[task.listener])
    with contextlib.ExitStack() as scope:
        proxies = [scope.enter_context(Proxy(source, source_host=STRANGERS_HOST)) for source in endpoints(task)]
        result = fetch(task, setting, access, [proxy.endpoint for proxy in proxies])
    wrong = f"a stranger got weights from the listener {task.listener!r}" if result.succeeded else ""
    return replace(result, succeeded=not result.succeeded, failures=(), wrong=wrong)


def flood(task: Task, chance: random.Random) -> None:
    """Makes many connections at once that lead to nothing."""
    greeting = frame(Hello())
    sayings = (
        b"",
        greeting,
        greeting + frame(Inquire()) * 200,
        greeting + chance.randbytes(2000),
        chance.randbytes(2000),
        (1 << 30).to_bytes(4, "big") + chance.randbytes(2000),
    )
    with contextlib.ExitStack() as scope:
        for _ in range(FLOOD):
            with contextlib.suppress(OSError):
                connect_as_stranger(scope, task, chance).sendall(chance.choice(sayings))
        time.sleep(chance.uniform(0, 1))


def cling(task: Task, setting: Setting, chance: random.Random) -> None:
    """Begins sessions that lead to nothing. Where the listener wants a token or TLS, not even they come about."""
    join = Join(IDENTITY, RankCoordinates(), request_of(setting.nbytes).manifest.digest, (Offer("tcp"),))
    asking = frame(AskDigests(0, 1)) * 100
    sayings = (b"", asking, frame(Done()), frame(Leave("words without end, " * 200)), frame(Fetch(0, 1)), b"\0\0\xff")
    end = time.monotonic() + chance.uniform(1, 4)
    with contextlib.ExitStack() as scope:
        connections: list[socket.socket] = []
        for _ in range(CLINGING):
            with contextlib.suppress(OSError):
                connection = connect_as_stranger(scope, task, chance)
                connection.sendall(frame(Hello()) + frame(join))
                connection.setblocking(False)
                connections.append(connection)
        readers = set(connections[::2])
        while time.monotonic() < end:
            for connection in connections:
                with contextlib.suppress(OSError):
                    if connection in readers:
                        connection.recv(1 << 16)
                    connection.send(chance.choice(sayings))
            time.sleep(0.05)


def connect_as_stranger(scope: contextlib.ExitStack, task: Task, chance: random.Random) -> socket.socket:
    """A connection to one of the servers, which `scope` closes."""
    address = (HOST, chance.choice(task.sources))
    return scope.enter_context(socket.create_connection(address, 1, (STRANGERS_HOST, 0)))
