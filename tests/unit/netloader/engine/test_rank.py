"""What a load gets to know of vLLM, read from vLLM's own configuration."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from support.vllm.configuration import configuration_of, write_config
from vllm_ascend.model_loader.netloader.engine.progress import progress_bar
from vllm_ascend.model_loader.netloader.engine.rank import rank_of
from vllm_ascend.model_loader.netloader.errors import ConfigError
from vllm_ascend.model_loader.netloader.instance.rank import Rank
from vllm_ascend.model_loader.netloader.weights.identity import RankCoordinates

pytestmark = pytest.mark.usefixtures("groups")


def rank_for(folder: Path, role: str = "target", *, on_host: bool = False) -> Rank:
    configuration = configuration_of(write_config(folder))
    model_config = copy.copy(configuration.model_config)
    if role == "draft":
        model_config.runner_type = "draft"
    return rank_of(configuration, model_config, configuration.load_config, "ours/model", on_host=on_host)


def test_a_process_alone_is_the_first_rank_of_a_whole_model(tmp_path: Path) -> None:
    rank = rank_for(tmp_path)
    assert (rank.number, rank.role, rank.coordinates) == (0, "target", RankCoordinates())
    assert rank.weights_name == "the target weights of rank 0"
    assert (rank.computes_on, rank.loads_on) == (torch.device("cpu"), torch.device("cpu"))
    assert rank.gather(b"alone") == [b"alone"]
    assert rank.identify().name == "ours/model"
    assert rank.identify().fingerprint == ""


def test_target_and_draft_have_one_engine(tmp_path: Path) -> None:
    configuration = configuration_of(write_config(tmp_path))
    target, other = (
        rank_of(configuration, configuration.model_config, configuration.load_config, None) for _ in range(2)
    )
    assert target.engine is other.engine is configuration.compilation_config
    assert rank_for(tmp_path, "draft").role == "draft"


def test_a_checkpoint_of_another_loader_stops_the_start(tmp_path: Path) -> None:
    configuration = configuration_of(write_config(tmp_path))
    configuration.model_config.quantization = "gguf"
    with pytest.raises(ConfigError, match="use --load-format gguf"):
        rank_of(configuration, configuration.model_config, configuration.load_config, None)


@pytest.mark.parametrize("enabled", [True, False])
def test_a_transfer_of_less_than_a_second_shows_no_bar(enabled: bool, capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(1000, enabled=enabled) as advance:
        advance(400)
        advance(600)
    assert capsys.readouterr().err == ""
