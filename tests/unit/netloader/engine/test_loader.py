"""The loader as vLLM calls it: vLLM's own configuration, groups and a small model of vLLM's, and no engine."""

from __future__ import annotations

import gc
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config

from support.engines import close_listeners
from support.vllm.checkpoints import DENSE
from support.vllm.configuration import configuration_of, load_config_of
from support.vllm.random_model import make_random_model
from vllm_ascend.model_loader.netloader.client.inquiry import inquire
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import ConfigError, SourcesExhausted
from vllm_ascend.model_loader.netloader.loader import NetLoader

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("groups")]

TINY = DENSE | {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 256, "num_hidden_layers": 1}


@pytest.fixture(autouse=True)
def _as_in_a_worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """vLLM's worker for CPUs does away with what torch cannot do there."""
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    yield
    gc.collect()
    close_listeners()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models of one layout with different weights."""
    root = tmp_path_factory.mktemp("models")
    return make_random_model(root / "old", TINY), make_random_model(root / "new", TINY, seed=1)


class Loaded:
    """A model that a loader has loaded; vLLM's configuration is set as long as it works on it."""

    def __init__(self, folder: Path, reports: Path, **extra: Any) -> None:
        self._report = reports / "report-0.json"
        extra = {"LISTEN_HOST": "127.0.0.1", "REPORT_PREFIX": f"{reports}/report-"} | extra
        self.configuration: VllmConfig = configuration_of(folder, **extra)
        self.loader = NetLoader(self.configuration.load_config)

    def load(self) -> Loaded:
        with set_current_vllm_config(self.configuration):
            self.model = self.loader.load_model(self.configuration, self.configuration.model_config)
        return self

    def load_again(self, folder: Path) -> None:
        """What vLLM calls for a model in use."""
        self.configuration.model_config.model = str(folder)
        with set_current_vllm_config(self.configuration):
            self.loader.load_weights(self.model, self.configuration.model_config)

    @property
    def report(self) -> Any:
        return json.loads(self._report.read_text())

    @property
    def address(self) -> str:
        return str(self.report["listening"])

    @property
    def generation(self) -> int:
        return inquire(Endpoint.parse(self.address), 5).holdings[0].generation


def embedding_in(folder: Path) -> torch.Tensor:
    return load_file(folder / "model.safetensors")["model.embed_tokens.weight"]


def embedding_of(model: nn.Module) -> torch.Tensor:
    """Of all that there is before post-processing, this is what it leaves as it is."""
    weight: torch.Tensor = model.get_submodule("model.embed_tokens").weight  # type: ignore[assignment]
    return weight.data[: TINY["vocab_size"]]


def test_a_loader_looks_at_its_configuration_when_it_is_made() -> None:
    with pytest.raises(ConfigError, match=r"unknown Netloader key 'SORUCE'.*did you mean SOURCE"):
        NetLoader(load_config_of({"SORUCE": []}))


def test_making_a_loader_does_nothing_else(tmp_path: Path) -> None:
    """vLLM makes more of them than it uses."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    NetLoader(load_config_of({"LISTEN_PORT": port, "REPORT_PREFIX": f"{tmp_path}/reports/"}))
    assert not (tmp_path / "reports").exists()
    with socket.socket() as sock:
        assert sock.connect_ex(("127.0.0.1", port)) != 0


def test_a_model_is_loaded_from_disk_and_the_next_one_from_it(models: tuple[Path, Path], tmp_path: Path) -> None:
    old, _ = models
    server = Loaded(old, tmp_path).load()
    assert (server.report["outcome"], server.report["not_served"]) == ("disk", None)
    source = server.address
    client = Loaded(old, tmp_path, SOURCE=[source]).load()
    assert (client.report["outcome"], client.report["source"]) == ("p2p", source)
    for each in (server, client):
        assert torch.equal(embedding_of(each.model), embedding_in(old))


def test_a_load_that_fails_is_reported(models: tuple[Path, Path], tmp_path: Path) -> None:
    client = Loaded(models[0], tmp_path, SOURCE=["127.0.0.1:9"], FALLBACK="error")
    with pytest.raises(SourcesExhausted, match="Connection refused"):
        client.load()
    assert client.report["outcome"] == "failed"


def test_a_model_in_use_gets_new_weights_in_place(models: tuple[Path, Path], tmp_path: Path) -> None:
    old, new = models
    loaded = Loaded(old, tmp_path).load()
    place, generation = embedding_of(loaded.model).data_ptr(), loaded.generation
    loaded.load_again(new)
    assert torch.equal(embedding_of(loaded.model), embedding_in(new))
    assert embedding_of(loaded.model).data_ptr() == place
    assert loaded.generation > generation
    fresh = Loaded(new, tmp_path, SOURCE=[loaded.address], FALLBACK="error").load()
    assert torch.equal(embedding_of(fresh.model), embedding_in(new))


def test_a_model_in_use_stays_as_it_is_where_there_are_no_new_weights(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    old, _ = models
    loaded = Loaded(old, tmp_path).load()
    address, generation = loaded.address, loaded.generation
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_bytes((old / "config.json").read_bytes())
    with pytest.raises(RuntimeError, match="Cannot find any model weights"):
        loaded.load_again(tmp_path / "empty")
    assert loaded.report["outcome"] == "failed"
    assert torch.equal(embedding_of(loaded.model), embedding_in(old))
    (holding,) = inquire(Endpoint.parse(address), 5).holdings
    assert holding.generation == generation


def test_weights_come_into_a_model_of_somebody_elses(models: tuple[Path, Path], tmp_path: Path) -> None:
    """vLLM's interface has `load_weights` beside `load_model`, for a model that is made already."""
    from vllm.model_executor.model_loader.utils import initialize_model

    loaded = Loaded(models[0], tmp_path)
    configuration = loaded.configuration
    with set_current_vllm_config(configuration):
        loaded.model = initialize_model(vllm_config=configuration, model_config=configuration.model_config)
        loaded.loader.load_weights(loaded.model, configuration.model_config)
    assert torch.equal(embedding_of(loaded.model), embedding_in(models[0]))
    assert loaded.report["outcome"] == "disk"
    assert inquire(Endpoint.parse(loaded.address), 5).holdings
