"""Clients that wait for a turn: hundreds of them cost next to nothing, whatever they do."""

from __future__ import annotations

import contextlib
import gc
import itertools
import socket
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace

import msgspec
import pytest

from support.certificates import Authority
from support.peers.strangers import Intruder, is_idle, many_hosts, netloader_threads
from support.sources import IDENTITY, SMALL, Tensors, fetch, serving
from support.wait import wait_until
from vllm_ascend.model_loader.netloader.client.inquiry import inquire
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.server.admission import turns, waiting
from vllm_ascend.model_loader.netloader.server.publications import Publication
from vllm_ascend.model_loader.netloader.server.server import WeightServer
from vllm_ascend.model_loader.netloader.transport import rate
from vllm_ascend.model_loader.netloader.transport.base import Timeouts
from vllm_ascend.model_loader.netloader.transport.registry import transports
from vllm_ascend.model_loader.netloader.weights.identity import RankCoordinates
from vllm_ascend.model_loader.netloader.weights.memory import Memory
from vllm_ascend.model_loader.netloader.wire.access import Access
from vllm_ascend.model_loader.netloader.wire.messages import AskDigests, Join, Offer, Wait

pytestmark = pytest.mark.timeout(60)

TCP = transports(["tcp"])
PATIENT = Timeouts(connect=60.0, stall=60.0)
TOKEN = Access(b"a token of thirty-two bytes long")


def queue(source: Endpoint, opened: contextlib.ExitStack, count: int, access: Access | None = None) -> list[Intruder]:
    hosts = itertools.islice(many_hosts(), count)
    return [opened.enter_context(Intruder(source, host, access).greet().join()) for host in hosts]


def hold_turns(source: Endpoint, opened: contextlib.ExitStack, count: int, access: Access | None = None) -> None:
    for number in range(count):
        opened.enter_context(Intruder(source, f"127.8.0.{number + 1}", access).greet()).accepted()


def test_hundreds_that_wait_have_one_thread_and_the_order_is_made_once_for_a_change(
    opened: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "WAIT_NOTICE", 0.1)
    with serving(SMALL, TCP, timeouts=PATIENT, max_clients=2) as (server, source):
        hold_turns(source, opened, 2)
        lines = queue(source, opened, 200)
        wait_until(lambda: server.state().waiting == 200)
        wait_until(lambda: len(netloader_threads()) == 4)  # one accepts, two serve
        server.turns.in_order()  # is made now, if it was not
        made, arrange = list[int](), turns.arrange
        monkeypatch.setattr(turns, "arrange", lambda *turns: (made.append(1), arrange(*turns))[1])
        for _ in range(3):
            places = sorted(line.hear_kind(Wait)["ahead"] for line in lines)
        assert places == list(range(200))
        assert not made  # nothing has changed
        lines[0].reset()
        wait_until(lambda: server.state().waiting == 199)
        for line in lines[1:]:
            while line.hear_kind(Wait)["ahead"] > 198:
                pass
        assert len(made) <= 2
        opened.close()
        wait_until(lambda: is_idle(server))


def test_whoever_waits_is_told_how_many_are_served_and_how_many_come_first(opened: contextlib.ExitStack) -> None:
    with serving(SMALL, TCP, timeouts=PATIENT, max_clients=2) as (_, source):
        hold_turns(source, opened, 2)
        first, second = queue(source, opened, 2)
        heard = [line.hear_kind(Wait) for line in (first, second)]
        assert [(wait["served"], wait["ahead"]) for wait in heard] == [(2, 0), (2, 1)]


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> Access:
    return Authority(tmp_path_factory.mktemp("certificates"), "ours").identify("instance").access()


@pytest.mark.parametrize("kind", ["nothing", "token", "TLS"])
def test_turns_come_one_after_another(kind: str, opened: contextlib.ExitStack, certified: Access) -> None:
    access = {"nothing": Access(), "token": TOKEN, "TLS": certified}[kind]
    with serving(SMALL, TCP, timeouts=PATIENT, access=access, max_clients=1) as (server, source):
        holder = contextlib.ExitStack()
        hold_turns(source, holder, 1, access)
        fetched = list[Tensors]()

        def take() -> None:
            memory = fetch(SMALL, TCP, source, timeouts=PATIENT, access=access)[1].memory
            SMALL.assert_in(memory)
            memory.close()
            fetched.append(SMALL)

        threads = [threading.Thread(target=take, daemon=True) for _ in range(8)]
        for thread in threads:
            thread.start()
        wait_until(lambda: server.state().waiting == 8)
        holder.close()
        for thread in threads:
            thread.join()
        assert len(fetched) == 8
        wait_until(lambda: is_idle(server))


