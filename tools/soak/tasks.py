"""What the workers of a soak do: the kinds of tasks."""

from __future__ import annotations

import contextlib
import gc
import random
import re
import secrets
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

import numpy

from support.peers.proxy import Fault, Proxy, Stream, close, flip, reset, throttle
from support.relay import ServerRelay
from support.synthetic import IDENTITY, request_of
from tools.soak.servers import LISTENERS, NBYTES, SERVERS, TIMEOUTS, Setting, weights
from tools.soak.watching import NetloaderLog, SoakFailed
from vllm_ascend.model_loader.netloader.client.fetch import Client
from vllm_ascend.model_loader.netloader.client.fetched import Fetched
from vllm_ascend.model_loader.netloader.client.options import FetchOptions
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import SourcesExhausted
from vllm_ascend.model_loader.netloader.server.requests import Settings
from vllm_ascend.model_loader.netloader.server.server import WeightServer
from vllm_ascend.model_loader.netloader.transport.tcp import CONNECTIONS, TcpTransport
from vllm_ascend.model_loader.netloader.weights.identity import RankCoordinates
from vllm_ascend.model_loader.netloader.wire.access import Access
from vllm_ascend.model_loader.netloader.wire.conversation import frame
from vllm_ascend.model_loader.netloader.wire.messages import AskDigests, Done, Fetch, Hello, Inquire, Join, Leave, Offer

SHARES: Final = {
    "fetch": 8,
    "killed": 2,
    "cut": 4,
    "corrupted": 4,
    "slow": 1,
    "stranger": 2,
    "flood": 2,
}
"""How often each kind of task is chosen."""
FETCHING: Final = ("fetch", "cut", "corrupted", "slow")
"""Kinds of which some must succeed."""

STRANGERS_HOST: Final = "127.0.0.2"
FAULTY_HOST: Final = "127.0.0.3"
"""Where strangers and floods, and where broken connections come from. A server stops listening for a while to an
address from which it is not greeted properly, and faultless fetches must not feel that."""
FLOOD: Final = 100
"""Connections at once."""
WAIT_TIMEOUT: Final = 20.0
FAULTS: Final = 6
"""At most so many connections to each server break, or bring wrong bytes, in one task."""
CONNECTION_BYTES: Final = NBYTES // CONNECTIONS
UNFRAMED_FROM: Final = 64 << 10
"""From this byte of a connection on there are only weights: messages to a client of these weights are shorter."""
RELAY_SECONDS: Final = 1.0
"""For how long some workers serve what they have fetched."""
SLOW_RATE: Final = 256 << 10
SLOW_SECONDS: Final = 6.0
"""More than a server needs to notice that a client takes next to nothing."""


class Task(NamedTuple):
    """One thing for a worker to do. All that is left to chance depends on the seed."""

    kind: str
    seed: int


@dataclass(frozen=True)
class Result:
    """What came of a task. `failures` has one entry per attempt that failed."""

    succeeded: bool
    failures: tuple[str, ...] = ()
    damaged_chunks: int = 0


