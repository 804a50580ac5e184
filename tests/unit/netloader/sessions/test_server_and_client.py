"""Conversations between real servers and clients over real sockets, with the in-memory transport moving the bytes."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import socket
import struct
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import chain, repeat

import msgspec
import pytest
import torch

from support.engines import StuckTransport
from support.sources import IDENTITY, SHORT, SMALL, Tensors, client_for, fetch, serving
from support.wait import wait_until
from vllm_ascend.model_loader.netloader import cli
from vllm_ascend.model_loader.netloader.client.inquiry import inquire
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import ConnectionLost, SourceRefused, SourcesExhausted, TransportError
from vllm_ascend.model_loader.netloader.instance import serving as process_serving
from vllm_ascend.model_loader.netloader.server.answers import Peer
from vllm_ascend.model_loader.netloader.server.listener import MAX_CONNECTIONS, STRANGERS_SHARE
from vllm_ascend.model_loader.netloader.server.publications import Publication
from vllm_ascend.model_loader.netloader.server.requests import Settings
from vllm_ascend.model_loader.netloader.server.server import WeightServer
from vllm_ascend.model_loader.netloader.transport.base import Reception, Timeouts
from vllm_ascend.model_loader.netloader.transport.delivery import Chunk
from vllm_ascend.model_loader.netloader.transport.digests import CHUNK_BYTES
from vllm_ascend.model_loader.netloader.transport.in_process import InProcessTransport
from vllm_ascend.model_loader.netloader.transport.registry import transports
from vllm_ascend.model_loader.netloader.transport.sender import Sender
from vllm_ascend.model_loader.netloader.transport.store import WeightStore
from vllm_ascend.model_loader.netloader.weights.arena import Arena
from vllm_ascend.model_loader.netloader.weights.identity import RankCoordinates
from vllm_ascend.model_loader.netloader.wire.conversation import frame
from vllm_ascend.model_loader.netloader.wire.messages import (
    REQUEST_LIMIT,
    AttributeValue,
    Hello,
    Join,
    Message,
    Offer,
    Refuse,
    Status,
    Welcome,
)
from vllm_ascend.model_loader.netloader.wire.pacing import Pacer

MEMORY = (InProcessTransport(),)
IMPATIENT = Timeouts(connect=0.3, stall=0.3)


def reasons(error: pytest.ExceptionInfo[SourcesExhausted]) -> str:
    return "\n".join(error.value.reasons)


def test_no_source_is_exhausted_at_once() -> None:
    with pytest.raises(SourcesExhausted, match="no SOURCE is configured"):
        fetch(SMALL, MEMORY)


def test_the_second_source_delivers_when_the_first_is_gone() -> None:
    with serving(SMALL, MEMORY) as (_, gone):
        pass
    with serving(SMALL, MEMORY) as (_, source):
        client, fetched = fetch(SMALL, MEMORY, gone, source)
    assert fetched.source == source
    assert [attempt.source for attempt in client.attempts] == [str(gone)]
    SMALL.assert_in(fetched.memory)


def test_the_second_source_delivers_when_the_first_fails_midway() -> None:
    tensors = Tensors.of_shapes((CHUNK_BYTES,))
    chunks_left = chain((True, True, False), repeat(True))

    def fail_once(_: Chunk, content: bytes) -> bytes:
        if not next(chunks_left):
            raise ConnectionLost("failing at the third chunk")
        return content

    with serving(tensors, MEMORY) as (_, first), serving(tensors, MEMORY) as (_, second):
        client, fetched = fetch(tensors, (InProcessTransport(fail_once),), first, second)
    tensors.assert_in(fetched.memory)
    assert fetched.source == second
    assert sum(client.received.values()) == tensors.manifest.nbytes


class UnusableTransport(InProcessTransport):
    traits = replace(InProcessTransport.traits, name="unusable")

    def receive(self, reception: Reception) -> object:  # type: ignore[override]
        raise TransportError("not between these machines")


def test_the_same_source_is_asked_with_the_next_transport() -> None:
    kinds = (UnusableTransport(), InProcessTransport())
    with serving(SMALL, kinds) as (_, source):
        client, fetched = fetch(SMALL, kinds, source)
    assert fetched.transport == "in_process"
    assert [(attempt.transport, attempt.reason) for attempt in client.attempts] == [
        ("unusable", "not between these machines")
    ]


def test_no_common_transport_is_a_refusal() -> None:
    with serving(SMALL, MEMORY) as (_, source), pytest.raises(SourcesExhausted, match="no common transport"):
        fetch(SMALL, (UnusableTransport(),), source)


def test_a_refusal_names_the_differing_fields_on_both_sides(caplog: pytest.LogCaptureFixture) -> None:
    theirs = msgspec.structs.replace(IDENTITY, dtype="float16", config_digest="other")
    with caplog.at_level(logging.WARNING), serving(SMALL, MEMORY, identity=theirs) as (_, source):
        with pytest.raises(SourcesExhausted) as error:
            fetch(SMALL, MEMORY, source)
    assert "dtype (here bfloat16, there float16)" in reasons(error)
    assert "config_digest (here c0ffee, there other)" in reasons(error)
    refusals = [record.getMessage() for record in caplog.records if record.getMessage().startswith("refused")]
    assert len(refusals) == 1
    assert "dtype (here float16, there bfloat16)" in refusals[0]


def test_another_rank_is_refused() -> None:
    place = RankCoordinates(tp_rank=1, tp_size=2)
    with serving(SMALL, MEMORY, coordinates=place) as (_, source), pytest.raises(SourcesExhausted) as error:
        fetch(SMALL, MEMORY, source)
    assert "tp_rank (here 0, there 1)" in reasons(error)
    assert "tp_size (here 1, there 2)" in reasons(error)


def test_differing_tensors_are_named() -> None:
    theirs = Tensors({**SMALL.by_name, "w1": torch.zeros(6), "surplus": torch.zeros(2)})
    with serving(theirs, MEMORY) as (_, source), pytest.raises(SourcesExhausted) as error:
        fetch(SMALL, MEMORY, source)
    assert "tensor w1 (here float32 [5]" in reasons(error)
    assert "tensor surplus (here none, there float32 [2]" in reasons(error)


def test_a_server_without_the_role_says_what_it_holds() -> None:
    draft = msgspec.structs.replace(IDENTITY, role="draft")
    with serving(SMALL, MEMORY, identity=draft) as (_, source):
        with pytest.raises(SourcesExhausted, match="does not hold target weights: it holds draft"):
            fetch(SMALL, MEMORY, source)


def test_a_transfer_of_weights_that_are_replaced_meanwhile_is_ended() -> None:
    class ReplacingTransport(InProcessTransport):
        def receive(self, reception: Reception):  # type: ignore[no-untyped-def]
            arena = super().receive(reception)
            server.publish(Publication(IDENTITY, RankCoordinates(), SMALL.store(generation=2)))
            return arena

    with (
        serving(SMALL, MEMORY) as (server, source),
        pytest.raises(SourcesExhausted, match="its weights were replaced by new ones"),
    ):
        fetch(SMALL, (ReplacingTransport(),), source)


def test_a_withdrawn_role_is_not_served_any_more() -> None:
    with serving(SMALL, MEMORY) as (server, source):
        current, other = SMALL.store(), SMALL.store()
        server.publish(Publication(IDENTITY, RankCoordinates(), current))
        server.withdraw("target", weakref.ref(other.memory))
        fetch(SMALL, MEMORY, source)
        server.withdraw("target", weakref.ref(current.memory))
        with pytest.raises(SourcesExhausted, match="holds no weights yet"):
            fetch(SMALL, MEMORY, source)


ATTRIBUTES: dict[str, AttributeValue] = {
    "has_own_embed_tokens": True,
    "layers.0.rank": -7,
    "ratio": 0.5,
    "window": None,
}


def publication(role: str = "target", generation: int = 2, **attributes: AttributeValue) -> Publication:
    store = replace(SMALL.store(generation), attributes=attributes)
    return Publication(msgspec.structs.replace(IDENTITY, role=role), RankCoordinates(), store)


def test_attributes_arrive_with_the_weights() -> None:
    with serving(SMALL, MEMORY) as (server, source):
        assert fetch(SMALL, MEMORY, source)[1].attributes == {}
        server.publish(publication(**ATTRIBUTES))
        _, fetched = fetch(SMALL, MEMORY, source)
    assert fetched.attributes == ATTRIBUTES
    SMALL.assert_in(fetched.memory)


def test_the_fingerprint_of_the_source_arrives_even_where_the_client_has_none() -> None:
    unknown = msgspec.structs.replace(IDENTITY, fingerprint="")
    with serving(SMALL, MEMORY) as (server, source):
        assert client_for(SMALL.request(unknown), MEMORY).fetch([source]).fingerprint == "f00d"
        server.publish(Publication(unknown, RankCoordinates(), SMALL.store(2)))
        assert fetch(SMALL, MEMORY, source)[1].fingerprint == ""


def test_attributes_are_those_of_the_role_that_is_asked_for() -> None:
    with serving(SMALL, MEMORY) as (server, source):
        server.publish(publication("draft", **ATTRIBUTES))
        assert fetch(SMALL, MEMORY, source)[1].attributes == {}
        draft = client_for(SMALL.request(msgspec.structs.replace(IDENTITY, role="draft")), MEMORY)
        assert draft.fetch([source]).attributes == ATTRIBUTES


class CountingTransport(InProcessTransport):
    """Knows how often a client began to receive."""

    def __init__(self) -> None:
        super().__init__()
        self.receptions = 0

    def receive(self, reception: Reception) -> Arena:
        self.receptions += 1
        return super().receive(reception)


def test_a_source_whose_attributes_do_not_fit_is_left_before_any_byte_moves() -> None:
    checked: list[Mapping[str, AttributeValue]] = []

    def check(attributes: Mapping[str, AttributeValue]) -> None:
        checked.append(attributes)
        if attributes:
            raise SourceRefused("the source sets 'cache', which is a method in this model")

    transport, moved = CountingTransport(), list[int]()
    with serving(SMALL, MEMORY) as (server, unfit), serving(SMALL, MEMORY) as (_, source):
        server.publish(publication(**ATTRIBUTES))
        client = client_for(SMALL.request(), (transport,), progress=moved.append, check_attributes=check)
        with pytest.raises(SourcesExhausted) as error:
            client.fetch([unfit])
        assert reasons(error) == f"{unfit} by in_process: the source sets 'cache', which is a method in this model"
        assert (transport.receptions, moved) == (0, [])
        assert client.phases.seconds.keys() == {"connect", "join"}

        fetched = client.fetch([unfit, source])
        assert (fetched.source, fetched.attributes) == (source, {})
        assert (transport.receptions, sum(moved)) == (1, SMALL.manifest.nbytes)
        SMALL.assert_in(fetched.memory)

        wait_until(lambda: not server.state().sessions)
        _, again = fetch(SMALL, MEMORY, unfit)
        assert again.attributes == ATTRIBUTES
    assert checked == [ATTRIBUTES, ATTRIBUTES, {}]
    assert [attempt.source for attempt in client.attempts] == [str(unfit)] * 2


def test_a_source_whose_attributes_do_not_fit_is_not_asked_by_another_transport() -> None:
    def check(attributes: Mapping[str, AttributeValue]) -> None:
        raise SourceRefused("not this")

    class Other(InProcessTransport):
        traits = replace(InProcessTransport.traits, name="other")

    kinds = (InProcessTransport(), Other())
    with serving(SMALL, kinds) as (_, source), pytest.raises(SourcesExhausted) as error:
        client_for(SMALL.request(), kinds, check_attributes=check).fetch([source])
    assert error.value.reasons == (f"{source} by in_process: not this",)


def test_a_declined_role_is_refused_with_the_reason() -> None:
    with WeightServer("127.0.0.1", 0, Settings(MEMORY, SHORT)) as server:
        server.decline("target", "w keeps its bytes in inner tensors")
        with pytest.raises(SourcesExhausted) as error:
            fetch(SMALL, MEMORY, Endpoint("127.0.0.1", server.port))
        assert reasons(error).endswith(
            ": it refused: this instance cannot serve its target weights: w keeps its bytes in inner tensors"
        )
        server.decline("target", "another reason")
        with pytest.raises(SourcesExhausted, match=r"cannot serve its target weights: another reason$"):
            fetch(SMALL, MEMORY, Endpoint("127.0.0.1", server.port))


def test_a_declined_role_is_no_longer_served() -> None:
    with serving(SMALL, MEMORY) as (server, source):
        first = publication()
        server.publish(first)
        server.decline("target", "loading set table")
        with pytest.raises(SourcesExhausted, match="cannot serve its target weights: loading set table"):
            fetch(SMALL, MEMORY, source)
        assert inquire(source, 5).holdings == ()
        assert not first.store.memory.servable


def test_a_source_that_declines_is_left_for_the_next() -> None:
    with serving(SMALL, MEMORY) as (server, declining), serving(SMALL, MEMORY) as (_, source):
        server.decline("target", "loading set table")
        client, fetched = fetch(SMALL, MEMORY, declining, source)
    assert fetched.source == source
    assert [attempt.source for attempt in client.attempts] == [str(declining)]


def test_a_transfer_of_weights_that_are_declined_meanwhile_is_ended() -> None:
    class DecliningTransport(InProcessTransport):
        def receive(self, reception: Reception) -> Arena:
            arena = super().receive(reception)
            server.decline("target", "loading set table")
            return arena

    with serving(SMALL, MEMORY) as (server, source), pytest.raises(SourcesExhausted) as error:
        fetch(SMALL, (DecliningTransport(),), source)
    assert "it ended the session: it does not serve these weights any more" in reasons(error)
    assert reasons(error).endswith("cannot serve its target weights: loading set table")


def test_another_role_than_the_declined_one_goes_on_being_served() -> None:
    draft = msgspec.structs.replace(IDENTITY, role="draft")
    with serving(SMALL, MEMORY) as (server, source):
        server.publish(publication("draft"))
        server.decline("draft", "loading set table")
        SMALL.assert_in(fetch(SMALL, MEMORY, source)[1].memory)
        with pytest.raises(SourcesExhausted, match="cannot serve its draft weights: loading set table"):
            client_for(SMALL.request(draft), MEMORY).fetch([source])
        unknown = msgspec.structs.replace(IDENTITY, role="adapter")
        with pytest.raises(SourcesExhausted, match=r"does not hold adapter weights: it holds target$"):
            client_for(SMALL.request(unknown), MEMORY).fetch([source])


def test_publishing_a_role_ends_its_declining_and_no_other() -> None:
    with WeightServer("127.0.0.1", 0, Settings(MEMORY, SHORT)) as server:
        source = Endpoint("127.0.0.1", server.port)
        server.decline("target", "loading set table")
        server.decline("draft", "w is sparse")
        server.publish(publication("target"))
        SMALL.assert_in(fetch(SMALL, MEMORY, source)[1].memory)
        assert inquire(source, 5).declined == {"draft": "w is sparse"}
        server.withdraw("target")
        with pytest.raises(SourcesExhausted, match="does not hold target weights: it holds no weights yet"):
            fetch(SMALL, MEMORY, source)


def test_suspended_weights_are_refused_with_the_reason_and_served_again_as_another_generation() -> None:
    with serving(SMALL, MEMORY) as (server, source):
        server.suspend("it sleeps")
        with pytest.raises(SourcesExhausted, match="cannot serve its target weights: it sleeps"):
            fetch(SMALL, MEMORY, source)
        server.resume()
        SMALL.assert_in(fetch(SMALL, MEMORY, source)[1].memory)
        assert inquire(source, 5).holdings[0].generation > 1


def test_what_is_published_while_others_are_suspended_replaces_them() -> None:
    newer = Tensors.of_shapes((16, 8), (5,), (33, 7), seed=1)
    with serving(SMALL, MEMORY) as (server, source):
        server.suspend("its weights are being replaced")
        server.publish(Publication(IDENTITY, RankCoordinates(), newer.store(server.next_generation("target"))))
        server.resume()
        newer.assert_in(fetch(SMALL, MEMORY, source)[1].memory)


def test_what_is_given_up_is_not_resumed() -> None:
    with serving(SMALL, MEMORY) as (server, source):
        server.suspend("it sleeps")
        server.give_up("its weights were dropped")
        server.resume()
        with pytest.raises(SourcesExhausted, match="its weights were dropped"):
            fetch(SMALL, MEMORY, source)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["tcp", "process_group"])
def test_when_serving_is_suspended_nothing_reads_the_weights_any_more(kind: str) -> None:
    """The client is in the middle, and does not take what it has asked for."""
    tensors = replace(Tensors.of_shapes((8 * CHUNK_BYTES // 4,)), served_on=torch.device("cpu"))
    begun, suspended = threading.Event(), threading.Event()

    def hold(moved: int) -> None:
        if moved > 0:
            begun.set()
            suspended.wait()

    with serving(tensors, transports([kind])) as (server, source):
        client = threading.Thread(target=_fetch_in_vain, args=(tensors, kind, source, hold), daemon=True)
        client.start()
        begun.wait()
        server.suspend("it sleeps")
        assert inquire(source, 5).sessions == 0
        suspended.set()
        client.join()


def _fetch_in_vain(tensors: Tensors, kind: str, source: Endpoint, progress: Callable[[int], None]) -> None:
    with pytest.raises(SourcesExhausted, match="it sleeps"):
        fetch(tensors, transports([kind]), source, progress=progress)


def test_what_cannot_be_suspended_is_served_as_before() -> None:
    stuck, timeouts = StuckTransport(), Timeouts(connect=5.0, stall=0.2)
    with serving(SMALL, (stuck,), timeouts=timeouts) as (server, source):
        join = Join(IDENTITY, RankCoordinates(), SMALL.manifest.digest, (Offer("in_process"),))
        with _connected(source, Hello(), join):
            wait_until(lambda: len(server.state().sessions) == 1)
            for change in (server.suspend, server.give_up):
                with pytest.raises(TimeoutError, match=r"what is served to 127\.0\.0\.1:\d+ is still being read"):
                    change("it sleeps")
            assert inquire(source, 5).declined == {}
            stuck.go.set()
        SMALL.assert_in(fetch(SMALL, (stuck,), source)[1].memory)


def test_a_session_that_comes_too_late_is_told_the_reason_for_that() -> None:
    class Overtaken(InProcessTransport):
        """Between the answer to Join and the session, something else happens."""

        def sender(self, store: WeightStore, timeouts: Timeouts, pacer: Pacer) -> Sender:
            meanwhile.pop()()
            return super().sender(store, timeouts, pacer)

    newer = Tensors.of_shapes((16, 8), (5,), (33, 7), seed=1)
    with serving(SMALL, (Overtaken(),)) as (server, source):
        meanwhile: list[Callable[[], object]] = [lambda: server.suspend("it sleeps")]
        with pytest.raises(SourcesExhausted) as error:
            fetch(SMALL, MEMORY, source)
        (reason,) = error.value.reasons
        assert reason.endswith("it refused: this instance cannot serve its target weights: it sleeps")
        server.resume()
        store = newer.store(server.next_generation("target"))
        meanwhile += [lambda: None, lambda: server.publish(Publication(IDENTITY, RankCoordinates(), store))]
        client, fetched = fetch(SMALL, MEMORY, source)
        newer.assert_in(fetched.memory)
        assert client.attempts == []


def test_where_one_listener_cannot_be_suspended_none_is(monkeypatch: pytest.MonkeyPatch) -> None:
    stuck, timeouts = StuckTransport(), Timeouts(connect=5.0, stall=0.2)
    with serving(SMALL, MEMORY) as (first, source), serving(SMALL, (stuck,), timeouts=timeouts) as (second, other):
        engine = threading.Event()  # stands for one
        listeners = [process_serving._Service(weakref.ref(engine), (None, each.port), each) for each in (first, second)]
        monkeypatch.setattr(process_serving, "_services", listeners)
        join = Join(IDENTITY, RankCoordinates(), SMALL.manifest.digest, (Offer("in_process"),))
        with _connected(other, Hello(), join):
            wait_until(lambda: len(second.state().sessions) == 1)
            for change in (process_serving.suspend, process_serving.give_up):
                with pytest.raises(TimeoutError):
                    change(engine, "it sleeps")
            SMALL.assert_in(fetch(SMALL, MEMORY, source)[1].memory)
            stuck.go.set()
        wait_until(lambda: not first.state().sessions and not second.state().sessions)
        resume = process_serving.suspend(engine, "it sleeps")
        with pytest.raises(SourcesExhausted, match="it sleeps"):
            fetch(SMALL, MEMORY, source)
        resume()
        SMALL.assert_in(fetch(SMALL, MEMORY, source)[1].memory)


def test_undoing_a_suspension_leaves_what_was_suspended_before() -> None:
    with serving(SMALL, MEMORY) as (server, source):
        server.suspend("its weights are half replaced")
        server.publish(publication("draft"))
        assert server.suspend("it sleeps") == {"draft"}
        server.resume({"draft"})
        with pytest.raises(SourcesExhausted, match="half replaced"):
            fetch(SMALL, MEMORY, source)
        assert [holding.role for holding in inquire(source, 5).holdings] == ["draft"]


def test_the_end_of_an_earlier_model_does_not_end_the_declining_of_its_role() -> None:
    with serving(SMALL, MEMORY) as (server, source):
        server.decline("target", "loading set table")
        server.withdraw("target", weakref.ref(SMALL.store().memory))
        assert inquire(source, 5).declined == {"target": "loading set table"}


CONTROL = "no\x1b[2J\r\nmemory\x00\u2028for \u202eit"


def logged(caplog: pytest.LogCaptureFixture, beginning: str) -> str:
    (line,) = (record.getMessage() for record in caplog.records if record.getMessage().startswith(beginning))
    return line


def test_control_characters_of_a_reason_to_decline_reach_no_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG), WeightServer("127.0.0.1", 0, Settings(MEMORY, SHORT)) as server:
        server.decline("target", CONTROL)
        with pytest.raises(SourcesExhausted) as error:
            fetch(SMALL, MEMORY, Endpoint("127.0.0.1", server.port))
        wait_until(lambda: not server.state().connections)
    expected = "this instance cannot serve its target weights: no?[2J??memory??for ?it"
    assert logged(caplog, "refused ").endswith(expected)
    assert logged(caplog, "could not load from ").endswith(expected)
    assert error.value.reasons[0].endswith(expected)
    assert all(record.getMessage().isprintable() for record in caplog.records)


def test_a_reason_to_decline_without_end_is_told_in_short() -> None:
    with WeightServer("127.0.0.1", 0, Settings(MEMORY, SHORT)) as server:
        server.decline("target", "w" * 100_000)
        with pytest.raises(SourcesExhausted, match="cannot serve its target weights: www") as error:
            fetch(SMALL, MEMORY, Endpoint("127.0.0.1", server.port))
    assert len(reasons(error)) < 4096


def test_control_characters_of_a_refusal_reach_no_log_of_the_client(caplog: pytest.LogCaptureFixture) -> None:
    with saying(Welcome(), Refuse(CONTROL)) as stranger, pytest.raises(SourcesExhausted) as error:
        fetch(SMALL, MEMORY, stranger)
    assert logged(caplog, "could not load from ").isprintable()
    assert reasons(error).endswith("it refused: no?[2J??memory??for ?it")


def test_a_server_that_is_configured_anew_serves_by_the_new_transports() -> None:
    class Other(InProcessTransport):
        traits = replace(InProcessTransport.traits, name="other")

    with serving(SMALL, MEMORY) as (server, source):
        server.configure(Settings((Other(),), SHORT))
        assert inquire(source, 5).transports == ("other",)
        with pytest.raises(SourcesExhausted, match="no common transport: this server has other"):
            fetch(SMALL, MEMORY, source)
        assert fetch(SMALL, (InProcessTransport(), Other()), source)[1].transport == "other"


def test_generations_grow_by_role() -> None:
    server = WeightServer("127.0.0.1", 0, Settings(MEMORY, SHORT))
    assert [server.next_generation(role) for role in ("target", "target", "draft")] == [1, 2, 1]


@contextlib.contextmanager
def saying(*messages: Message) -> Iterator[Endpoint]:
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


def test_a_source_that_accepts_and_stays_silent_is_left_after_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, serving(SMALL, MEMORY) as (_, source):
        mute = Endpoint("127.0.0.1", silent.getsockname()[1])
        client, fetched = fetch(SMALL, MEMORY, mute, source, timeouts=replace(SHORT, connect=0.5))
    assert fetched.source == source
    assert "it did not greet: the peer was silent" in client.attempts[0].reason


@pytest.mark.parametrize(
    "answer",
    [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x00\x00\x00\x02\xff\xff", frame(Hello()), os.urandom(64)],
    ids=["closes", "another protocol", "no message", "wrong message", "noise"],
)
def test_a_source_that_does_not_speak_the_protocol_is_left(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, serving(SMALL, MEMORY) as (_, source):

        def reply() -> None:
            with listener.accept()[0] as connection:
                connection.recv(64)
                connection.sendall(answer)

        thread = threading.Thread(target=reply)
        thread.start()
        stranger = Endpoint("127.0.0.1", listener.getsockname()[1])
        client, fetched = fetch(SMALL, MEMORY, stranger, source)
        thread.join()
    assert fetched.source == source
    assert len(client.attempts) == 1


@pytest.mark.parametrize("host", ["host.invalid", "a..b", "x" * 70])
def test_an_unknown_host_is_left(host: str) -> None:
    client = client_for(SMALL.request(), MEMORY)
    with pytest.raises(SourcesExhausted, match="no connection"):
        client.fetch([Endpoint(host, 19000)])


def test_ipv6_and_dual_stack() -> None:
    with serving(SMALL, MEMORY, host="::1") as (_, source):
        assert fetch(SMALL, MEMORY, source)[1].source.host == "::1"
    with WeightServer(None, 0, Settings(transports(["process_group"]), SHORT)) as server:
        server.publish(Publication(IDENTITY, RankCoordinates(), SMALL.store()))
        for host in ("127.0.0.1", "::1", "localhost"):
            _, fetched = fetch(SMALL, transports(["process_group"]), Endpoint(host, server.port))
            SMALL.assert_in(fetched.memory)


def test_a_port_in_use_is_an_error_at_start() -> None:
    with serving(SMALL, MEMORY) as (_, source), pytest.raises(OSError, match="is bound by another socket"):
        WeightServer("127.0.0.1", source.port, Settings(MEMORY, SHORT)).start()


def test_closing_twice_and_without_starting_is_harmless() -> None:
    server = WeightServer("127.0.0.1", 0, Settings(MEMORY, SHORT))
    server.close()
    server.start()
    server.close()
    server.close()


# What peers do wrong. After each, the server must serve the next client as if nothing had been.


def _connected(source: Endpoint, *messages: Message) -> socket.socket:
    connection = socket.create_connection(source, timeout=5)
    for message in messages:
        connection.sendall(frame(message))
    return connection


def silent(source: Endpoint) -> Iterator[socket.socket]:
    yield _connected(source)


def silent_after_hello(source: Endpoint) -> Iterator[socket.socket]:
    yield _connected(source, Hello())


def silent_in_the_middle_of_a_frame(source: Endpoint) -> Iterator[socket.socket]:
    connection = _connected(source, Hello())
    connection.sendall(b"\x00\x00\x10\x00half a frame")
    yield connection


def one_byte_at_a_time(source: Endpoint) -> Iterator[socket.socket]:
    connection = _connected(source)
    for byte in frame(Hello()):
        connection.sendall(bytes([byte]))
    yield connection


def announces_too_much(source: Endpoint) -> Iterator[socket.socket]:
    connection = _connected(source)
    connection.sendall((REQUEST_LIMIT + 1).to_bytes(4, "big"))
    yield connection


def not_utf8(source: Endpoint) -> Iterator[socket.socket]:
    connection = _connected(source, Hello())
    connection.sendall(b"\x00\x00\x00\x08\x81\xa4type\xa1\xff")
    yield connection


def noise(source: Endpoint) -> Iterator[socket.socket]:
    generator = random.Random(0)
    for _ in range(50):
        connection = _connected(source)
        connection.sendall(generator.randbytes(generator.randrange(200)))
        yield connection


def resets(source: Endpoint) -> Iterator[socket.socket]:
    for messages in ((), (Hello(),)):
        connection = _connected(source, *messages)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
        yield connection


def joins_and_vanishes(source: Endpoint) -> Iterator[socket.socket]:
    join = Join(IDENTITY, RankCoordinates(), SMALL.manifest.digest, (Offer("in_process"),))
    yield _connected(source, Hello(), join)


def many_at_once(source: Endpoint) -> Iterator[socket.socket]:
    for _ in range(MAX_CONNECTIONS // STRANGERS_SHARE - 8):
        yield _connected(source)


WRONG = [
    silent,
    silent_after_hello,
    silent_in_the_middle_of_a_frame,
    one_byte_at_a_time,
    announces_too_much,
    not_utf8,
    noise,
    resets,
    joins_and_vanishes,
    many_at_once,
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
def test_a_bad_peer_ends_only_its_own_session(wrong: Callable[[Endpoint], Iterator[socket.socket]]) -> None:
    with serving(SMALL, MEMORY) as (server, source):
        connections = list(wrong(source))
        _, fetched = fetch(SMALL, MEMORY, source)
        SMALL.assert_in(fetched.memory)
        for connection in connections:
            connection.close()
        wait_until(lambda: not server.state().connections)


def test_silent_peers_are_dropped_after_the_deadline() -> None:
    with serving(SMALL, MEMORY, timeouts=IMPATIENT) as (server, source):
        join = Join(IDENTITY, RankCoordinates(), SMALL.manifest.digest, (Offer("in_process"),))
        connections = [_connected(source), _connected(source, Hello()), _connected(source, Hello(), join)]
        wait_until(lambda: not server.state().connections and not server.state().sessions)
        for connection in connections:
            connection.close()


def test_status_tells_what_is_held(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(SMALL, MEMORY) as (_, source):
        (holding,) = inquire(source, 5).holdings
        assert cli.main(["status", str(source)]) == 0
        assert cli.main(["status", "--json", str(source)]) == 0
    assert (holding.role, holding.tensors, holding.nbytes) == ("target", 3, SMALL.manifest.nbytes)
    output = capsys.readouterr().out
    assert "org/model" in output
    assert '"generation":1' in output
    assert "holds no weights" not in output
    assert "cannot be served" not in output


def test_status_tells_what_is_declined_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(SMALL, MEMORY) as (server, source):
        assert inquire(source, 5).declined == {}
        server.decline("draft", "loading set table,\nwhich cannot be told")
        status = inquire(source, 5)
        assert cli.main(["status", str(source)]) == 0
        assert cli.main(["status", "--json", str(source)]) == 0
    assert status.declined == {"draft": "loading set table,\nwhich cannot be told"}
    assert [holding.role for holding in status.holdings] == ["target"]
    output = capsys.readouterr().out
    assert "\n  draft: cannot be served: loading set table,?which cannot be told\n" in output
    assert "\n  target\n" in output
    assert '"declined":{"draft":"loading set table,\\nwhich cannot be told"}' in output


def test_status_of_a_source_that_declines_all_it_has_does_not_say_that_it_has_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with WeightServer("127.0.0.1", 0, Settings(MEMORY, SHORT)) as server:
        source = Endpoint("127.0.0.1", server.port)
        assert cli.main(["status", str(source)]) == 0
        nothing = capsys.readouterr().out
        server.decline("target", "w is sparse")
        assert cli.main(["status", str(source)]) == 0
        declined = capsys.readouterr().out
    head = f"{source}: 0 sessions now, transports in_process\n"
    assert nothing == head + "  holds no weights\n"
    assert declined == head + "  target: cannot be served: w is sparse\n"


def test_status_shows_no_control_characters_of_a_reason(capsys: pytest.CaptureFixture[str]) -> None:
    with saying(Welcome(), Status((), 0, ("in_process",), {"target": CONTROL})) as stranger:
        assert cli.main(["status", str(stranger)]) == 0
    assert all(line.isprintable() for line in capsys.readouterr().out.splitlines())


@pytest.mark.parametrize(
    "status", [Status((), 0, ("in_process",), {CONTROL: "w is sparse"}), Status((), 0, (CONTROL,))]
)
def test_status_shows_no_control_characters_of_names(status: Status, capsys: pytest.CaptureFixture[str]) -> None:
    with saying(Welcome(), status) as stranger:
        assert cli.main(["status", str(stranger)]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_status_of_a_dead_source_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(SMALL, MEMORY) as (_, source):
        pass
    assert cli.main(["status", str(source)]) == 1
    assert f"{source}: no connection" in capsys.readouterr().err


def test_a_client_is_referred_to_the_rank_that_holds_its_part(caplog: pytest.LogCaptureFixture) -> None:
    first, second = (RankCoordinates(tp_rank=rank, tp_size=2) for rank in (0, 1))
    with (
        serving(SMALL, MEMORY, coordinates=first) as (server, source),
        serving(SMALL, MEMORY, coordinates=second) as (
            _,
            other,
        ),
    ):
        server.refer_to([Peer(first, "", source.port), Peer(second, "", other.port)])
        client = client_for(SMALL.request(coordinates=second), MEMORY)
        assert client.fetch([source]).source == other
        assert client.attempts == []


def test_a_referral_is_followed_only_once() -> None:
    first, second = (RankCoordinates(tp_rank=rank, tp_size=2) for rank in (0, 1))
    with (
        serving(SMALL, MEMORY, coordinates=first) as (one, source),
        serving(SMALL, MEMORY, coordinates=first) as (
            two,
            other,
        ),
    ):
        one.refer_to([Peer(second, "127.0.0.1", other.port), Peer(second, "not a host", 1)])
        two.refer_to([Peer(second, "", source.port), Peer(second, "", 9)])
        client = client_for(SMALL.request(coordinates=second), MEMORY)
        with pytest.raises(SourcesExhausted, match=f"{other}: it refused: another rank"):
            client.fetch([source])
    assert len(client.attempts) == 1
