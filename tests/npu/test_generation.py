"""Whole engines on simulated NPUs answer as vLLM's CPU platform does, in fp32 and greedily, token for token.

An engine is a process that loads several models one after another; those of the CPU platform are in the environment
below, without torch-npu. Engines of several ranks start a process for each.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from support.ports import two_free_ports
from support.vllm import checkpoints
from support.vllm.loaders import Load, Loader, Pool
from support.vllm.random_model import make_random_model

CPU_PYTHON = str(Path(torch.__file__).parents[4] / "bin" / "python")
PROMPTS = [[1, 5, 9, 13, 17], [2, 4, 8, 16, 32, 64, 128], list(range(3, 200))]
"""The last has more tokens than a batch may have, so it is taken in chunks, with the others' decoding between."""
BATCH = {"max_num_batched_tokens": 64, "max_num_seqs": 4}
ENGINE = {"dtype": "float32", "skip_tokenizer_init": True, "kv_cache_memory_bytes": 1 << 25, **BATCH}
SIZES = {"cudagraph_capture_sizes": [1, 2, 4]}
GRAPHS = {"enforce_eager": False, "compilation_config": SIZES}
EAGER = {"enforce_eager": True}
EXPERTS = {"enable_expert_parallel": True}
COPYING = {**GRAPHS, "compilation_config": {**SIZES, "cudagraph_copy_inputs": True}}
OTHER_CODE = {
    **GRAPHS,
    "model_impl": "transformers",
    "compilation_config": {**SIZES, "compile_sizes": [4], "custom_ops": ["none"]},
}
"""That of transformers, without custom operators."""
REFERENCE = {"dtype": "float32", "attention_backend": "CPU_MLA"}
"""The CPU platform has a backend for MLA in bfloat16 alone, which it takes where the processor has AMX."""
Make = Callable[[Path], str]


def qwen3(root: Path) -> str:
    return str(make_random_model(root / "qwen3", {**checkpoints.DENSE, "head_dim": 128}, architecture="qwen3"))


def qwen2(root: Path) -> str:
    configuration = {**checkpoints.DENSE, "tie_word_embeddings": True}
    return str(make_random_model(root / "qwen2", configuration, architecture="qwen2"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def pools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Pool]]:
    """Of processes on CPUs, on NPUs with torch-npu's queue and without, and of a data-parallel engine's replicas."""
    directory = tmp_path_factory.mktemp("engines")
    port = str(two_free_ports())
    replicas = {"VLLM_DP_SIZE": "2", "VLLM_DP_MASTER_IP": "127.0.0.1", "VLLM_DP_MASTER_PORT": port}
    environments: dict[str, dict[str, str]] = {
        "npu": {},
        "queue": {"TASK_QUEUE_ENABLE": "1"},
        "few streams": {"CANN_SIM_STREAMS": "130", "CANN_SIM_MACHINE": "few streams"},
        "replica 0": {**replicas, "VLLM_DP_RANK": "0", "VLLM_DP_RANK_LOCAL": "0"},
        "replica 1": {**replicas, "VLLM_DP_RANK": "1", "VLLM_DP_RANK_LOCAL": "1"},
    }
    pools = {"cpu": Pool(directory / "cpu", CPU_PYTHON)}
    pools |= {name: Pool(directory / name, environment=environment) for name, environment in environments.items()}
    for name in pools:
        (directory / name).mkdir()
    yield pools
    for pool in pools.values():
        pool.end()


@pytest.fixture
def engine(pools: dict[str, Pool]) -> Iterator[Load]:
    """engine("npu", model, arguments) makes an engine that answers PROMPTS, or other prompts."""
    started: list[Loader] = []

    def start(where: str, model: str, arguments: dict[str, Any] | None = None, **request: Any) -> Loader:
        common = REFERENCE if where == "cpu" else ENGINE
        request = {"load_format": "auto", "prompts": PROMPTS, "digests": False, **request}
        started.append(pools[where].load(model, engine={**common, **(arguments or {})}, **request))
        return started[-1]

    yield start
    for loader in started:
        loader.end()


