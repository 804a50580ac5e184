"""Every change of state of a role, without a server."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace

import msgspec
import pytest

from support.sources import IDENTITY, SMALL
from vllm_ascend.model_loader.netloader.server.publications import Publication, Publications
from vllm_ascend.model_loader.netloader.transport.store import WeightStore
from vllm_ascend.model_loader.netloader.weights.identity import RankCoordinates


@pytest.fixture
def store() -> Iterator[WeightStore]:
    store = SMALL.store()
    yield store
    store.close()


@pytest.fixture
def target(store: WeightStore) -> Publication:
    return Publication(IDENTITY, RankCoordinates(), store)


@pytest.fixture
def draft(target: Publication) -> Publication:
    return replace(target, identity=msgspec.structs.replace(IDENTITY, role="draft"))


def test_at_first_there_is_nothing() -> None:
    publications = Publications()
    assert publications.served("target") is None
    assert (publications.all_served(), publications.reasons()) == ((), {})


def test_what_is_published_is_served_in_its_role(target: Publication, draft: Publication) -> None:
    publications = Publications()
    assert publications.publish(target) is None
    assert publications.publish(draft) is None
    assert (publications.served("target"), publications.served("draft")) == (target, draft)
    assert publications.all_served() == (target, draft)


def test_whoever_publishes_gets_what_is_replaced(target: Publication) -> None:
    publications, newer = Publications(), replace(target)
    publications.publish(target)
    assert publications.publish(newer) is target
    assert publications.served("target") is newer


def test_what_is_published_replaces_what_was_suspended(target: Publication) -> None:
    publications, newer = Publications(), replace(target)
    publications.publish(target)
    publications.suspend("it sleeps")
    assert publications.publish(newer) is target
    assert publications.resume() == ()
    assert publications.served("target") is newer
    assert publications.reasons() == {}


def test_a_role_is_declined_with_the_latest_reason(target: Publication) -> None:
    publications = Publications()
    publications.publish(target)
    assert publications.decline("target", "w is sparse") is target
    assert publications.decline("target", "loading set table") is None
    assert publications.served("target") is None
    assert publications.reasons() == {"target": "loading set table"}


def test_publishing_ends_declining_for_its_role_alone(target: Publication) -> None:
    publications = Publications()
    publications.decline("target", "w is sparse")
    publications.decline("draft", "loading set table")
    assert publications.publish(target) is None
    assert publications.reasons() == {"draft": "loading set table"}


def test_what_is_suspended_is_kept_with_the_reason(target: Publication, draft: Publication) -> None:
    publications = Publications()
    publications.publish(target)
    assert publications.suspend("it sleeps") == (target,)
    publications.publish(draft)
    assert publications.suspend("it is replaced") == (draft,)
    assert publications.all_served() == ()
    assert publications.reasons() == {"target": "it sleeps", "draft": "it is replaced"}


def test_what_is_resumed_is_the_same_as_another_generation(target: Publication) -> None:
    publications = Publications()
    publications.publish(target)
    publications.suspend("it sleeps")
    (resumed,) = publications.resume()
    assert publications.served("target") is resumed
    assert resumed.store.generation == 2
    assert resumed.store.memory is target.store.memory
    assert publications.reasons() == {}
    assert publications.resume() == ()


def test_roles_are_resumed_that_are_asked_for(target: Publication, draft: Publication) -> None:
    publications = Publications()
    publications.publish(target)
    publications.publish(draft)
    publications.suspend("it sleeps")
    assert [resumed.role for resumed in publications.resume({"draft", "unknown"})] == ["draft"]
    assert publications.reasons() == {"target": "it sleeps"}


def test_what_is_given_up_is_declined_and_never_resumed(target: Publication, draft: Publication) -> None:
    publications = Publications()
    publications.publish(target)
    publications.suspend("it sleeps")
    publications.publish(draft)
    assert publications.give_up("its weights were dropped") == (target,)
    assert publications.resume() == ()
    assert publications.reasons() == {"target": "its weights were dropped"}
    assert publications.all_served() == (draft,)


def test_what_is_withdrawn_leaves_nothing_behind(target: Publication) -> None:
    publications = Publications()
    publications.publish(target)
    assert publications.withdraw("target") is target
    assert publications.withdraw("target") is None
    assert (publications.served("target"), publications.reasons()) == (None, {})


def test_what_is_withdrawn_while_it_is_suspended_leaves_its_reason_behind(target: Publication) -> None:
    publications = Publications()
    publications.publish(target)
    publications.suspend("it sleeps")
    assert publications.withdraw("target") is target
    assert publications.resume() == ()
    assert publications.reasons() == {"target": "it sleeps"}


def test_withdrawing_does_not_end_declining() -> None:
    publications = Publications()
    publications.decline("target", "w is sparse")
    assert publications.withdraw("target") is None
    assert publications.reasons() == {"target": "w is sparse"}


def test_only_the_memory_that_is_meant_is_withdrawn(target: Publication) -> None:
    """A model that dies late must not end what has replaced it."""
    publications, other = Publications(), SMALL.store()
    publications.publish(target)
    assert publications.withdraw("target", weakref.ref(other.memory)) is None
    gone = weakref.ref(other.memory)
    other.close()
    del other
    assert publications.withdraw("target", gone) is None
    assert publications.withdraw("target", weakref.ref(target.store.memory)) is target


def test_everything_is_withdrawn_at_the_end(target: Publication, draft: Publication) -> None:
    publications = Publications()
    publications.publish(target)
    publications.suspend("it sleeps")
    publications.publish(draft)
    publications.decline("adapter", "w is sparse")
    assert publications.clear() == (target, draft)
    assert publications.clear() == ()


def test_generations_grow_by_role_and_from_what_was_published(target: Publication) -> None:
    publications = Publications()
    assert [publications.next_generation(role) for role in ("target", "target", "draft")] == [1, 2, 1]
    publications.publish(replace(target, store=replace(target.store, generation=7)))
    assert publications.next_generation("target") == 8
    publications.withdraw("target")
    assert publications.next_generation("target") == 9


CHANGES: dict[str, Callable[[Publications], object]] = {
    "suspend": lambda publications: publications.suspend("it sleeps"),
    "resume": lambda publications: publications.resume(),
    "give up": lambda publications: publications.give_up("its weights were dropped"),
    "withdraw": lambda publications: publications.withdraw("target"),
    "look": lambda publications: publications.reasons(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_finalizer_may_withdraw_in_a_thread_that_holds_the_lock(
    change: Callable[[Publications], object], target: Publication
) -> None:
    lock = threading.RLock()
    publications = Publications(lock)
    publications.publish(target)
    with lock:
        change(publications)
        publications.withdraw("target")
    assert publications.all_served() == ()
