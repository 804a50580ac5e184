"""vLLM's `reload_weights` on instances in use: new weights from disk or from a source, and what is served after it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from support.vllm import checkpoints
from support.vllm.loaders import Load, generation
from vllm_ascend.model_loader.netloader.client.inquiry import inquire
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.weights.manifest import Manifest
from vllm_ascend.model_loader.netloader.wire.access import Access
from vllm_ascend.model_loader.netloader.wire.channel import Deadline
from vllm_ascend.model_loader.netloader.wire.greeting import greet
from vllm_ascend.model_loader.netloader.wire.messages import Accept, End, Join, Offer, Refuse

PROMPTS = [[1, 5, 9, 13, 17], [2, 4, 8, 16, 32, 64, 128]]

Make = Callable[[Path], str]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (checkpoints.dense, checkpoints.dense_retrained),
        (checkpoints.tied, checkpoints.tied_retrained),
        (checkpoints.mixture_of_experts, checkpoints.mixture_of_experts_retrained),
    ],
    ids=["dense", "tied embeddings", "mixture of experts"],
)
def test_weights_are_replaced_in_place(before: Make, after: Make, load: Load, models: Path, tmp_path: Path) -> None:
    old, new = before(models), after(models)
    sources = tmp_path / "sources.json"
    sources.write_text("{}")
    first, expected = load(old, prompts=PROMPTS), load(new, load_format="auto", prompts=PROMPTS)
    answers_before = first.finish_loading().answers
    answers_after = expected.finish_loading().answers
    expected.end()
    assert answers_before != answers_after
    sources.write_text(json.dumps({"SOURCE": [first.address]}))
    second = load(old, {"CONFIG_FILE": str(sources)}, prompts=PROMPTS).finish_loading()
    assert second.report["outcome"] == "p2p"
    assert second.answers == answers_before
    first_generation, second_generation = generation(first), generation(second)

    # From disk; the source still has the old weights and is refused.
    second.reload(PROMPTS, weights_path=new)
    assert second.finish_loading().answers == answers_after
    assert second.report["outcome"] == "disk"
    assert "fingerprint" in second.report["attempts"][0]["reason"]

    # From the source, now that it has reloaded too.
    first.reload(PROMPTS, weights_path=new)
    assert first.finish_loading().answers == answers_after
    second.reload(PROMPTS, weights_path=new)
    assert second.finish_loading().answers == answers_after
    assert (second.report["outcome"], second.report["source"]) == ("p2p", first.address)

    # What it serves are the new weights, of a generation above the old ones'.
    assert generation(first) == first_generation + 1
    assert generation(second) == second_generation + 2
    third = load(new, {"SOURCE": [second.address], "FALLBACK": "error"}, prompts=PROMPTS).finish_loading()
    assert third.answers == answers_after
    assert third.digests == expected.digests


@pytest.mark.usefixtures("amx")
@pytest.mark.parametrize("make", [checkpoints.gptq, checkpoints.latent_attention], ids=["4 bit", "latent attention"])
def test_repacked_weights_are_repacked_again(make: Make, load: Load, models: Path) -> None:
    model = make(models)
    instance = load(model, prompts=PROMPTS).finish_loading()
    answers = instance.answers
    for _ in range(2):
        instance.reload(PROMPTS, weights_path=model)
        assert instance.finish_loading().answers == answers


@pytest.mark.usefixtures("amx")
@pytest.mark.parametrize("amx", ["on"], indirect=True)
def test_weights_that_another_layer_has_taken_away_are_replaced(load: Load, models: Path) -> None:
    """With AMX, vLLM's latent attention packs and drops the weight of a projection."""
    instance = load(checkpoints.latent_attention(models), prompts=PROMPTS).finish_loading()
    before = instance.answers
    instance.reload(PROMPTS, weights_path=checkpoints.latent_attention_retrained(models))
    after = instance.finish_loading().answers
    instance.end()
    anew = load(checkpoints.latent_attention_retrained(models), load_format="auto", prompts=PROMPTS).finish_loading()
    assert after == anew.answers != before