def test_whoever_waits_hears_the_reason_when_its_weights_are_gone(opened: contextlib.ExitStack) -> None:
    with serving(SMALL, TCP, timeouts=PATIENT, max_clients=1) as (server, source):
        hold_turns(source, opened, 1)
        (line,) = queue(source, opened, 1)
        line.hear_kind(Wait)
        server.suspend("it sleeps")
        while (heard := line.hear())["type"] == "Wait":
            pass
        assert heard["reason"] == "this instance cannot serve its target weights: it sleeps"


def test_whoever_waits_takes_what_is_served_when_its_turn_comes(opened: contextlib.ExitStack) -> None:
    with serving(SMALL, TCP, timeouts=PATIENT, max_clients=1) as (server, source):
        hold_turns(source, opened, 1)
        (line,) = queue(source, opened, 1)
        line.hear_kind(Wait)
        server.publish(Publication(IDENTITY, RankCoordinates(), SMALL.store(generation=7)))
        while (heard := line.hear())["type"] == "Wait":
            pass
        assert heard["generation"] == 7


OTHER_WEIGHTS = Tensors({name: tensor + 1 for name, tensor in SMALL.by_name.items()})
RELOADED = msgspec.structs.replace(IDENTITY, fingerprint="beef")


def any_fingerprint(source: Endpoint, opened: contextlib.ExitStack) -> Intruder:
    """Waits for the model, whatever its checkpoint."""
    identity = msgspec.structs.replace(IDENTITY, fingerprint="")
    line = opened.enter_context(Intruder(source, "127.7.0.1").greet())
    line.say(Join(identity, RankCoordinates(), SMALL.manifest.digest, (Offer("tcp"),)))
    return line


def test_whoever_waits_is_told_of_what_is_served_now(
    opened: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "WAIT_NOTICE", 0.05)
    with serving(SMALL, TCP, timeouts=PATIENT, max_clients=1) as (server, source):
        store = SMALL.store()
        roots = [store.root()]
        server.publish(Publication(IDENTITY, RankCoordinates(), store))
        assert server.turns.take("127.9.0.1") is not None  # for ever
        line = any_fingerprint(source, opened)
        heard = line.hear_kind(Wait)
        assert (heard["root"], heard["fingerprint"]) == (roots[0], IDENTITY.fingerprint)
        store = OTHER_WEIGHTS.store(server.next_generation("target"))
        roots.append(store.root())
        server.publish(Publication(RELOADED, RankCoordinates(), store))
        while (heard := line.hear_kind(Wait))["root"] == roots[0]:
            pass
        assert (heard["root"], heard["fingerprint"]) == (roots[1], RELOADED.fingerprint)