@pytest.fixture(scope="module")
def answers_on_cpu(pools: dict[str, Pool], models: Path) -> Callable[[Make], list[Any]]:
    """What vLLM's CPU platform answers: tokens and their log probabilities; each model answers once."""
    known: dict[Make, list[Any]] = {}

    def answer(make: Make) -> list[Any]:
        if make not in known:
            request: dict[str, Any] = {
                "load_format": "auto",
                "prompts": PROMPTS,
                "digests": False,
                "engine": REFERENCE,
            }
            loader = pools["cpu"].load(make(models), **request).finish_loading()
            known[make] = loader.answers
            loader.end()
        return known[make]

    return answer


@pytest.fixture(scope="module")
def on_cpu(answers_on_cpu: Callable[[Make], list[Any]]) -> Callable[[Make], list[list[int]]]:
    """The tokens alone."""
    return lambda make: tokens(answers_on_cpu(make))


def tokens(answers: list[Any]) -> list[list[int]]:
    return [[token for token, _ in answer] for answer in answers]


SINGLE: dict[str, tuple[Make, dict[str, Any]]] = {
    "Llama, asked for blocks of 16 tokens": (checkpoints.dense, {**EAGER, "block_size": 16}),
    "Llama in graphs": (checkpoints.dense, GRAPHS),
    "Qwen2 in graphs that copy their inputs": (qwen2, COPYING),
    "Qwen3 in graphs": (qwen3, GRAPHS),
    "Llama by other code in graphs": (checkpoints.dense, OTHER_CODE),
    "MiniCPM": (checkpoints.minicpm, EAGER),
    "DeepSeek-V3 in graphs": (checkpoints.deepseek_v3, GRAPHS),
}


@pytest.mark.parametrize(("make", "arguments"), SINGLE.values(), ids=SINGLE.keys())
def test_one_npu_answers_as_the_cpu(
    make: Make, arguments: dict[str, Any], engine: Load, on_cpu: Callable[[Make], list[list[int]]], models: Path
) -> None:
    answering = engine("npu", make(models), arguments)
    expected = on_cpu(make)
    assert tokens(answering.finish_loading().answers) == expected
    assert tokens(answering.ask(PROMPTS)) == expected, "with the beginnings of the prompts cached"


def test_prompts_may_be_embeddings_and_answers_be_confined(engine: Load, models: Path) -> None:
    """One batch of prompts as embeddings, and prompts whose answer is one of a few words."""
    model = checkpoints.dense_with_words(models)
    arguments = {"enable_prompt_embeds": True, "skip_tokenizer_init": False, **GRAPHS}
    words = [["t7", "t8", "t9"], ["t4", "t5"]]
    confined = [{"choices": chosen, "tokens": PROMPTS[index]} for index, chosen in enumerate(words)]
    mixture = [*({"embedded": prompt} for prompt in PROMPTS), *confined]
    ours = engine("npu", model, arguments, prompts=[*PROMPTS, *mixture])
    expected = tokens(
        engine("cpu", model, {**arguments, **EAGER}, prompts=[*PROMPTS, *confined]).finish_loading().answers
    )

    answers = tokens(ours.finish_loading().answers)
    plain, embedded, chosen = answers[:3], answers[3:6], answers[6:]
    assert plain == embedded == expected[:3]
    assert chosen == expected[3:]
    assert all(f"t{answer[0]}" in choices for answer, choices in zip(chosen, words, strict=True))


PARTITIONS: dict[str, tuple[Make, dict[str, Any]]] = {
    "tensor parallel, in graphs": (checkpoints.dense, {"tensor_parallel_size": 2, **GRAPHS}),
    "pipeline parallel": (checkpoints.dense, {"pipeline_parallel_size": 2, **EAGER}),
    "DeepSeek-V2, expert parallel": (checkpoints.deepseek_v2, {"tensor_parallel_size": 2, **EXPERTS, **EAGER}),
}