def test_a_kernel_that_cannot_be_reloaded_is_refused_by_name(amx: str, load: Load, models: Path) -> None:
    """With AMX, vLLM takes another one for int8, which can."""
    model = checkpoints.w8a8(models)
    instance = load(model, prompts=PROMPTS).finish_loading()
    answers, served = instance.answers, generation(instance)
    instance.reload(PROMPTS, weights_path=model)
    if amx == "on":
        assert instance.finish_loading().answers == answers
    else:
        assert "model.layers.0.self_attn.qkv_proj has vLLM's CPU kernel for int8" in instance.fails_with()
        assert generation(instance) == served


def test_the_loader_fills_a_model_in_use(load: Load, models: Path) -> None:
    """The loader's `load_weights`, without vLLM's RPC around it."""
    old, new = checkpoints.dense(models), checkpoints.dense_retrained(models)
    instance = load(old, prompts=PROMPTS).finish_loading()
    answers, served = instance.answers, generation(instance)
    instance.reload(PROMPTS, directly=True, weights_path=new)
    assert instance.finish_loading().answers != answers
    instance.reload(PROMPTS, directly=True, weights_path=old)
    assert instance.finish_loading().answers == answers
    assert generation(instance) == served + 2


def test_a_reload_that_fails_changes_nothing(load: Load, models: Path) -> None:
    instance = load(checkpoints.dense(models), prompts=PROMPTS).finish_loading()
    answers, address = instance.answers, instance.address
    served = generation(instance)
    instance.reload(PROMPTS, weights_path=str(models / "nowhere"))
    instance.fails_with()
    assert instance.report["outcome"] == "failed"
    assert generation(instance) == served
    client = load(checkpoints.dense(models), {"SOURCE": [address], "FALLBACK": "error"}, prompts=PROMPTS)
    assert client.finish_loading().answers == answers


def test_a_transfer_that_straddles_a_reload_is_ended(load: Load, models: Path) -> None:
    instance = load(checkpoints.dense(models), prompts=PROMPTS).finish_loading()
    source = Endpoint.parse(instance.address)
    holding = inquire(source, 10).holdings[0]

    def join(manifest_digest: str) -> Join:
        return Join(holding.identity, holding.coordinates, manifest_digest, (Offer("tcp"),))

    with greet(source, Access(), 10) as asking:
        asking.send(join("unknown"), 10)
        refusal = asking.receive(Deadline(10))
        assert isinstance(refusal, Refuse)
    with greet(source, Access(), 10) as session:
        session.send(join(Manifest.decode(refusal.manifest).digest), 10)
        accept = session.receive(Deadline(10))
        assert isinstance(accept, Accept)
        instance.reload(PROMPTS, weights_path=checkpoints.dense_retrained(models))
        instance.finish_loading()
        ended = session.receive(Deadline(10))
    assert ended == End("its weights were replaced by new ones")
    assert generation(instance) == accept.generation + 1


def test_a_reload_in_kernel_format_is_refused(load: Load, models: Path) -> None:
    model = checkpoints.dense(models)
    instance = load(model, prompts=PROMPTS).finish_loading()
    answers = instance.answers
    instance.reload(PROMPTS, weights_path=model, is_checkpoint_format=False)
    assert "set is_checkpoint_format to true" in instance.fails_with()
    instance.reload(PROMPTS, weights_path=model)
    assert instance.finish_loading().answers == answers


def test_sources_may_be_obligatory_for_a_reload_too(load: Load, models: Path) -> None:
    old, new = checkpoints.dense(models), checkpoints.dense_retrained(models)
    server = load(old).finish_loading()
    extra = {"SOURCE": [server.address], "FALLBACK": "error"}
    instance = load(old, extra, prompts=PROMPTS).finish_loading()
    instance.reload(PROMPTS, weights_path=new)
    assert "fingerprint" in instance.fails_with()
    instance.reload(PROMPTS, weights_path=old)
    assert instance.finish_loading().answers == load(old, prompts=PROMPTS).finish_loading().answers
