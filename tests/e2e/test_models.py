"""Every kind of model: a client has the bytes, flags and answers of a load from disk by vLLM's own loader.

Digests are of all parameters and persistent buffers, taken before post-processing; answers are the greedy
tokens of a whole engine with their log probabilities, or embeddings. The rows are those of the table in
docs/source/models.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from support.vllm import checkpoints
from support.vllm.fetch_model import fetch_model
from support.vllm.loaders import Load, Loader, Pool

PROMPTS: list[Any] = [[1, 5, 9, 13, 17], [2, 4, 8, 16, 32, 64, 128]]
TONES: list[Any] = [{"decoder": [5, 9, 13], "tone": 440}, {"decoder": [5, 9, 13], "tone": 880}]
ALL_TRANSPORTS = ("shared_memory", "tcp", "process_group")
BY_ALL = {"TRANSPORT": list(ALL_TRANSPORTS)}
WITH_TOKENIZER = {"skip_tokenizer_init": False}


@dataclass(frozen=True)
class Row:
    """`draft` makes the checkpoint of a draft model; `speculative` is the rest of that configuration."""

    make: Callable[[Path], str]
    engine: dict[str, Any] = field(default_factory=dict)
    prompts: list[Any] = field(default_factory=lambda: PROMPTS)
    transports: tuple[str, ...] = ("tcp",)
    draft: Callable[[Path], str] | None = None
    speculative: dict[str, Any] | None = None
    separate_draft: bool = False

    def request(self, models: Path) -> dict[str, Any]:
        engine = dict(self.engine)
        if self.speculative is not None:
            draft = {"model": self.draft(models)} if self.draft else {}
            engine["speculative_config"] = {**self.speculative, **draft}
        answering = {"prompts": self.prompts} if self.prompts else {}
        return {"model": self.make(models), "engine": engine, **answering}


def classifier(method: str, tokens: list[str]) -> dict[str, Any]:
    overrides = {"architectures": ["Qwen3ForSequenceClassification"], "method": method, "classifier_from_token": tokens}
    return {"runner": "pooling", "hf_overrides": overrides, **WITH_TOKENIZER}


TWO_TOKENS = {"num_speculative_tokens": 2}
ROWS = {
    "SmolLM2 with its own weights": Row(lambda _: fetch_model(), transports=ALL_TRANSPORTS),
    "dense": Row(checkpoints.dense, transports=ALL_TRANSPORTS),
    "dense, tied embeddings": Row(checkpoints.tied, transports=ALL_TRANSPORTS),
    "biases and learnt positions": Row(checkpoints.biased),
    "state space": Row(checkpoints.state_space, prompts=[]),  # the CPU backend loads it and cannot compute it
    "mixture of experts": Row(checkpoints.mixture_of_experts),
    "latent attention": Row(checkpoints.latent_attention),
    "encoder only": Row(checkpoints.encoder_only, {"runner": "pooling", **WITH_TOKENIZER}),
    "decoder that pools": Row(checkpoints.pooling, {"runner": "pooling", "convert": "embed", **WITH_TOKENIZER}),
    "classifier of two tokens": Row(checkpoints.reranker, classifier("from_2_way_softmax", ["t7", "t9"])),
    "classifier of three tokens": Row(checkpoints.pooling, classifier("no_post_processing", ["t7", "t9", "t11"])),
    "encoder-decoder": Row(checkpoints.encoder_decoder, {**WITH_TOKENIZER, "max_model_len": 64}, TONES),
    "compressed-tensors int8": Row(checkpoints.w8a8),
    "GPTQ 4 bit": Row(checkpoints.gptq),
    "AWQ 4 bit": Row(checkpoints.awq),
    "n-gram speculation": Row(checkpoints.dense, speculative={"method": "ngram", "prompt_lookup_max": 2, **TWO_TOKENS}),
    "draft model": Row(
        checkpoints.dense,
        draft=checkpoints.dense_retrained,
        speculative={"method": "draft_model", **TWO_TOKENS},
        separate_draft=True,
    ),
    "EAGLE draft": Row(
        checkpoints.dense,
        draft=checkpoints.eagle_draft,
        speculative={"method": "eagle", **TWO_TOKENS},
        separate_draft=True,
    ),
    "multi-token prediction": Row(
        checkpoints.latent_attention_with_mtp,
        speculative={"method": "mtp", "num_speculative_tokens": 1},
        separate_draft=True,
    ),
}

RELOADABLE = {name: row for name, row in ROWS.items() if row.prompts and row.make is not checkpoints.w8a8}
"""vLLM's CPU backend cannot reload that one without AMX: see test_reload.py."""


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_a_client_equals_a_load_from_disk(row: Row, load: Load, models: Path) -> None:
    request = row.request(models)
    server, plain = load(**request, extra=BY_ALL), load(**request, load_format="auto")
    plain.finish_loading()
    server.finish_loading()
    plain.end()
    assert not row.prompts or plain.answers[0] != plain.answers[1]
    assert_equal(server, plain, row)
    assert server.report["outcome"] == "disk"
    for transport in row.transports:
        client = load(**request, extra=source(server, transport)).finish_loading()
        assert_equal(client, plain, row)
        for role in ("target", "draft") if row.separate_draft else ("target",):
            assert_came_from(server, client, role, transport)
        client.end()


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_every_transport_brings_every_model(row: Row, load: Load, models: Path) -> None:
    request = row.request(models)
    server = load(**request, extra=BY_ALL).finish_loading()
    for transport in set(ALL_TRANSPORTS) - set(row.transports):
        client = load(**request, extra=source(server, transport)).finish_loading()
        assert_equal(client, server, row)
        client.end()


