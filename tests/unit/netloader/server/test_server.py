"""What is served from when to when: published, replaced, withdrawn, declined, closed."""

from __future__ import annotations

import contextlib
import gc
import logging
import weakref
from dataclasses import replace

import msgspec
import pytest

from support.peers.impostor import CONTROL
from support.peers.strangers import Intruder
from support.sources import (
    IDENTITY,
    IN_PROCESS,
    SHORT,
    SMALL,
    client_for,
    fetch,
    logged,
    publication,
    reasons,
    serving,
)
from support.wait import wait_until
from vllm_ascend.model_loader.netloader.client.inquiry import announce, inquire
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import SourcesExhausted
from vllm_ascend.model_loader.netloader.server.publications import Publication
from vllm_ascend.model_loader.netloader.server.requests import Settings
from vllm_ascend.model_loader.netloader.server.server import ServerState, WeightServer
from vllm_ascend.model_loader.netloader.transport.base import Reception
from vllm_ascend.model_loader.netloader.transport.chunks.delivery import Delivery
from vllm_ascend.model_loader.netloader.transport.digests import StoreDigests
from vllm_ascend.model_loader.netloader.transport.in_process import InProcessTransport
from vllm_ascend.model_loader.netloader.transport.registry import transports
from vllm_ascend.model_loader.netloader.weights.identity import RankCoordinates
from vllm_ascend.model_loader.netloader.wire.access import Access
from vllm_ascend.model_loader.netloader.wire.messages import Fetch, Wait

TCP = transports(["tcp"])
IDLE = ServerState(
    served={"target": 1},
    not_served={},
    sessions=(),
    connections=0,
    turns=0,
    waiting=0,
    copies=0,
    replicas={"target": ()},
)


def test_closing_twice_and_without_starting_is_harmless() -> None:
    server = WeightServer("127.0.0.1", 0, Settings(IN_PROCESS, SHORT))
    server.close()
    server.start()
    server.close()
    server.close()


def test_generations_grow_by_role() -> None:
    server = WeightServer("127.0.0.1", 0, Settings(IN_PROCESS, SHORT))
    assert [server.next_generation(role) for role in ("target", "target", "draft")] == [1, 2, 1]


def test_a_transfer_of_weights_that_are_replaced_meanwhile_is_ended() -> None:
    class ReplacingTransport(InProcessTransport):
        def receive(self, reception: Reception, delivery: Delivery) -> None:
            super().receive(reception, delivery)
            server.publish(Publication(IDENTITY, RankCoordinates(), SMALL.store(generation=2)))

    with (
        serving(SMALL, IN_PROCESS) as (server, source),
        pytest.raises(SourcesExhausted, match="its weights were replaced by new ones"),
    ):
        fetch(SMALL, (ReplacingTransport(),), source)


def test_a_withdrawn_role_is_not_served_any_more() -> None:
    with serving(SMALL, IN_PROCESS) as (server, source):
        current, other = SMALL.store(), SMALL.store()
        server.publish(Publication(IDENTITY, RankCoordinates(), current))
        server.withdraw("target", weakref.ref(other.memory))
        fetch(SMALL, IN_PROCESS, source)
        server.withdraw("target", weakref.ref(current.memory))
        with pytest.raises(SourcesExhausted, match="holds no weights yet"):
            fetch(SMALL, IN_PROCESS, source)


def test_a_declined_role_is_refused_with_the_reason() -> None:
    with WeightServer("127.0.0.1", 0, Settings(IN_PROCESS, SHORT)) as server:
        server.decline("target", "w keeps its bytes in inner tensors")
        with pytest.raises(SourcesExhausted) as error:
            fetch(SMALL, IN_PROCESS, Endpoint("127.0.0.1", server.port))
        assert reasons(error).endswith(
            ": it refused: this instance cannot serve its target weights: w keeps its bytes in inner tensors"
        )
        server.decline("target", "another reason")
        with pytest.raises(SourcesExhausted, match=r"cannot serve its target weights: another reason$"):
            fetch(SMALL, IN_PROCESS, Endpoint("127.0.0.1", server.port))


def test_a_declined_role_is_no_longer_served() -> None:
    with serving(SMALL, IN_PROCESS) as (server, source):
        first = publication()
        server.publish(first)
        server.decline("target", "loading set table")
        with pytest.raises(SourcesExhausted, match="cannot serve its target weights: loading set table"):
            fetch(SMALL, IN_PROCESS, source)
        assert inquire(source, 5).holdings == ()
        assert not first.store.memory.servable


def test_a_transfer_of_weights_that_are_declined_meanwhile_is_ended() -> None:
    class DecliningTransport(InProcessTransport):
        def receive(self, reception: Reception, delivery: Delivery) -> None:
            super().receive(reception, delivery)
            server.decline("target", "loading set table")

    with serving(SMALL, IN_PROCESS) as (server, source), pytest.raises(SourcesExhausted) as error:
        fetch(SMALL, (DecliningTransport(),), source)
    assert "it ended the session: it does not serve these weights any more" in reasons(error)
    assert reasons(error).endswith("cannot serve its target weights: loading set table")


def test_another_role_than_the_declined_one_goes_on_being_served() -> None:
    draft = msgspec.structs.replace(IDENTITY, role="draft")
    with serving(SMALL, IN_PROCESS) as (server, source):
        server.publish(publication("draft"))
        server.decline("draft", "loading set table")
        SMALL.assert_in(fetch(SMALL, IN_PROCESS, source)[1].memory)
        with pytest.raises(SourcesExhausted, match="cannot serve its draft weights: loading set table"):
            client_for(SMALL.request(draft), IN_PROCESS).fetch([source])
        unknown = msgspec.structs.replace(IDENTITY, role="adapter")
        with pytest.raises(SourcesExhausted, match=r"does not hold adapter weights: it holds target$"):
            client_for(SMALL.request(unknown), IN_PROCESS).fetch([source])


