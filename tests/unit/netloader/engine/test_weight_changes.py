"""A worker whose weights are served from where they are tells Netloader before it touches them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from support.engines import TRANSPORTS, Engine, StuckTransport, close_listeners, identity
from support.peers.strangers import Intruder
from support.sources import SMALL, fetch
from support.wait import wait_until
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.engine.weight_changes import watch
from vllm_ascend.model_loader.netloader.errors import SourcesExhausted
from vllm_ascend.model_loader.netloader.instance import serving
from vllm_ascend.model_loader.netloader.server import server

pytestmark = pytest.mark.timeout(60)


UNTOUCHED = "nothing was touched"


class VllmWorker:
    """The methods of vLLM's that touch weights; each notes what a client hears when it runs."""

    def __init__(self, engine: Engine, source: Endpoint) -> None:
        self.vllm_config = SimpleNamespace(compilation_config=engine)
        self._source = source
        self.heard = UNTOUCHED

    def _touch(self) -> None:
        self.heard = heard(self._source)

    def sleep(self, level: int = 1) -> None:
        self._touch()

    def wake_up(self, tags: list[str] | None = None) -> str:
        self._touch()
        return "awake"

    def discard(self, tags: tuple[str, ...]) -> None:
        self._touch()

    def reset_weights(self) -> None:
        self._touch()

    def start_weight_update(self) -> None:
        self._touch()

    def start_draft_weight_update(self) -> None:
        self._touch()

    def reload_weights(self, weights_iterator: Any = None, is_checkpoint_format: bool = True) -> None:
        self._touch()


class Worker(VllmWorker):
    """As the class of a platform inherits them."""


watch(VllmWorker)


def heard(source: Endpoint) -> str:
    """Why a client gets nothing there, or nothing where it gets all."""
    try:
        _, fetched = fetch(SMALL.request(identity()), TRANSPORTS, source)
    except SourcesExhausted as error:
        return str(error)
    fetched.memory.close()
    return ""


@pytest.fixture
def worker() -> Iterator[Worker]:
    engine = Engine()
    yield Worker(engine, engine.loads(SMALL))
    close_listeners()


def test_weights_that_sleep_are_served_again_when_they_are_back(worker: Worker) -> None:
    source = worker._source
    worker.sleep()
    assert "it sleeps" in worker.heard
    worker.wake_up(tags=["kv_cache"])
    assert "it sleeps" in heard(source)
    assert worker.wake_up() == "awake"
    assert "it sleeps" in worker.heard
    assert heard(source) == ""


CHANGES: dict[str, tuple[Callable[[Worker], object], str]] = {
    "a deep sleep": (lambda worker: worker.sleep(level=2), r"dropped when it went to sleep \(level 2\)"),
    "dropping": (lambda worker: worker.discard(("weights",)), "were dropped"),
    "zeros": (lambda worker: worker.reset_weights(), "set to zero"),
    "an update": (lambda worker: worker.start_weight_update(), "updated in place"),
    "an update of the draft": (lambda worker: worker.start_draft_weight_update(), "updated in place"),
    "new weights": (lambda worker: worker.reload_weights(iter([])), "replaced in place"),
}


@pytest.mark.parametrize(("change", "reason"), CHANGES.values(), ids=CHANGES.keys())
def test_weights_that_become_others_are_not_served_any_more(
    change: Callable[[Worker], object], reason: str, worker: Worker
) -> None:
    change(worker)
    assert re.search(reason, worker.heard)
    worker.wake_up()
    assert re.search(reason, heard(worker._source))


@pytest.mark.parametrize(
    "change", [Worker.sleep, *(change for change, _ in CHANGES.values())], ids=["sleep", *CHANGES.keys()]
)
def test_weights_that_are_still_being_read_are_not_touched(
    change: Callable[[Worker], object], worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck = StuckTransport()
    monkeypatch.setattr(server, "END_SECONDS", 0.05)
    (served_by,) = serving.servers_of(worker.vllm_config.compilation_config)
    timeouts = replace(served_by.settings.timeouts, stall=0.2)
    served_by.configure(replace(served_by.settings, transports=(stuck,), timeouts=timeouts))
    with Intruder(worker._source).greet().join("in_process"):
        wait_until(lambda: len(served_by.state().sessions) == 1)
        with pytest.raises(TimeoutError, match="still being read"):
            change(worker)
        stuck.go.set()
    assert worker.heard == UNTOUCHED
    assert heard(worker._source) == ""


@pytest.mark.parametrize(
    "leave",
    [lambda worker: worker.discard(("kv_cache",)), lambda worker: worker.reload_weights()],
    ids=["dropping a cache", "a reload by a loader that suspends by itself"],
)
def test_weights_that_stay_what_they_are_are_served_meanwhile(
    leave: Callable[[Worker], object], worker: Worker
) -> None:
    leave(worker)
    assert worker.heard == ""


def test_a_class_is_wrapped_once() -> None:
    before = VllmWorker.sleep
    watch(VllmWorker)
    assert VllmWorker.sleep is before