@pytest.mark.parametrize(("make", "arguments"), PARTITIONS.values(), ids=PARTITIONS.keys())
def test_two_npus_answer_as_the_cpu(
    make: Make, arguments: dict[str, Any], engine: Load, on_cpu: Callable[[Make], list[list[int]]], models: Path
) -> None:
    answering = engine("npu", make(models), arguments)
    expected = on_cpu(make)
    assert tokens(answering.finish_loading().answers) == expected


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_torch_npus_queue_changes_no_answer(
    size: int, engine: Load, on_cpu: Callable[[Make], list[list[int]]], models: Path
) -> None:
    answering = engine("queue", checkpoints.dense(models), {"tensor_parallel_size": size, **GRAPHS})
    expected = on_cpu(checkpoints.dense)
    assert tokens(answering.finish_loading().answers) == expected


@pytest.mark.parametrize("arguments", [{}, {"tensor_parallel_size": 2, **EXPERTS}], ids=["one", "expert parallel"])
def test_experts_answer_as_on_the_cpu_and_are_told(
    arguments: dict[str, Any], engine: Load, on_cpu: Callable[[Make], list[list[int]]], models: Path
) -> None:
    """In graphs. Which experts they are, transformers says; some come from a cached prefix."""
    model = checkpoints.mixture_of_experts(models)
    answering = engine("npu", model, {**arguments, **GRAPHS, "enable_return_routed_experts": True})
    expected = on_cpu(checkpoints.mixture_of_experts)
    assert tokens(answering.finish_loading().answers) == expected
    read = [prompt + answer[:-1] for prompt, answer in zip(PROMPTS, expected, strict=True)]
    assert answering.routes(PROMPTS) == [experts_of(model, each) for each in read]


def experts_of(model: str, read: list[int]) -> list[list[list[int]]]:
    """For each token, in each layer, the experts with the largest logits."""
    from transformers import AutoModelForCausalLM

    with torch.inference_mode():
        reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        logits = reference(torch.tensor([read]), output_router_logits=True).router_logits
    chosen: list[list[list[int]]] = torch.stack([each.topk(2)[1] for each in logits], dim=1).tolist()
    return chosen


W8A8: dict[str, tuple[Make, Make | None, Make, dict[str, Any]]] = {
    "Llama": (checkpoints.w8a8, checkpoints.modelslim, checkpoints.w8a8, {}),
    "Llama, static": (checkpoints.w8a8_static, None, checkpoints.dense, {}),
    "Qwen3-MoE, expert parallel": (
        checkpoints.w8a8_experts,
        checkpoints.modelslim_experts,
        checkpoints.mixture_of_experts,  # vLLM computes quantised experts on processors with AMX only
        {"tensor_parallel_size": 2, **EXPERTS},
    ),
}


@pytest.mark.parametrize("case", W8A8.values(), ids=W8A8.keys())
def test_w8a8_answers_about_as_the_cpu(
    case: tuple[Make, Make | None, Make, dict[str, Any]],
    engine: Load,
    answers_on_cpu: Callable[[Make], list[Any]],
    models: Path,
) -> None:
    """In graphs, which find the weights again after a reload; then answers are the same to the last bit.

    So they are with the same numbers in ModelSlim's format, which the same operators are given.

    A quantised activation is another integer where what it is rounded from differs in the last bit. So answers of other
    kernels are not the same, but about as likely.
    """
    make, in_other_format, reference, arguments = case
    answering = engine("npu", make(models), {**arguments, **GRAPHS}).finish_loading()
    answers = answering.answers
    for ours, theirs in zip(answers, answers_on_cpu(reference), strict=True):
        assert_about_as_likely(ours, theirs)
    answering.reload(PROMPTS, weights_path=make(models))
    assert answering.finish_loading().answers == answers
    answering.end()
    if in_other_format is not None:
        assert answers_of(engine, in_other_format(models), {**arguments, **GRAPHS}) == answers


