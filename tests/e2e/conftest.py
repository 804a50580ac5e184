"""Models and processes that the end-to-end tests share. Every process started here is ended here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fetch_model import fetch_model
from loaders import Load, Loader
from random_model import SMALL, make_random_model


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Load]:
    """Starts a load: load(model, {"SOURCE": [...]}, ...); `finish_loading` waits for it."""
    directory = tmp_path_factory.mktemp("loads")
    started: list[Loader] = []

    def start(model: str, extra: dict[str, Any] | None = None, **specification: Any) -> Loader:
        started.append(Loader(directory, f"load-{len(started)}", model, extra or {}, **specification))
        return started[-1]

    yield start
    for loader in started:
        loader.end()


@pytest.fixture(scope="session")
def smollm2() -> str:
    return fetch_model()


@pytest.fixture(scope="session")
def random_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def tied(random_models: Path) -> str:
    return str(make_random_model(random_models / "tied", {**SMALL, "tie_word_embeddings": True}))


@pytest.fixture(scope="session")
def untied(random_models: Path) -> str:
    return str(make_random_model(random_models / "untied", {**SMALL, "tie_word_embeddings": False}))


@pytest.fixture(scope="session")
def fine_tune(random_models: Path) -> str:
    """The very same layout as `untied`, other weights."""
    return str(make_random_model(random_models / "fine-tune", {**SMALL, "tie_word_embeddings": False}, seed=1))