class Worker:
    """Does the task that it is called with, and answers with the result. Raises SoakFailed."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._log = NetloaderLog()

    def __call__(self, task: Task) -> Result:
        self._log.damaged_chunks = 0
        result = Errand(self._setting, task).run()
        gc.collect()
        return replace(result, damaged_chunks=self._log.damaged_chunks)


class Errand:
    """One task, with what chance has decided about it: the listener, and the order of the servers to ask."""

    def __init__(self, setting: Setting, task: Task) -> None:
        self._setting = setting
        self._task = task
        self._chance = random.Random(task.seed)
        self._listener = self._chance.choice(LISTENERS)
        self._sources = [setting.addresses[name][self._listener] for name in self._chance.sample(SERVERS, len(SERVERS))]
        self._verify = task.kind == "corrupted" or self._chance.random() < 0.8

    def run(self) -> Result:
        match self._task.kind:
            case "cut" | "corrupted" | "slow":
                return self._fetch_by_proxies()
            case "stranger":
                return self._fetch_as_stranger()
            case "flood":
                return self._flood()
        return self._fetch(self._sources, self._setting.access(self._listener))

    def _fetch(self, sources: Sequence[Endpoint], access: Access) -> Result:
        """Takes the weights from the sources and from others that do so, passes on what it has, and compares
        everything with the edition that it is said to be.
        """
        request, kinds = request_of(NBYTES), (TcpTransport(),)
        succeeded = True
        with WeightServer(None, 0, Settings(kinds, TIMEOUTS, access)) as server:
            relay = ServerRelay(request, server) if self._verify else None
            options = FetchOptions(
                request, TIMEOUTS, access, verify=self._verify, wait_timeout=WAIT_TIMEOUT, relay=relay
            )
            client = Client(options, kinds)
            try:
                fetched = client.fetch(sources)
                if relay is not None:
                    relay.complete()
                self._compare(fetched)
                time.sleep(self._chance.choice((0.0, RELAY_SECONDS)))
                fetched.memory.close()
            except SourcesExhausted:
                succeeded = False
        return Result(succeeded, tuple(without_numbers(attempt.reason) for attempt in client.attempts))

    def _compare(self, fetched: Fetched) -> None:
        edition = fetched.attributes["edition"]
        assert isinstance(edition, int)
        expected = numpy.frombuffer(weights(edition), numpy.uint8)
        differing = numpy.flatnonzero(numpy.frombuffer(fetched.memory.contents()[:], numpy.uint8) != expected)
        if differing.size:
            raise SoakFailed(
                f"{self._task}: {differing.size} bytes of edition {edition} are wrong, from {differing[0]} on"
            )

    def _fetch_by_proxies(self) -> Result:
        """Fetches through proxies, with faults on the first connections to each server."""
        with contextlib.ExitStack() as scope:
            sources = []
            for source in self._sources:
                faults = [self._fault(connection) for connection in range(self._chance.randint(1, FAULTS))]
                proxy = Proxy(source, *faults, source_host=FAULTY_HOST, payload_apart=False)
                sources.append(scope.enter_context(proxy).endpoint)
            return self._fetch(sources, self._setting.access(self._listener))

    def _fault(self, connection: int) -> Fault:
        chance, usual = self._chance, self._chance.random() < 0.8
        match self._task.kind:
            case "cut":
                at = chance.randrange(CONNECTION_BYTES if usual else 1000)
                return Fault(Stream.TO_CLIENT, at, chance.choice((close, reset)), connection)
            case "corrupted" if usual:
                at = UNFRAMED_FROM + chance.randrange(CONNECTION_BYTES)
                return Fault(Stream.TO_CLIENT, at, flip(0x55), connection)
            case "corrupted":
                return Fault(Stream.TO_SERVER, chance.randrange(500), flip(0x55), connection)
        return Fault(Stream.TO_SERVER, 0, throttle(SLOW_RATE, SLOW_SECONDS), connection)

    def _fetch_as_stranger(self) -> Result:
        """Tries with a wrong token, or with what another listener wants. Raises SoakFailed if it gets weights."""
        others = [self._setting.access(each) for each in LISTENERS if each != self._listener]
        access = self._chance.choice([*others, Access(secrets.token_bytes(32))])
        with contextlib.ExitStack() as scope:
            proxies = [scope.enter_context(Proxy(source, source_host=STRANGERS_HOST)) for source in self._sources]
            if self._fetch([proxy.endpoint for proxy in proxies], access).succeeded:
                raise SoakFailed(f"{self._task}: the listener {self._listener!r} gave weights to a stranger")
        return Result(succeeded=True)

    def _flood(self) -> Result:
        """Makes many connections that lead to nothing, and keeps talking on them; only half of them read.

        Where the listener wants a token or TLS, not even the sessions begin.
        """
        join = Join(IDENTITY, RankCoordinates(), request_of(NBYTES).manifest.digest, (Offer("tcp"),))
        garbage, greeting = self._chance.randbytes(2000), frame(Hello())
        status = greeting + frame(Inquire()) * 200
        huge = (1 << 30).to_bytes(4, "big") + garbage
        beginnings = (b"", greeting, greeting + frame(join), greeting + garbage, status, garbage, huge)
        asking, leaving = frame(AskDigests(0, 1)) * 100, frame(Leave("words without end, " * 200))
        sayings = (b"", asking, leaving, frame(Done()), frame(Fetch(0, 1)), b"\0\0\xff")

        end = time.monotonic() + self._chance.uniform(1, 4)
        with contextlib.ExitStack() as scope:
            connections: list[socket.socket] = []
            for _ in range(FLOOD):
                with contextlib.suppress(OSError):
                    address = self._chance.choice(self._sources)
                    connection = scope.enter_context(socket.create_connection(address, 1, (STRANGERS_HOST, 0)))
                    connection.sendall(self._chance.choice(beginnings))
                    connection.setblocking(False)
                    connections.append(connection)

            while time.monotonic() < end:
                for number, connection in enumerate(connections):
                    with contextlib.suppress(OSError):
                        connection.send(self._chance.choice(sayings))
                        if number % 2:
                            connection.recv(1 << 16)
                time.sleep(0.05)
        return Result(succeeded=True)


def without_numbers(reason: str) -> str:
    """The beginning of `reason` without numbers and digests, so that the like can be counted together."""
    return re.sub(r"\b[0-9a-f]{16,}\b|[0-9]+", "N", reason)[:100]
