"""Clients that do not want to be ended: weights that are about to move or change wait for none of them."""

from __future__ import annotations

import contextlib
import dataclasses
import select
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from support.certificates import Authority
from support.peers.messages import payload
from support.peers.strangers import Intruder, is_idle
from support.sources import IDENTITY, Tensors, fetch, serving
from support.wait import wait_until
from vllm_ascend.model_loader.netloader.client.inquiry import inquire
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.server import session as server_session
from vllm_ascend.model_loader.netloader.server.server import WeightServer
from vllm_ascend.model_loader.netloader.transport import sender
from vllm_ascend.model_loader.netloader.transport.base import Timeouts
from vllm_ascend.model_loader.netloader.transport.digests import CHUNK_BYTES
from vllm_ascend.model_loader.netloader.transport.registry import transports
from vllm_ascend.model_loader.netloader.weights.identity import RankCoordinates
from vllm_ascend.model_loader.netloader.wire.access import Access
from vllm_ascend.model_loader.netloader.wire.messages import (
    AskDigests,
    Attach,
    Fetch,
    Follow,
    Gather,
    Join,
    Message,
    Publish,
)

pytestmark = pytest.mark.timeout(60)

ALL = transports(["shared_memory", "tcp", "process_group"])
TIMEOUTS = Timeouts(connect=20.0, stall=2.0)
"""A message to a client may take long, and the wait for its session may not."""
ON_HOST = Tensors.of_shapes((8 << 20,))
"""More than the buffers of a connection hold."""
LIVE = dataclasses.replace(ON_HOST, served_on=torch.device("cpu"))
"""The same weights as on an accelerator, where nothing may read the memory once it moves."""


@dataclasses.dataclass
class Clinging:
    """A client in a session, with all that it has opened."""

    source: Endpoint
    access: Access
    opened: contextlib.ExitStack

    def line(self, small_buffers: bool = False) -> Intruder:
        line = self.opened.enter_context(Intruder(self.source, access=self.access).greet())
        if small_buffers:
            set_buffers(line.socket, 4096)  # which are soon full
        return line

    def control(self, small_buffers: bool = False) -> tuple[Intruder, bytes]:
        line = self.line(small_buffers)
        return line, line.accepted(tensors=LIVE)

    def data(self) -> Intruder:
        _, session = self.control()
        return self.line().say(Attach(session))

    def for_ever(self, line: Intruder, message: Message) -> None:
        """Says `message` again and again and reads the answers, until it no longer can."""

        def say() -> None:
            with contextlib.suppress(OSError):
                while True:
                    line.say(*[message] * 20)

        for target in (say, line.hear_out):
            thread = threading.Thread(target=target, daemon=True)
            thread.start()
            self.opened.callback(thread.join)
        self.opened.callback(line.shut_down)


def set_buffers(sock: socket.socket, nbytes: int) -> None:
    for buffer in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        sock.setsockopt(socket.SOL_SOCKET, buffer, nbytes)


def says_nothing(client: Clinging) -> None:
    client.control()


def asks_for_digests_for_ever(client: Clinging) -> None:
    control, _ = client.control()
    client.for_ever(control, AskDigests(0, 1))


def asks_for_digests_and_reads_none(client: Clinging) -> None:
    control, _ = client.control(small_buffers=True)
    while select.select([], [control.socket], [], 0.2)[1]:  # until the server takes no more
        control.say(AskDigests(0, 1))


def follows_for_ever(client: Clinging) -> None:
    control, _ = client.control()
    client.for_ever(control, Follow(19001))


def follows_and_reads_nothing(client: Clinging) -> None:
    control, _ = client.control(small_buffers=True)
    while select.select([], [control.socket], [], 0.2)[1]:  # until the server takes no more
        control.send(b"".join(control.tagged(payload(Follow())) for _ in range(100)))


def fetches_for_ever(client: Clinging) -> None:
    client.for_ever(client.data(), Fetch(0, CHUNK_BYTES))


def fetches_and_reads_nothing(client: Clinging) -> None:
    client.data().say(Fetch(0, CHUNK_BYTES), Fetch(CHUNK_BYTES, CHUNK_BYTES))