@pytest.mark.slow
@pytest.mark.parametrize("row", RELOADABLE.values(), ids=RELOADABLE.keys())
def test_every_model_takes_its_own_weights_in_place(row: Row, load: Load, models: Path) -> None:
    request = row.request(models)
    instance = load(**request).finish_loading()
    expected = instance.answers
    for _ in range(2):
        instance.reload(row.prompts, weights_path=request["model"])
        assert instance.finish_loading().answers == expected


def source(server: Loader, transport: str) -> dict[str, Any]:
    return {"SOURCE": [server.address], "TRANSPORT": [transport], "FALLBACK": "error"}


def assert_equal(loader: Loader, plain: Loader, row: Row) -> None:
    assert loader.digests == plain.digests
    assert loader.result["modules"] == plain.result["modules"]
    assert not row.prompts or loader.answers == plain.answers
    assert ("draft" in loader.result) == row.separate_draft
    if row.separate_draft:
        assert loader.result["draft"]["digests"] == plain.result["draft"]["digests"]
        assert loader.result["draft"]["modules"] == plain.result["draft"]["modules"]
        assert loader.result["draft"]["flags"] == plain.result["draft"]["flags"]


def assert_came_from(server: Loader, client: Loader, role: str, transport: str) -> None:
    report = client.report_of(role)
    assert (report["outcome"], report["source"], report["transport"]) == ("p2p", server.address, transport)
    assert report["bytes"] == server.report_of(role)["bytes"]
    # A client of before, which has ended, may be named as a replica, and is asked in vain where a transfer takes long.
    assert server.address not in {attempt["source"] for attempt in report["attempts"]}
    assert report["listening"] == client.address
    assert {"connect", "join", "transfer", "verify", "serve"} <= report["seconds"].keys()
    assert "disk" not in report["seconds"]


def test_processors_of_one_fleet_may_differ(load: Load, pool_with_other_amx: Pool, models: Path) -> None:
    """What travels is what was loaded, and each side packs it for its own processor."""
    request = ROWS["latent attention"].request(models)
    server = load(**request).finish_loading()
    client = pool_with_other_amx.load(**request, extra=source(server, "tcp")).finish_loading()
    assert_came_from(server, client, "target", "tcp")
    assert client.digests == server.digests
    assert client.answers[0] != client.answers[1]
    client.end()


def test_flags_that_loading_sets_go_from_client_to_client(load: Load, models: Path) -> None:
    """An EAGLE draft with its own embedding: a client that lost the flag would compute with the target's."""
    request = ROWS["EAGLE draft"].request(models)
    first = load(**request).finish_loading()
    second = load(**request, extra={"SOURCE": [first.address], "FALLBACK": "error"}).finish_loading()
    first.end()
    third = load(**request, extra=source(second, "tcp")).finish_loading()
    assert third.report_of("draft")["source"] == second.address
    assert third.result["draft"]["flags"] == {"has_own_embed_tokens": True}


def test_a_classifier_is_not_taken_from_one_that_was_made_from_other_tokens(load: Load, models: Path) -> None:
    """Both configurations say the same words, which another tokenizer numbers otherwise."""
    request = ROWS["classifier of two tokens"].request(models)
    server = load(**request).finish_loading()
    words = [f"t{number}" for number in (*range(4), 9, 8, 7, *range(10, 2048))]
    tokenizer = checkpoints.save_tokenizer(models / "other_tokenizer", words)
    client = load(**{**request, "engine": {**request["engine"], "tokenizer": tokenizer}}, extra=source(server, "tcp"))
    assert "(here a classifier made from the tokens [6, 4], there a classifier made from the tokens [7, 9])" in (
        client.fails_with()
    )


def test_what_post_processing_changes_is_kept_in_host_memory(load: Load, models: Path) -> None:
    """The CPU backend repacks every linear layer. INT8_CACHE makes it say so; what is served are the originals."""
    model = checkpoints.w8a8(models)
    server = load(model, {"INT8_CACHE": "dram"}, prompts=PROMPTS).finish_loading()
    some = load(model, {"INT8_CACHE": "hbm", "INT8_CACHE_NAME": ["qkv_proj"], "SERVE": True}).finish_loading()
    changed = server.report["changed"]
    assert "model.layers.0.mlp.down_proj.weight" in changed
    assert "model.embed_tokens.weight" not in changed
    assert some.report["changed"] == [name for name in changed if "qkv_proj" in name]
    some.end()
    client = load(model, source(server, "tcp"), prompts=PROMPTS).finish_loading()
    assert client.digests == server.digests
    assert client.answers == server.answers
    assert client.report["changed"] is None


def test_online_quantization_is_left_to_the_disk_and_declined(load: Load, models: Path) -> None:
    """Its parameters have no memory before loading. (The CPU backend has no kernel for it, so the start then fails.)"""
    online = {"engine": {"quantization": "fp8"}}
    model = checkpoints.dense(models)
    server = load(model, **online)
    assert "static_scaled_fp8_quant" in server.fails_with()
    reason = "has no memory before it is loaded (online quantization keeps it on meta)"
    assert reason in server.report["not_served"]
    server.end()
    stopped = load(model, {"FALLBACK": "error"}, **online)
    assert reason in stopped.fails_with()
