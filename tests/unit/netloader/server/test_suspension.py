"""Serving is suspended while weights move or change: nothing reads them meanwhile, and clients are told why."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from support.engines import StuckTransport
from support.peers.strangers import Intruder
from support.sources import (
    IDENTITY,
    IN_PROCESS,
    SMALL,
    Tensors,
    fetch,
    publication,
    serving,
)
from support.wait import wait_until
from vllm_ascend.model_loader.netloader.client.inquiry import inquire
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import SourcesExhausted
from vllm_ascend.model_loader.netloader.server.publications import Publication
from vllm_ascend.model_loader.netloader.transport.base import Timeouts
from vllm_ascend.model_loader.netloader.transport.digests import CHUNK_BYTES
from vllm_ascend.model_loader.netloader.transport.in_process import InProcessTransport
from vllm_ascend.model_loader.netloader.transport.registry import transports
from vllm_ascend.model_loader.netloader.transport.sender import Sender
from vllm_ascend.model_loader.netloader.transport.store import WeightStore
from vllm_ascend.model_loader.netloader.weights.identity import RankCoordinates
from vllm_ascend.model_loader.netloader.wire.messages import Join
from vllm_ascend.model_loader.netloader.wire.pacing import Pacer


def test_suspended_weights_are_refused_with_the_reason_and_served_again_as_another_generation() -> None:
    with serving(SMALL, IN_PROCESS) as (server, source):
        server.suspend("it sleeps")
        with pytest.raises(SourcesExhausted, match="cannot serve its target weights: it sleeps"):
            fetch(SMALL, IN_PROCESS, source)
        server.resume()
        SMALL.assert_in(fetch(SMALL, IN_PROCESS, source)[1].memory)
        assert inquire(source, 5).holdings[0].generation > 1


def test_what_is_published_while_others_are_suspended_replaces_them() -> None:
    newer = Tensors.of_shapes((16, 8), (5,), (33, 7), seed=1)
    with serving(SMALL, IN_PROCESS) as (server, source):
        server.suspend("its weights are being replaced")
        server.publish(Publication(IDENTITY, RankCoordinates(), newer.store(server.next_generation("target"))))
        server.resume()
        newer.assert_in(fetch(SMALL, IN_PROCESS, source)[1].memory)


def test_what_is_given_up_is_not_resumed() -> None:
    with serving(SMALL, IN_PROCESS) as (server, source):
        server.suspend("it sleeps")
        server.give_up("its weights were dropped")
        server.resume()
        with pytest.raises(SourcesExhausted, match="its weights were dropped"):
            fetch(SMALL, IN_PROCESS, source)


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
        with Intruder(source, "127.0.0.1").greet().join("in_process"):
            wait_until(lambda: len(server.state().sessions) == 1)
            for change in (server.suspend, server.give_up):
                with pytest.raises(TimeoutError, match=r"what is served to 127\.0\.0\.1:\d+ is still being read"):
                    change("it sleeps")
            assert inquire(source, 5).declined == {}
            stuck.go.set()
        SMALL.assert_in(fetch(SMALL, (stuck,), source)[1].memory)


def test_what_was_suspended_before_stays_so_when_more_cannot_be_suspended() -> None:
    stuck, timeouts = StuckTransport(), Timeouts(connect=5.0, stall=0.2)
    draft = publication("draft")
    with serving(SMALL, (stuck,), timeouts=timeouts) as (server, source):
        server.suspend("its weights are half replaced")
        server.publish(draft)
        with Intruder(source).greet() as line:
            line.say(Join(draft.identity, draft.coordinates, SMALL.manifest.digest, (stuck.offer(),)))
            wait_until(lambda: len(server.state().sessions) == 1)
            with pytest.raises(TimeoutError):
                server.suspend("it sleeps")
            assert list(server.state().served) == ["draft"]
            assert server.state().not_served == {"target": "its weights are half replaced"}
            stuck.go.set()


def test_digests_are_made_only_while_the_weights_stay_as_they_are() -> None:
    with serving(SMALL, IN_PROCESS) as (server, _):
        held = publication()
        digests = held.store.digests
        assert digests is not None
        server.publish(held)
        server.suspend("it sleeps")
        assert digests.stopped
        assert not digests.complete
        server.resume()
        wait_until(lambda: digests.complete)
        assert not digests.stopped


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
            fetch(SMALL, IN_PROCESS, source)
        (reason,) = error.value.reasons
        assert reason.endswith("it refused: this instance cannot serve its target weights: it sleeps")
        server.resume()
        store = newer.store(server.next_generation("target"))
        meanwhile += [lambda: None, lambda: server.publish(Publication(IDENTITY, RankCoordinates(), store))]
        client, fetched = fetch(SMALL, IN_PROCESS, source)
        newer.assert_in(fetched.memory)
        assert client.attempts == []


def test_undoing_a_suspension_leaves_what_was_suspended_before() -> None:
    with serving(SMALL, IN_PROCESS) as (server, source):
        server.suspend("its weights are half replaced")
        server.publish(publication("draft"))
        assert server.suspend("it sleeps") == {"draft"}
        server.resume({"draft"})
        with pytest.raises(SourcesExhausted, match="half replaced"):
            fetch(SMALL, IN_PROCESS, source)
        assert [holding.role for holding in inquire(source, 5).holdings] == ["draft"]