DEEPSEEK_W8A8: dict[str, tuple[Make, dict[str, Any]]] = {
    "of compressed-tensors": (checkpoints.w8a8_deepseek, {}),
    "of ModelSlim, expert parallel": (checkpoints.modelslim_deepseek, {"tensor_parallel_size": 2, **EXPERTS}),
}


@pytest.mark.slow
@pytest.mark.parametrize(("make", "arguments"), DEEPSEEK_W8A8.values(), ids=DEEPSEEK_W8A8.keys())
def test_deepseek_in_w8a8_answers_about_as_without(
    make: Make, arguments: dict[str, Any], engine: Load, answers_on_cpu: Callable[[Make], list[Any]], models: Path
) -> None:
    """In graphs, and the same to the last bit after a reload. Where other experts are chosen, answers differ more."""
    answering = engine("npu", make(models), {**arguments, **GRAPHS}).finish_loading()
    answers = answering.answers
    for ours, theirs in zip(answers, answers_on_cpu(checkpoints.deepseek_v3), strict=True):
        assert_about_as_likely(ours, theirs, within=0.1)
    answering.reload(PROMPTS, weights_path=make(models))
    assert answering.finish_loading().answers == answers


def assert_about_as_likely(ours: list[Any], theirs: list[Any], within: float = 0.05) -> None:
    """Up to where they go on with different tokens, which must be about as likely, too."""
    for (token, likelihood), (other_token, other_likelihood) in zip(ours, theirs, strict=True):
        assert likelihood == pytest.approx(other_likelihood, abs=within)
        if token != other_token:
            return


def test_graphs_are_of_as_many_sizes_as_the_devices_have_streams_for(
    engine: Load, on_cpu: Callable[[Make], list[list[int]]], models: Path
) -> None:
    """The device has fewer streams than the platform reckons with, and both ranks find out by running out of them."""
    sizes = [1, 2, 4, *range(8, 65, 8)]
    graphs = {**GRAPHS, "compilation_config": {"cudagraph_capture_sizes": sizes}}
    answering = engine("few streams", checkpoints.dense(models), {"tensor_parallel_size": 2, **graphs})
    assert tokens(answering.finish_loading().answers) == on_cpu(checkpoints.dense)
    chosen = re.findall(
        r"streams for graphs of (\d+) batch sizes, and no more .*: using these: (.*)", answering.log_text()
    )
    assert len(chosen) == 2, "each rank says so once"
    assert chosen[0] == chosen[1]
    assert 0 < len(chosen[0][1].split(",")) < int(chosen[0][0]) < len(sizes)


def test_data_parallel_replicas_share_experts(
    engine: Load, on_cpu: Callable[[Make], list[list[int]]], models: Path
) -> None:
    """With other prompts each, so that they exchange different numbers of tokens, and one waits for the other.

    Within the caller's process vLLM keeps replicas in step only without asynchronous scheduling.
    """
    model = checkpoints.mixture_of_experts(models)
    arguments = {**EXPERTS, **EAGER, "distributed_executor_backend": "uni", "async_scheduling": False}
    replicas = [
        engine(f"replica {rank}", model, arguments, prompts=prompts)
        for rank, prompts in enumerate((PROMPTS, PROMPTS[:1]))
    ]
    expected = on_cpu(checkpoints.mixture_of_experts)
    assert tokens(replicas[0].finish_loading().answers) == expected
    assert tokens(replicas[1].finish_loading().answers) == expected[:1]


SLEEPERS = {
    "Llama": checkpoints.dense,
    "Qwen3-MoE": checkpoints.mixture_of_experts,
    "Qwen3-MoE in W8A8": checkpoints.w8a8_experts,
}


