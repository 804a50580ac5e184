"""What becomes of a turn that comes while a client does something else: real sessions with real servers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import repeat

import pytest

from support.sources import SMALL, serving
from support.wait import wait_until
from vllm_ascend.model_loader.netloader.client.inquiry import inquire
from vllm_ascend.model_loader.netloader.client.intake import Intake
from vllm_ascend.model_loader.netloader.client.options import FetchOptions
from vllm_ascend.model_loader.netloader.client.order import AwaitTurn, Candidate, Contents, Pause, SourceOrder
from vllm_ascend.model_loader.netloader.client.places import Places
from vllm_ascend.model_loader.netloader.client.session import ClientSession
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.report import Phases
from vllm_ascend.model_loader.netloader.transport.base import Timeouts
from vllm_ascend.model_loader.netloader.transport.in_process import InProcessTransport
from vllm_ascend.model_loader.netloader.wire.messages import Wait

PATIENT = Timeouts(connect=60.0, stall=60.0)
KIND = (InProcessTransport(),)
OPTIONS = FetchOptions(SMALL.request(), PATIENT)

pytestmark = pytest.mark.timeout(60)


class Queue:
    """A client with a place at `busy`, whose only turn is taken until `free_turn`, and another source that has one."""

    def __init__(self, busy: Endpoint, other: Endpoint, opened: contextlib.ExitStack) -> None:
        self.busy = busy
        self.order = SourceOrder([busy, other], [KIND[0].name], repeat(1.0))
        self.places = opened.enter_context(Places(self.order))
        self._intake = opened.enter_context(Intake(OPTIONS, Phases()))
        self._opened = opened

        self._taken = self.session(Candidate(busy))
        assert self._taken.ask() is None
        self.order.next()
        self.queued = self.session(Candidate(busy))
        self.wait = self._told(self.queued)
        self.order.next()

    def session(self, candidate: Candidate) -> ClientSession:
        session = ClientSession(
            OPTIONS, candidate, transports=KIND, intake=self._intake, may_leave=lambda: True, phases=Phases()
        )
        return self._opened.enter_context(contextlib.closing(session))

    def free_turn(self) -> None:
        self._taken.close()

    def _told(self, session: ClientSession) -> Wait:
        wait = session.ask()
        assert wait is not None
        return wait


@pytest.fixture
def other() -> Iterator[Endpoint]:
    with serving(SMALL, KIND, timeouts=PATIENT) as (_, source):
        yield source


@pytest.fixture
def queue(other: Endpoint) -> Iterator[Queue]:
    with serving(SMALL, KIND, timeouts=PATIENT, max_clients=1) as (_, busy), contextlib.ExitStack() as opened:
        yield Queue(busy, other, opened)


def test_a_place_counts_until_its_turn_is_taken(queue: Queue) -> None:
    assert queue.places.keep(queue.queued, queue.wait)
    assert queue.places.take_turn() is None
    queue.free_turn()
    queue.places.wait(60.0)
    assert isinstance(queue.order.next(), AwaitTurn), "nobody may give up now"
    turn = queue.places.take_turn()
    assert turn is not None
    assert (turn.session, turn.failure) == (queue.queued, None)
    assert queue.order.next() is None
    SMALL.assert_in(turn.session.take().memory)


def test_a_session_that_was_broken_off_is_not_queued(queue: Queue) -> None:
    queue.queued.break_off()
    assert not queue.places.keep(queue.queued, queue.wait)
    assert queue.order.next() == Pause(1.0), "it is asked again"


def test_while_a_configured_source_delivers_a_turn_elsewhere_is_given_back(queue: Queue, other: Endpoint) -> None:
    assert queue.places.keep(queue.queued, queue.wait)
    delivering = queue.session(Candidate(other))
    with queue.places.attending(delivering):
        assert delivering.ask() is None
        queue.free_turn()
        wait_until(lambda: isinstance(queue.order.next(), Pause))
        SMALL.assert_in(delivering.take().memory)
    assert not delivering.broken_off
    assert queue.places.take_turn() is None


@pytest.mark.parametrize("delivers", [True, False], ids=["while a replica delivers", "while a source is only asked"])
def test_a_turn_at_a_source_ends_what_is_worth_less(queue: Queue, other: Endpoint, delivers: bool) -> None:
    assert queue.places.keep(queue.queued, queue.wait)
    attended = queue.session(Candidate(other, queue.busy, Contents("c0ffee", "f00d")) if delivers else Candidate(other))
    with queue.places.attending(attended):
        if delivers:
            assert attended.ask() is None
        queue.free_turn()
        queue.places.wait(60.0)
        assert attended.broken_off
    turn = queue.places.take_turn()
    assert turn is not None
    assert turn.session is queue.queued


def test_what_fails_while_it_waits_is_told_whatever_the_client_attends_to(queue: Queue, other: Endpoint) -> None:
    assert queue.places.keep(queue.queued, queue.wait)
    attended = queue.session(Candidate(other))
    with queue.places.attending(attended):
        assert attended.ask() is None
        queue.queued.shut_down()
        queue.places.wait(60.0)
    turn = queue.places.take_turn()
    assert turn is not None
    assert turn.failure is not None
    assert not attended.broken_off


def test_places_that_are_given_up_leave_the_queue(queue: Queue) -> None:
    assert queue.places.keep(queue.queued, queue.wait)
    assert inquire(queue.busy, 60.0).waiting == 1
    assert queue.places.give_up() == [queue.queued]
    assert queue.queued.broken_off, "the listening thread ends at once"
    wait_until(lambda: not inquire(queue.busy, 60.0).waiting)
    queue.free_turn()
    assert queue.places.take_turn() is None