def changes_its_weights(server: WeightServer) -> None:
    server.publish(Publication(RELOADED, RankCoordinates(), OTHER_WEIGHTS.store(server.next_generation("target"))))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (changes_its_weights, "the model or its partitioning differs"),
        (lambda server: server.withdraw("target"), "this server does not hold target weights: it holds no weights yet"),
        (lambda server: server.decline("target", "w"), "this instance cannot serve its target weights: w"),
    ],
    ids=["other weights", "withdrawn", "declined"],
)
def test_whoever_waits_for_what_there_is_no_more_hears_so_before_its_turn(
    change: Callable[[WeightServer], None],
    reason: str,
    opened: contextlib.ExitStack,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(waiting, "WAIT_NOTICE", 0.05)
    with serving(SMALL, TCP, timeouts=PATIENT, max_clients=1) as (server, source):
        assert server.turns.take("127.9.0.1") is not None  # for ever
        (line,) = queue(source, opened, 1)
        line.hear_kind(Wait)
        change(server)
        while (heard := line.hear())["type"] == "Wait":
            pass
        assert (heard["type"], heard["reason"]) == ("Refuse", reason)
        wait_until(lambda: not server.state().waiting)


def test_whoever_waits_keeps_no_weights_that_were_replaced(
    opened: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "WAIT_NOTICE", 0.05)
    with serving(SMALL, TCP, timeouts=PATIENT, max_clients=1) as (server, source):
        assert server.turns.take("127.9.0.1") is not None  # for ever
        served = list[weakref.ref[Memory]]()
        for _ in range(3):
            store = OTHER_WEIGHTS.store(server.next_generation("target"))
            served.append(weakref.ref(store.memory))
            server.publish(Publication(RELOADED, RankCoordinates(), store))
            any_fingerprint(source, opened).hear_kind(Wait)
        wait_until(lambda: gc.collect() >= 0 and not any(memory() for memory in served[:-1]))
        assert server.state().waiting == 3


def speaks(line: Intruder) -> None:
    line.say(AskDigests(0, 1))


def sends_garbage(line: Intruder) -> None:
    line.send(b"\xff" * 64)


@pytest.mark.parametrize("act", [speaks, sends_garbage], ids=lambda act: act.__name__)
def test_whoever_waits_has_nothing_to_say(act: object, opened: contextlib.ExitStack) -> None:
    with serving(SMALL, TCP, timeouts=PATIENT, max_clients=1) as (server, source):
        hold_turns(source, opened, 1)
        line, other = queue(source, opened, 2)
        line.hear_kind(Wait)
        act(line)  # type: ignore[operator]
        line.hear_out()
        wait_until(lambda: server.state().waiting == 1)
        other.hear_kind(Wait)


def test_whoever_waits_and_drips_is_sent_away(
    opened: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rate, "RATE_SECONDS", 1000.0)  # whoever has the turn does not become slow
    with serving(SMALL, TCP, timeouts=PATIENT, max_clients=1) as (server, source):
        hold_turns(source, opened, 1)
        (line,) = queue(source, opened, 1)
        line.hear_kind(Wait)
        with contextlib.suppress(OSError):
            line.send(b"\x00\x00\xff\xff")
            while server.state().waiting:
                line.send(b"\x00")
                threading.Event().wait(0.03)
        wait_until(lambda: "ended the connection with" in caplog.text)


def test_whoever_waits_and_does_not_read_is_sent_away(
    opened: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(waiting, "WAIT_NOTICE", 0.0)
    monkeypatch.setattr(waiting, "_ROUND_SECONDS", 0.0)
    monkeypatch.setattr(rate, "RATE_SECONDS", 1000.0)  # whoever has the turn does not become slow
    with serving(SMALL, TCP, timeouts=PATIENT, max_clients=1) as (server, source):
        listener = server.listener.bound
        assert listener is not None
        listener.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # which connections inherit
        hold_turns(source, opened, 1)
        line = opened.enter_context(Intruder(source))
        line.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        line.greet().join()
        wait_until(lambda: "it does not read that it has to wait" in caplog.text)
        assert (server.state().waiting, inquire(source, 60).sessions) == (0, 1)


def test_a_server_is_closed_while_clients_wait(opened: contextlib.ExitStack) -> None:
    with serving(SMALL, TCP, timeouts=PATIENT, max_clients=1) as (server, source):
        hold_turns(source, opened, 1)
        lines = queue(source, opened, 20)
        wait_until(lambda: server.state().waiting == 20)
    assert not server.state().connections
    for line in lines:
        line.hear_out()
    wait_until(lambda: not netloader_threads())


def test_where_no_thread_can_be_had_nobody_keeps_a_turn(
    opened: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def fail_for_who_waits(thread: threading.Thread) -> None:
        if thread.name.startswith("netloader 127.7."):
            raise RuntimeError("can't start new thread")
        start(thread)

    with serving(SMALL, TCP, timeouts=PATIENT, max_clients=1) as (server, source):
        holder = contextlib.ExitStack()
        hold_turns(source, holder, 1)
        (line,) = queue(source, opened, 1)
        line.hear_kind(Wait)
        monkeypatch.setattr(threading.Thread, "start", fail_for_who_waits)
        holder.close()
        while (heard := line.hear())["type"] == "Wait":
            pass
        assert heard["reason"] == "no room: can't start new thread"
        wait_until(lambda: is_idle(server))


def test_an_error_among_those_who_wait_sends_them_away_and_not_the_next(
    opened: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(SMALL, TCP, timeouts=PATIENT, max_clients=1) as (server, source):
        hold_turns(source, opened, 1)
        (line,) = queue(source, opened, 1)
        line.hear_kind(Wait)
        with monkeypatch.context() as patch:
            patch.setattr(server.turns, "in_order", lambda: None)
            line.hear_out()
            wait_until(lambda: not server.state().waiting)
        (line,) = queue(source, opened, 1)
        line.hear_kind(Wait)
        opened.close()
        wait_until(lambda: is_idle(server))


def test_turns_of_a_server_that_is_configured_anew(opened: contextlib.ExitStack) -> None:
    with serving(SMALL, TCP, timeouts=PATIENT, max_clients=1) as (server, source):
        hold_turns(source, opened, 1)
        (line,) = queue(source, opened, 1)
        line.hear_kind(Wait)
        server.configure(replace(server.settings, max_clients=2))
        while (heard := line.hear())["type"] == "Wait":
            pass
        assert heard["type"] == "Accept"
