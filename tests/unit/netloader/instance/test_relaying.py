"""An instance passes on what it loads, from the first chunk to the end of its model."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest

from support.loads import Checkpoint, Instance, Model
from support.ports import free_port
from support.wait import wait_until
from vllm_ascend.model_loader.netloader.client.inquiry import inquire
from vllm_ascend.model_loader.netloader.client.search import search
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.transport import digests
from vllm_ascend.model_loader.netloader.transport.registry import transports
from vllm_ascend.model_loader.netloader.wire.messages import Holding

CHUNK = 1024
SLOWLY = 20_000
TCP = transports(["tcp"])

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "CHUNK_BYTES", CHUNK)
    monkeypatch.setattr(search, "HELP_AFTER", 0.0)


@pytest.fixture
def source(tmp_path: Path) -> Instance:
    """It sends for most of a second."""
    return Instance(Checkpoint(tmp_path / "there").holding(3.0), {"max_bandwidth": SLOWLY}, transports=TCP).start()


class Starting:
    """An instance without files that starts from `source` in a thread."""

    def __init__(
        self,
        source: Instance,
        folder: Path,
        process: Callable[[Model], object] = lambda _: None,
        **config: object,
    ) -> None:
        port = free_port()
        self.instance = Instance(
            Checkpoint(folder), {"listen_port": port, "fallback": "error"} | config, transports=TCP
        )
        self.address = Endpoint("127.0.0.1", port)
        self.failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(source, process), daemon=True)
        self._thread.start()

    def _run(self, source: Instance, process: Callable[[Model], object]) -> None:
        try:
            self.instance.start(source.address, process=process)
        except Exception as error:
            self.failure = error

    def join(self) -> Instance:
        self._thread.join()
        return self.instance

    def holdings(self) -> tuple[Holding, ...]:
        try:
            return inquire(self.address, 5).holdings
        except Exception:  # it does not listen yet
            return ()


def test_what_is_loaded_is_served_from_the_first_chunk_on_and_stays_the_same_store(
    source: Instance, tmp_path: Path
) -> None:
    starting = Starting(source, tmp_path / "here")
    wait_until(starting.holdings)
    (loading,) = starting.holdings()
    assert loading.held < loading.nbytes
    instance = starting.join()
    assert starting.failure is None
    (loaded,) = starting.holdings()
    assert (loaded.held, loaded.generation) == (loaded.nbytes, loading.generation)
    assert loaded.root == loading.root == instance.summary.root
    assert instance.model.value == 3.0
    assert instance.address == starting.address


def test_instances_that_start_together_take_from_each_other(source: Instance, tmp_path: Path) -> None:
    starting = [Starting(source, tmp_path / str(number)) for number in range(3)]
    instances = [each.join() for each in starting]
    assert [each.failure for each in starting] == [None] * 3
    assert [instance.model.value for instance in instances] == [3.0] * 3
    nbytes = instances[0].summary.bytes
    assert sum(instance.summary.received.get(str(source.address), 0) for instance in instances) < 2 * nbytes
    assert any(
        str(one.address) in other.summary.received for one in instances for other in instances if one is not other
    )


def test_an_instance_that_is_not_to_relay_serves_only_what_it_has_loaded(source: Instance, tmp_path: Path) -> None:
    during: list[tuple[Holding, ...]] = []
    starting = Starting(source, tmp_path / "here", lambda _: during.append(starting.holdings()), relay=False)
    starting.join()
    assert during == [()]
    (loaded,) = starting.holdings()
    assert loaded.held == loaded.nbytes


def test_while_the_model_is_processed_the_weights_are_served_already(source: Instance, tmp_path: Path) -> None:
    during: list[tuple[Holding, ...]] = []

    def spoil(model: Model) -> None:
        during.append(starting.holdings())
        model.second.data.fill_(9.0)

    starting = Starting(source, tmp_path / "here", spoil)
    starting.join()
    ((holding,),) = during
    assert holding.held == holding.nbytes
    taken = Instance(Checkpoint(tmp_path / "next"), {"fallback": "error"}, transports=TCP).start(starting.address)
    assert taken.model.value == 3.0


def test_a_load_that_fails_after_the_transfer_takes_back_what_it_has_offered(source: Instance, tmp_path: Path) -> None:
    during: list[tuple[Holding, ...]] = []

    def fail(_: Model) -> None:
        during.append(starting.holdings())
        raise RuntimeError("the kernels cannot be built")

    starting = Starting(source, tmp_path / "here", fail)
    starting.join()
    assert isinstance(starting.failure, RuntimeError)
    assert len(during[0]) == 1
    assert starting.holdings() == ()


def test_a_reload_relays_the_new_weights_beside_the_old_ones(source: Instance, tmp_path: Path) -> None:
    instance = Instance(Checkpoint(tmp_path / "here").holding(1.0), transports=TCP).start()
    old = instance.address
    instance.checkpoint.file.unlink()
    load = instance.begin(source.address)
    scratch = Model()
    filled: list[object] = []
    with load.failure_reported():
        thread = threading.Thread(target=lambda: filled.append(load.fill(scratch)), daemon=True)
        thread.start()
        wait_until(lambda: len(inquire(old, 5).holdings) == 2)
        served, loading = inquire(old, 5).holdings
        assert served.held == served.nbytes
        assert loading.held < loading.nbytes
        assert served.root != loading.root
        thread.join()
        load.publish(instance.model, filled[0])  # type: ignore[arg-type]
    (published,) = inquire(old, 5).holdings
    assert (published.generation, published.root) == (loading.generation, loading.root)


def test_a_reload_that_nobody_goes_on_with_leaves_nothing(source: Instance, tmp_path: Path) -> None:
    """vLLM has asked for new weights and then does something else."""
    instance = Instance(Checkpoint(tmp_path / "here").holding(1.0), transports=TCP).start()
    address = instance.address
    instance.checkpoint.file.unlink()
    load = instance.begin(source.address)
    loaded = load.fill(Model())
    assert loaded.kept is not None
    memory = weakref.ref(loaded.kept.contents.memory)
    assert len(inquire(address, 5).holdings) == 2
    del load, loaded
    instance.loads.clear()
    gc.collect()
    assert len(inquire(address, 5).holdings) == 1
    wait_until(lambda: memory() is None)
