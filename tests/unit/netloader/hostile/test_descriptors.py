"""However many strangers come from however many addresses, the engine keeps the descriptors that it needs."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from support.peers.strangers import Intruder, is_idle, many_hosts
from support.sources import SMALL, fetch, serving
from support.wait import wait_until
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import SourcesExhausted
from vllm_ascend.model_loader.netloader.server import descriptors, listener
from vllm_ascend.model_loader.netloader.transport.base import Timeouts
from vllm_ascend.model_loader.netloader.transport.registry import transports
from vllm_ascend.model_loader.netloader.wire.channel import Channel
from vllm_ascend.model_loader.netloader.wire.messages import Attach
from vllm_ascend.model_loader.netloader.wire.pacing import Pacer

pytestmark = pytest.mark.timeout(60)

TCP = transports(["tcp"])
PATIENT = Timeouts(connect=60.0, stall=60.0)


@contextlib.contextmanager
def limit(soft: int, hard: int | None = None) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, before[1] if hard is None else hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_soft_limit_is_raised_to_the_hard_one_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    most = min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], 65_535)
    with limit(most - 100):
        descriptors.raise_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == most
        descriptors.raise_limit()
    assert caplog.messages == [
        f"raised the limit of open files of this process (RLIMIT_NOFILE) from {most - 100} to {most}"
    ]


def test_peers_take_no_more_than_their_share() -> None:
    of_peers = descriptors.Descriptors()
    with limit(100):
        assert of_peers.limit == 50
        assert [of_peers.take(count) for count in (30, 21, 20, 1)] == [True, False, True, False]
        of_peers.give(1)
        assert of_peers.take(1)


@pytest.mark.parametrize(("soft", "first"), [(64, 56), (256, 224), (4096, 4032)])
def test_the_highest_numbers_are_for_the_engine(soft: int, first: int) -> None:
    with limit(soft):
        assert [descriptors.is_among_the_last(number) for number in (0, first - 1, first, soft)] == [
            False,
            False,
            True,
            True,
        ]


def knock(source: Endpoint, opened: contextlib.ExitStack, count: int) -> list[Intruder]:
    """Connects `count` strangers, each from another address."""
    return [opened.enter_context(Intruder(source, host)) for host, _ in zip(many_hosts(), range(count), strict=False)]


STRANGERS = """
import resource, socket, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
lines = [
    socket.create_connection(("127.0.0.1", int(sys.argv[1])), source_address=(f"127.7.{n // 250}.{n % 250 + 1}", 0))
    for n in range(int(sys.argv[2]))
]
print("here", flush=True)
sys.stdin.read()
"""


def test_strangers_never_bring_the_process_to_its_limit() -> None:
    with serving(SMALL, TCP, timeouts=PATIENT) as (server, source):
        with limit(len(os.listdir("/proc/self/fd")) + 100):
            command = [sys.executable, "-c", STRANGERS, str(source.port), "300"]
            with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as strangers:
                assert strangers.stdout is not None
                assert strangers.stdout.readline() == b"here\n"
                wait_until(lambda: server.state().connections >= descriptors.of_peers.limit)
                time.sleep(0.2)  # for those that were still to be accepted
                engine = [os.open(os.devnull, os.O_RDONLY) for _ in range(30)]
                assert server.state().connections <= descriptors.of_peers.limit
                strangers.communicate()
            for number in engine:
                os.close(number)
        wait_until(lambda: is_idle(server))
        assert descriptors.of_peers.taken == 0


def test_where_the_engine_has_taken_most_nobody_else_gets_the_rest(opened: contextlib.ExitStack) -> None:
    with serving(SMALL, TCP, timeouts=PATIENT) as (server, source):
        with limit(1000), contextlib.ExitStack() as engine:
            while (number := os.open(os.devnull, os.O_RDONLY)) < 1000 - 64 - 12:
                engine.callback(os.close, number)
            engine.callback(os.close, number)
            lines = knock(source, opened, 20)
            refused = lines[-1].hear()["reason"]
            assert refused == "no room: this process may have no more open files (RLIMIT_NOFILE)"
            assert 0 < server.state().connections < 12
            opened.close()
            wait_until(lambda: is_idle(server))
        _, fetched = fetch(SMALL, TCP, source)
        fetched.memory.close()


def test_what_sessions_open_counts_too(opened: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(SMALL, TCP, timeouts=PATIENT) as (server, source):
        control = opened.enter_context(Intruder(source).greet())
        session = control.accepted()
        opened.enter_context(Intruder(source).greet().say(Attach(session))).hear()
        assert descriptors.of_peers.taken == 2 + TCP[0].traits.descriptors
        monkeypatch.setattr(descriptors, "SHARE", descriptors.limit_of_process() // (3 + TCP[0].traits.descriptors))
        with pytest.raises(SourcesExhausted, match="no room: this process may have no more open files"):
            fetch(SMALL, TCP, source)
        opened.close()
        wait_until(lambda: is_idle(server) and not descriptors.of_peers.taken)


@pytest.mark.parametrize("name", ["tcp", "shared_memory"])
def test_a_session_takes_no_more_than_its_transport_says(name: str, opened: contextlib.ExitStack) -> None:
    kinds = transports([name])
    store = SMALL.store()
    assert store.bytes.nbytes == SMALL.manifest.nbytes  # mapped now, which takes a descriptor of the store's own
    before = len(os.listdir("/proc/self/fd"))
    with kinds[0].sender(store, PATIENT, Pacer(None)):
        assert len(os.listdir("/proc/self/fd")) - before <= kinds[0].traits.descriptors
    store.close()


def test_an_error_does_not_end_the_accepting_thread(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failures = iter([MemoryError("none left"), RuntimeError("unforeseen")])

    def failing(*arguments: Any) -> Channel:
        for failure in failures:
            raise failure
        return Channel(*arguments)

    with serving(SMALL, TCP, timeouts=PATIENT) as (server, source):
        monkeypatch.setattr(listener, "Channel", failing)
        for _ in range(2):
            with Intruder(source) as line:
                line.hear_out()
        _, fetched = fetch(SMALL, TCP, source)
        fetched.memory.close()
        wait_until(lambda: is_idle(server))
    assert [record.getMessage() for record in caplog.records if record.exc_info] == [
        "could not take a connection: an error of this server"
    ] * 2
