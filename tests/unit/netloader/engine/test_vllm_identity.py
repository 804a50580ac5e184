"""What vLLM's configuration says of a model and of the part of it that a rank holds. The configurations are vLLM's."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm
from vllm.config import VllmConfig
from vllm.config.load import LoadConfig

import vllm_ascend
from support.vllm.configuration import configuration_of, write_config
from vllm_ascend.model_loader.netloader.engine.disk import fingerprint_here
from vllm_ascend.model_loader.netloader.engine.vllm_identity import (
    global_rank,
    model_identity,
    rank_coordinates,
    role_of,
)
from vllm_ascend.model_loader.netloader.weights.identity import ModelIdentity, RankCoordinates

Configure = Callable[..., VllmConfig]


@pytest.fixture
def configure(tmp_path: Path) -> Configure:
    """Makes vLLM's configuration of a small model in a folder, with further keys in its config.json."""

    def make(folder: Path = tmp_path / "model", **keys: Any) -> VllmConfig:
        return configuration_of(write_config(folder, **keys))

    return make


def identity_of(configuration: VllmConfig, name: str | None = None) -> ModelIdentity:
    return model_identity(configuration, configuration.model_config, name)


def draft(configuration: VllmConfig) -> Any:
    """The configuration of a draft model, as speculative decoding makes it."""
    changed = copy.copy(configuration.model_config)
    changed.runner_type = "draft"
    return changed


def test_a_folder_is_known_by_its_real_path(configure: Configure, tmp_path: Path) -> None:
    folder = configure(tmp_path / "models" / "mine").model_config.model
    (tmp_path / "link").symlink_to(folder)
    identity = identity_of(configure(tmp_path / "link"))
    assert (identity.name, identity.name_is_path, identity.revision) == (folder, True, "")


NOTE = '{"fingerprint": "f00d", "name": "org/model", "revision": "c0ffee"}'


def test_without_weights_a_note_says_which_model_it_is(configure: Configure, tmp_path: Path) -> None:
    configuration = configure()
    (tmp_path / "model" / "netloader-pull.json").write_text(NOTE)
    identity = identity_of(configuration)
    assert (identity.name, identity.name_is_path, identity.revision) == ("org/model", False, "c0ffee")
    assert fingerprint_here(torch.nn.Identity(), configuration.model_config, LoadConfig()) == "f00d"
    assert identity_of(configuration, "ours/model").name == "ours/model"


def test_beside_weights_a_note_does_not_count(configure: Configure, tmp_path: Path) -> None:
    configuration = configure()
    (tmp_path / "model" / "netloader-pull.json").write_text(NOTE)
    (tmp_path / "model" / "model.safetensors").write_bytes(bytes(8))
    identity = identity_of(configuration)
    assert (identity.name, identity.name_is_path) == (str(tmp_path / "model"), True)
    assert fingerprint_here(torch.nn.Identity(), configuration.model_config, LoadConfig()) != "f00d"


def test_a_configured_name_counts_for_the_target_and_not_for_the_draft(configure: Configure) -> None:
    configuration = configure()
    assert identity_of(configuration, "ours/model").name == "ours/model"
    assert not identity_of(configuration, "ours/model").name_is_path
    of_draft = model_identity(configuration, draft(configuration), "ours/model")
    assert (of_draft.role, of_draft.name) == ("draft", configuration.model_config.model)


def test_a_snapshot_of_the_hub_is_known_by_repository_and_commit(configure: Configure, tmp_path: Path) -> None:
    """That is the path which an offline vLLM puts in place of the name."""
    identity = identity_of(configure(tmp_path / "models--org--some--model" / "snapshots" / "c0ffee"))
    assert (identity.name, identity.name_is_path, identity.revision) == ("org/some/model", False, "c0ffee")


def test_a_repository_is_known_by_its_name_and_the_commit_that_its_branch_led_to(configure: Configure) -> None:
    configuration = configure()
    configuration.model_config.model = "org/model"
    configuration.model_config.revision = None
    assert identity_of(configuration).revision == ""
    configuration.model_config.revision = "main"
    assert identity_of(configuration).revision == "main"
    configuration.model_config.revision = SimpleNamespace(resolved="c0ffee")
    assert (identity_of(configuration).name, identity_of(configuration).revision) == ("org/model", "c0ffee")


def test_what_decides_about_bytes_is_in_the_identity(configure: Configure) -> None:
    identity = identity_of(configure())
    assert (identity.architecture, identity.dtype, identity.quantization) == ("LlamaForCausalLM", "bfloat16", "")
    assert (identity.role, identity.load_options, identity.fingerprint) == ("target", "", "")
    assert identity.versions == {
        "vllm": vllm.__version__.partition("+")[0],
        "torch": torch.__version__.partition("+")[0],
        "vllm_ascend": vllm_ascend.__version__,
    }


INCIDENTAL = [{"_name_or_path": "/elsewhere"}, {"_commit_hash": "c0ffee"}, {"transformers_version": "4.0"}]
ESSENTIAL = [
    {"rope_theta": 5.0},
    {"tie_word_embeddings": True},
    {"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}},
]


@pytest.mark.parametrize("keys", INCIDENTAL, ids=json.dumps)
def test_what_differs_between_copies_of_a_model_does_not_count(configure: Configure, keys: dict[str, Any]) -> None:
    assert identity_of(configure(**keys)).config_digest == identity_of(configure()).config_digest


@pytest.mark.parametrize("keys", ESSENTIAL, ids=json.dumps)
def test_everything_else_that_a_model_is_configured_by_counts(configure: Configure, keys: dict[str, Any]) -> None:
    assert identity_of(configure(**keys)).config_digest != identity_of(configure()).config_digest


def test_all_of_a_quantization_counts(configure: Configure) -> None:
    """A type there is that of the bytes in the checkpoint, unlike the model's own, which only says how to compute."""
    base = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    one, other = (configure(quantization_config=base | {"dtype": dtype}) for dtype in ("float16", "bfloat16"))
    assert identity_of(one).quantization == "fp8"
    assert identity_of(one).config_digest != identity_of(other).config_digest


def test_redundant_experts_of_load_balancing_are_in_the_identity(configure: Configure) -> None:
    configuration = configure()
    configuration.parallel_config.enable_eplb = True
    configuration.parallel_config.eplb_config.num_redundant_experts = 2
    assert identity_of(configuration).load_options == "expert load balancing with 2 redundant experts"


def test_a_model_is_a_draft_or_the_target(configure: Configure) -> None:
    configuration = configure()
    assert role_of(configuration.model_config) == "target"
    assert role_of(draft(configuration)) == "draft"


@pytest.mark.usefixtures("groups")
def test_a_process_alone_holds_the_whole_model(configure: Configure) -> None:
    configuration = configure()
    assert rank_coordinates(configuration) == RankCoordinates()
    assert global_rank(configuration) == 0


@pytest.mark.usefixtures("groups")
def test_replicas_are_counted_one_after_another(configure: Configure) -> None:
    """Each replica of a dense model has a world of its own, whose ranks begin at 0."""
    configuration = configure()
    configuration.parallel_config.world_size = 2
    configuration.parallel_config.data_parallel_index = 3
    assert global_rank(configuration) == 6