def test_publishing_a_role_ends_its_declining_and_no_other() -> None:
    with WeightServer("127.0.0.1", 0, Settings(IN_PROCESS, SHORT)) as server:
        source = Endpoint("127.0.0.1", server.port)
        server.decline("target", "loading set table")
        server.decline("draft", "w is sparse")
        server.publish(publication("target"))
        SMALL.assert_in(fetch(SMALL, IN_PROCESS, source)[1].memory)
        assert inquire(source, 5).declined == {"draft": "w is sparse"}
        server.withdraw("target")
        with pytest.raises(SourcesExhausted, match="does not hold target weights: it holds no weights yet"):
            fetch(SMALL, IN_PROCESS, source)


def test_the_end_of_an_earlier_model_does_not_end_the_declining_of_its_role() -> None:
    with serving(SMALL, IN_PROCESS) as (server, source):
        server.decline("target", "loading set table")
        server.withdraw("target", weakref.ref(SMALL.store().memory))
        assert inquire(source, 5).declined == {"target": "loading set table"}


def test_control_characters_of_a_reason_to_decline_reach_no_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG), WeightServer("127.0.0.1", 0, Settings(IN_PROCESS, SHORT)) as server:
        server.decline("target", CONTROL)
        with pytest.raises(SourcesExhausted) as error:
            fetch(SMALL, IN_PROCESS, Endpoint("127.0.0.1", server.port))
        wait_until(lambda: not server.state().connections)
    expected = "this instance cannot serve its target weights: no?[2J??memory??for ?it"
    assert logged(caplog, "refused ").endswith(expected)
    assert logged(caplog, "could not load from ").endswith(expected)
    assert error.value.reasons[0].endswith(expected)
    assert all(record.getMessage().isprintable() for record in caplog.records)


def test_a_reason_to_decline_without_end_is_told_in_short() -> None:
    with WeightServer("127.0.0.1", 0, Settings(IN_PROCESS, SHORT)) as server:
        server.decline("target", "w" * 100_000)
        with pytest.raises(SourcesExhausted, match="cannot serve its target weights: www") as error:
            fetch(SMALL, IN_PROCESS, Endpoint("127.0.0.1", server.port))
    assert len(reasons(error)) < 4096


def test_the_state_tells_who_takes_what_and_who_waits() -> None:
    with serving(SMALL, TCP, max_clients=1) as (server, source), contextlib.ExitStack() as opened:
        assert server.state() == IDLE
        taking, *waiting = (opened.enter_context(Intruder(source, f"127.0.0.{n}").greet()) for n in (4, 5, 6))
        assert server.state() == replace(IDLE, connections=3)
        assert not server.state().is_idle

        session = taking.accepted()
        data = opened.enter_context(Intruder(source, "127.0.0.4").greet().attach(session))
        data.say(Fetch(0, SMALL.manifest.nbytes)).read(SMALL.manifest.nbytes)
        for line in waiting:
            line.join().hear_kind(Wait)
        wait_until(lambda: server.state().sessions[0].delivered == SMALL.manifest.nbytes)
        state = server.state()
        assert (state.connections, state.turns, state.waiting, state.is_idle) == (4, 1, 2, False)
        (one,) = state.sessions
        assert (one.id, one.peer.host, one.role, one.generation) == (session, "127.0.0.4", "target", 1)

        opened.close()
        wait_until(lambda: server.state().is_idle)


def test_the_state_tells_why_what_is_not_served_is_not() -> None:
    with serving(SMALL, IN_PROCESS) as (server, _):
        server.publish(publication("draft", generation=3))
        assert server.state().served == {"target": 1, "draft": 3}
        server.decline("target", "w is sparse")
        server.suspend("it sleeps")
        assert (server.state().served, server.state().not_served) == (
            {},
            {"target": "w is sparse", "draft": "it sleeps"},
        )


def test_the_state_tells_who_else_has_the_weights() -> None:
    with serving(SMALL, TCP) as (server, source):
        _, fetched = fetch(SMALL, TCP, source)
        fetched.memory.close()
        wait_until(lambda: server.state().copies == 1)
        announce(source, fetched.session, 19001, 5, Access())
        wait_until(lambda: server.state().replicas == {"target": (":19001",)})
        assert server.state().copies == 0


def test_the_state_keeps_no_weights() -> None:
    with serving(SMALL, TCP) as (server, source):
        memory = weakref.ref((held := publication()).store.memory)
        server.publish(held)
        del held
        with Intruder(source).greet() as line:
            line.accepted()
            state = server.state()
            server.withdraw("target")
        wait_until(lambda: server.state().is_idle)
        gc.collect()
        assert len(state.sessions) == 1
        assert memory() is None


def test_weights_that_were_changed_before_their_digests_were_made_are_given_to_nobody() -> None:
    with serving(SMALL, TCP) as (server, source):
        store = SMALL.store(generation=2)
        changed = replace(store, digests=StoreDigests(store.memory.reader(), (), lambda: False))
        server.publish(Publication(IDENTITY, RankCoordinates(), changed))
        with pytest.raises(SourcesExhausted) as error:
            fetch(SMALL, TCP, source)
        assert "its weights are not as they were loaded" in reasons(error)
        assert inquire(source, 10).holdings[0].root == ""