def stops_in_a_frame(client: Clinging) -> None:
    control, session = client.control()
    control.send(b"\x00\x00\x10\x00half a frame")
    client.line().say(Attach(session)).send(b"\x00\x00\x10\x00half a frame")


def does_not_fetch_the_descriptor(client: Clinging) -> None:
    line, offer = client.line(), transports(["shared_memory"])[0].offer()
    line.say(Join(IDENTITY, RankCoordinates(), ON_HOST.manifest.digest, (offer,)))
    line.hear()


def asks_for_a_group_and_does_not_come(client: Clinging) -> None:
    line = client.line()
    line.accepted("process_group", LIVE)
    line.say(Gather()).hear_kind(Publish)


CLINGING = (
    says_nothing,
    asks_for_digests_for_ever,
    asks_for_digests_and_reads_none,
    follows_for_ever,
    follows_and_reads_nothing,
    fetches_for_ever,
    fetches_and_reads_nothing,
    stops_in_a_frame,
    does_not_fetch_the_descriptor,
    asks_for_a_group_and_does_not_come,
)


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> Access:
    directory: Path = tmp_path_factory.mktemp("certificates")
    return Authority(directory, "ours").identify("instance").access()


@pytest.fixture(autouse=True)
def any_number_of_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets clients ask without end, so that nothing but `end` ends them."""
    for module in (sender, server_session):
        monkeypatch.setattr(module, "TRIES_PER_CHUNK", 1 << 40)


@pytest.mark.parametrize("tls", [False, True], ids=["", "TLS"])
@pytest.mark.parametrize("cling", CLINGING, ids=lambda cling: cling.__name__)
def test_no_client_keeps_its_session_alive(
    cling: Callable[[Clinging], None], tls: bool, opened: contextlib.ExitStack, certified: Access
) -> None:
    access = certified if tls else Access()
    tensors = ON_HOST if cling is does_not_fetch_the_descriptor else LIVE
    with serving(tensors, ALL, timeouts=TIMEOUTS, access=access) as (server, source):
        set_buffers_of(server, 4096 if cling is asks_for_digests_and_reads_none else 1 << 20)
        cling(Clinging(source, access, opened))
        wait_until(lambda: len(server.state().sessions) == 1)
        set_buffers_of(server, 1 << 20)
        server.suspend("it sleeps")
        assert inquire(source, 60, access).sessions == 0
        server.resume()
        assert_serves(source, access)
        opened.close()
        wait_until(lambda: is_idle(server))


def set_buffers_of(server: WeightServer, nbytes: int) -> None:
    """Sets the buffers of all connections from now on, which inherit them from the listener."""
    assert server.listener.bound is not None
    set_buffers(server.listener.bound.socket, nbytes)


def assert_serves(source: Endpoint, access: Access) -> None:
    _, fetched = fetch(ON_HOST, transports(["tcp"]), source, access=access)
    ON_HOST.assert_in(fetched.memory)
    fetched.memory.close()


def test_whoever_waits_for_bandwidth_is_ended_too(opened: contextlib.ExitStack) -> None:
    """At this rate the bytes that are asked for take hours."""
    with serving(LIVE, transports(["tcp"]), timeouts=TIMEOUTS, max_bandwidth=1000) as (server, source):
        client = Clinging(source, Access(), opened)
        _, session = client.control()
        lines = [client.line().say(Attach(session), Fetch(0, CHUNK_BYTES)) for _ in range(8)]
        select.select([line.socket for line in lines], [], [], 40)
        server.suspend("it sleeps")
        opened.close()
        wait_until(lambda: is_idle(server))


def test_an_ended_client_that_listens_hears_why(opened: contextlib.ExitStack) -> None:
    with serving(LIVE, transports(["tcp"]), timeouts=TIMEOUTS) as (server, source):
        control, _ = Clinging(source, Access(), opened).control()
        server.suspend("it sleeps")
        assert control.hear() == {"type": "End", "reason": "it sleeps", "denies": True}
        control.hear_out()