@pytest.mark.parametrize(
    "make",
    [
        *(pytest.param(make, id=name) for name, make in SLEEPERS.items()),
        pytest.param(checkpoints.deepseek_v3, id="DeepSeek-V3", marks=pytest.mark.slow),
    ],
)
def test_an_engine_sleeps_and_wakes(make: Make, engine: Load, models: Path) -> None:
    """What wakes is as it went to sleep, experts too, which others process a second time (vllm-ascend #12226)."""
    model = make(models)
    sleeper = engine("npu", model, {"enable_sleep_mode": True, **EAGER}).finish_loading()
    answers = sleeper.answers
    sleeper.call("sleep", level=1)
    sleeper.call("wake_up")
    assert sleeper.ask(PROMPTS) == answers
    sleeper.call("sleep", level=1)
    sleeper.call("wake_up", tags=["weights"])
    sleeper.call("wake_up", tags=["kv_cache"])
    assert sleeper.ask(PROMPTS) == answers
    sleeper.call("sleep", level=2)
    sleeper.call("wake_up")
    assert sleeper.ask(PROMPTS) != answers, "at level 2 the weights are not kept"
    sleeper.reload(PROMPTS, weights_path=model)
    assert sleeper.finish_loading().answers == answers


def test_an_engine_without_sleep_mode_says_so(engine: Load, models: Path) -> None:
    awake = engine("npu", checkpoints.dense(models), EAGER).finish_loading()
    awake.process.ask({"call": "sleep", "arguments": {}})
    assert "start it with --enable-sleep-mode" in awake.fails_with()


@pytest.mark.slow
def test_experts_in_four_bits_answer_as_the_same_numbers_in_eight(engine: Load, models: Path) -> None:
    """On two devices that divide each expert. What makes up for halves of activations is rounded once more."""
    arguments = {"tensor_parallel_size": 2, **EAGER}
    found = answers_of(engine, checkpoints.modelslim_four_bits(models), arguments)
    expected = answers_of(engine, checkpoints.w8a8_experts_of_four_bits(models), arguments)
    assert tokens(found) == tokens(expected)


def test_static_layers_after_norms_with_a_bias_answer_nearly_as_the_cpu_without_both(
    engine: Load, on_cpu: Callable[[Make], list[list[int]]], models: Path
) -> None:
    """On two devices, of which one adds the bias of divided layers. Answers of random models part after some tokens."""
    found = tokens(answers_of(engine, checkpoints.modelslim_static(models), {"tensor_parallel_size": 2, **EAGER}))
    expected = on_cpu(checkpoints.dense)
    assert [answer[:3] for answer in found[1:]] == [answer[:3] for answer in expected[1:]]


def answers_of(engine: Load, model: str, arguments: dict[str, Any]) -> list[Any]:
    """With their scores, from an engine that ends, so that the next one finds its process."""
    loader = engine("npu", model, arguments).finish_loading()
    loader.end()
    return loader.answers


POOLING: dict[str, tuple[Make, dict[str, Any]]] = {
    "Qwen3, embeddings": (checkpoints.pooling, {"convert": "embed", **GRAPHS}),
    "Qwen2, classes": (checkpoints.sequence_classifier, EAGER),
    "BERT, embeddings": (checkpoints.encoder_only, GRAPHS),
    "XLM-RoBERTa, embeddings": (checkpoints.multilingual_encoder, EAGER),
    "BERT, scores": (checkpoints.cross_encoder, GRAPHS),
}


@pytest.mark.parametrize(("make", "arguments"), POOLING.values(), ids=POOLING.keys())
def test_a_model_that_pools_answers_as_on_the_cpu(
    make: Make, arguments: dict[str, Any], engine: Load, models: Path
) -> None:
    common = {"runner": "pooling", "skip_tokenizer_init": False, "max_num_batched_tokens": 512}
    ours = engine("npu", make(models), {**arguments, **common})
    expected = engine("cpu", make(models), {**arguments, **common, **EAGER}).finish_loading().answers
    torch.testing.assert_close(torch.tensor(ours.finish_loading().answers), torch.tensor(expected))
