"""Models and processes that the end-to-end tests share. Every process started here is ended here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.vllm import checkpoints, loaders
from support.vllm.fetch_model import fetch_model
from support.vllm.hub import Hub
from support.vllm.loaders import Load, Pool, loading, processor


@pytest.fixture(scope="session")
def hub() -> Iterator[Hub]:
    """The hub of all processes: none asks another one."""
    with Hub().running() as hub:
        yield hub


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory, hub: Hub) -> Iterator[Pool]:
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path_factory.mktemp("hub")), "HF_HUB_OFFLINE": "0"}
    pool = Pool(tmp_path_factory.mktemp("loads"), environment=environment)
    yield pool
    pool.end()


@pytest.fixture(scope="session")
def pool_with_other_amx(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """As if the processor had AMX, or if it has, as if it had not."""
    environment = processor(amx_tile={"on": "off", "off": "on"}[loaders.amx()])
    pool = Pool(tmp_path_factory.mktemp("loads-with-other-amx"), environment=environment)
    yield pool
    pool.end()


@pytest.fixture(params=["on", "off"], ids=["AMX", "no AMX"])
def amx(request: pytest.FixtureRequest) -> str:
    """For tests of what vLLM does differently with AMX: `load` then loads with and without it, wherever it runs."""
    answer: str = request.param
    return answer


@pytest.fixture
def load(request: pytest.FixtureRequest) -> Iterator[Load]:
    """Starts a load: load(model, {"SOURCE": [...]}, ...); `finish_loading` waits for it."""
    as_it_is = "amx" not in request.fixturenames or request.getfixturevalue("amx") == loaders.amx()
    pool: Pool = request.getfixturevalue("pool" if as_it_is else "pool_with_other_amx")
    with loading(pool) as load:
        yield load


@pytest.fixture(scope="session")
def smollm2() -> str:
    return fetch_model()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory in which `checkpoints` makes its models."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def untied(models: Path) -> str:
    return checkpoints.dense(models)


@pytest.fixture(scope="session")
def fine_tune(models: Path) -> str:
    """The very same layout as `untied`, other weights."""
    return checkpoints.dense_retrained(models)
