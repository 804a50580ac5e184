"""What `netloader pull` writes is loaded by vLLM: without Netloader, and with nothing of the model but small files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support.vllm import checkpoints
from support.vllm.loaders import Load, Loader
from support.vllm.pulled import CANNOT_BE_WRITTEN, assert_pulled, pull

PROMPTS: list[Any] = [[1, 5, 9, 13, 17], [2, 4, 8, 16, 32, 64, 128]]


def assert_pulled_from_one(request: dict[str, Any], load: Load, directory: Path) -> Loader:
    server = load(**request).finish_loading()

    def again(model: str, extra: dict[str, Any], **changes: Any) -> list[Loader]:
        return [load(**{**request, "model": model, "extra": extra, **changes})]

    assert_pulled([server], directory, again)
    return server


def test_the_real_model_is_pulled_and_answers_as_before(smollm2: str, load: Load, tmp_path: Path) -> None:
    """With its tokenizer, which the engine finds in the directory, too."""
    prompts = [*PROMPTS, [504, 3575, 282, 4649, 314]]
    request = {"model": smollm2, "prompts": prompts, "engine": {"skip_tokenizer_init": False}}
    assert_pulled_from_one(request, load, tmp_path)


MODELS = [
    pytest.param(checkpoints.tied_with_a_head, id="tied, and a head all the same"),
    pytest.param(checkpoints.w8a8, id="compressed-tensors int8"),
    pytest.param(checkpoints.tied, id="tied embeddings", marks=pytest.mark.slow),
    pytest.param(checkpoints.awq, id="AWQ 4 bit", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("make", MODELS)
def test_models_are_pulled_and_answer_as_before(make: Any, load: Load, models: Path, tmp_path: Path) -> None:
    assert_pulled_from_one({"model": make(models), "prompts": PROMPTS}, load, tmp_path)


def test_a_draft_and_what_the_format_cannot_hold_are_named(
    load: Load, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draft = {"method": "eagle", "num_speculative_tokens": 2, "model": checkpoints.eagle_draft(models)}
    server = load(checkpoints.dense(models), engine={"speculative_config": draft}, prompts=PROMPTS).finish_loading()
    assert pull(server, tmp_path / "target") == 0
    assert "left out: the draft weights" in capsys.readouterr().out
    alone = load(str(tmp_path / "target"), load_format="sharded_state", prompts=PROMPTS).finish_loading()
    assert alone.digests == server.digests

    server.end()
    server = load(checkpoints.gptq(models)).finish_loading()
    assert pull(server, tmp_path / "gptq") == pull(server, tmp_path / "gptq", "--files-only") == CANNOT_BE_WRITTEN
    assert "a GPTQ model whose configuration does not name its quantised layers" in capsys.readouterr().err
