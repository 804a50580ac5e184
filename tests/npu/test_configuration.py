"""What vLLM's configuration becomes on NPUs, and what is refused before anything is loaded."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.vllm import checkpoints
from support.vllm.random_model import make_random_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def configured(models: Path) -> Callable[..., Any]:
    """vLLM's configuration for these engine arguments, of a small Llama if they name no model."""

    def configure(**arguments: Any) -> Any:
        from vllm.engine.arg_utils import EngineArgs

        model = {} if "model" in arguments else {"model": checkpoints.dense(models)}
        return EngineArgs(**{"skip_tokenizer_init": True, **model, **arguments}).create_engine_config()

    return configure


def with_a_sliding_window(root: Path) -> str:
    return str(make_random_model(root / "window", {**checkpoints.DENSE, "sliding_window": 64}, architecture="mistral"))


def with_heads_of_72(root: Path) -> str:
    return str(make_random_model(root / "heads", {**checkpoints.DENSE, "head_dim": 72}, architecture="qwen3"))


def phi2(root: Path) -> str:
    configuration = {**checkpoints.DENSE, "num_key_value_heads": 4, "head_dim": 80}
    return str(make_random_model(root / "own_keys", configuration, architecture="qwen3"))


def with_heads_of_80(root: Path) -> str:
    return str(make_random_model(root / "heads_of_80", {**checkpoints.DENSE, "head_dim": 80}, architecture="qwen3"))


def modern_bert(root: Path) -> str:
    from transformers import ModernBertConfig, ModernBertModel

    directory = root / "modern_bert"
    if not directory.exists():
        sizes = {"vocab_size": 2048, "hidden_size": 128, "intermediate_size": 256}
        tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
        layers = {"num_hidden_layers": 3, "num_attention_heads": 2}
        ModernBertModel(ModernBertConfig(**sizes, **layers, **tokens)).bfloat16().save_pretrained(directory)
    return str(directory)


def gemma2(root: Path) -> str:
    return str(make_random_model(root / "gemma2", checkpoints.DENSE, architecture="gemma2"))


def with_257_experts(root: Path) -> str:
    configuration = {**checkpoints.MOE, "num_experts": 257, "moe_intermediate_size": 16, "num_hidden_layers": 1}
    return str(make_random_model(root / "experts", configuration, architecture="qwen3_moe"))


def compressed_tensors(
    weights: dict[str, Any] | None = None, activations: dict[str, Any] | None = None, **others: Any
) -> Callable[[Path], str]:
    """The configuration of a model in W8A8, with these changes. It has no weights."""
    per_channel = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    per_token = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    group: dict[str, Any] = {"targets": ["Linear"], "weights": {**per_channel, **(weights or {})}}
    if activations is not NOT_QUANTISED:
        group["input_activations"] = {**per_token, **(activations or {})}
    quantisation = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"group_0": group},
        **others,
    }

    def make(root: Path) -> str:
        directory = root / f"compressed-{uuid.uuid4()}"
        directory.mkdir()
        config = json.loads((Path(checkpoints.dense(root)) / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**config, "quantization_config": quantisation}))
        return str(directory)

    return make


def modelslim(changes: dict[str, Any] | None = None) -> Callable[[Path], str]:
    """A model of ModelSlim whose description has these changes. It has no weights."""

    def make(root: Path) -> str:
        source, directory = Path(checkpoints.modelslim(root)), root / f"modelslim-{uuid.uuid4()}"
        directory.mkdir()
        description = json.loads((source / "quant_model_description.json").read_text())
        (directory / "config.json").write_bytes((source / "config.json").read_bytes())
        (directory / "quant_model_description.json").write_text(json.dumps({**description, **(changes or {})}))
        return str(directory)

    return make


def deepseek(heads: int = 4, **changes: Any) -> Callable[[Path], str]:
    """The configuration of a DeepSeek V3 with so many heads and these changes. It has no weights."""

    def make(root: Path) -> str:
        directory = root / f"deepseek-{uuid.uuid4()}"
        directory.mkdir()
        config = json.loads((Path(checkpoints.deepseek_v3(root)) / "config.json").read_text())
        counts = {"num_attention_heads": heads, "num_key_value_heads": heads}
        (directory / "config.json").write_text(json.dumps({**config, **counts, **changes}))
        return str(directory)

    return make


def hybrid(root: Path) -> str:
    """A model of which some layers are Mamba's."""
    from transformers import JambaConfig

    directory = root / "hybrid"
    config = JambaConfig(vocab_size=2048, hidden_size=256, intermediate_size=512, num_hidden_layers=8)
    config.architectures = ["JambaForCausalLM"]
    config.save_pretrained(directory)
    return str(directory)


DOWN = "model.layers.0.mlp.down_proj"
NOT_QUANTISED: dict[str, Any] = {}
PER_GROUP = {"strategy": "group", "group_size": 64}
STATIC = {"strategy": "tensor", "dynamic": False}
FLOAT = {"type": "float"}
NGRAM = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
CONNECTOR = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
ONE_OF_TWO_REPLICAS = {"data_parallel_size": 2, "data_parallel_rank": 0}
REFUSED: dict[str, dict[str, Any]] = {
    "compressed-tensors W4A16 (int) of Linear (there is W8A8 in int8)": {
        "model": compressed_tensors({"num_bits": 4, **PER_GROUP}, NOT_QUANTISED, format="pack-quantized")
    },
    "compressed-tensors W4A8 (int) of Linear": {"model": compressed_tensors({"num_bits": 4})},
    "compressed-tensors W8A8 (float) of Linear": {"model": compressed_tensors(FLOAT, FLOAT, format="float-quantized")},
    "(weights have a scale for each group)": {"model": compressed_tensors(PER_GROUP)},
    "(weights have zero points)": {"model": compressed_tensors({"symmetric": False})},
    "(activations have a zero point for each token)": {"model": compressed_tensors({}, {"symmetric": False})},
    "(activations have a scale for each tensor)": {"model": compressed_tensors({}, {"strategy": "tensor"})},
    "quantised outputs of Linear": {
        "model": compressed_tensors(
            config_groups={
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
                    "input_activations": {"num_bits": 8, "type": "int", **STATIC},
                    "output_activations": {"num_bits": 8, "type": "int", **STATIC},
                }
            }
        )
    },
    "a quantised KV cache (kv_cache_scheme)": {
        "model": compressed_tensors(
            kv_cache_scheme={"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
        )
    },
    f"ModelSlim's kind W4A16 for layers ({DOWN}; there are": {"model": modelslim({f"{DOWN}.weight": "W4A16"})},
    f"ModelSlim's kind W4A8_DYNAMIC for layers ({DOWN};": {"model": modelslim({f"{DOWN}.weight": "W4A8_DYNAMIC"})},
    f"{DOWN} in W8A8 without input_scale, input_offset, quant_bias, deq_scale": {
        "model": modelslim({f"{DOWN}.weight": "W8A8"})
    },
    "a quantised KV cache (quant_model_description.json has kv_cache_type='C8')": {
        "model": modelslim({"kv_cache_type": "C8"})
    },
    "the routes of 257 experts": {"model": with_257_experts, "enable_return_routed_experts": True},
    "quantization 'auto_gptq'": {"model": checkpoints.gptq},
    "quantization 'fp8'": {"quantization": "fp8"},
    "qk_nope_head_dim 64, v_head_dim 64 (there is kv_lora_rank 512, qk_rope_head_dim 64, qk_nope_head_dim 128, ": {
        "model": checkpoints.latent_attention
    },
    "MLA with 12 heads on each device, which must be a power of two, at most 128": {"model": deepseek(heads=12)},
    "MLA with 3 heads on each device": {"model": deepseek(heads=12), "tensor_parallel_size": 4},
    "MLA with 256 heads on each device": {"model": deepseek(heads=256)},
    "MLA in float16 (choose --dtype bfloat16)": {"model": deepseek(), "dtype": "half"},
    "max_num_batched_tokens=65537 with MLA (at most 65536)": {"model": deepseek(), "max_num_batched_tokens": 65537},
    "sparse attention (index_topk)": {"model": deepseek(index_topk=64, index_n_heads=4, index_head_dim=64)},
    "mla_prefill_backend='FLASH_ATTN' (leave the choice to vLLM)": {
        "attention_config": {"mla_prefill_backend": "FLASH_ATTN"}
    },
    "splitting_ops without attention: it is": {
        "model": deepseek(),
        "compilation_config": {"splitting_ops": ["vllm::unified_mla_attention_with_output"]},
    },
    "layers with a state in place of attention": {"model": hybrid},
    "to it); layers of type sliding_attention": {"model": modern_bert, "runner": "pooling"},
    "max_num_seqs=3000 (at most 2048)": {
        "model": checkpoints.encoder_only,
        "runner": "pooling",
        "max_num_seqs": 3000,
        "max_num_batched_tokens": 8192,
    },
    "multimodal models": {"model": checkpoints.encoder_decoder},
    "models whose attention is of type attention_free": {"model": checkpoints.state_space},
    "a sliding window of 64": {"model": with_a_sliding_window},
    "soft-capped attention (attn_logit_softcapping)": {"model": gemma2},
    "layers of type sliding_attention": {"model": gemma2},
    "heads of 72 (on each device: query heads 4, KV heads 2), whose size must be a multiple of 16, at most 256": {
        "model": with_heads_of_72
    },
    "KV heads 4), whose size must be 64 or 128 where no query heads share a KV head": {"model": phi2},
    "heads of 80 (on each device: query heads 1, KV heads 1), whose size must be": {
        "model": with_heads_of_80,
        "tensor_parallel_size": 4,
    },
    "in float16 (choose --dtype bfloat16 where no query heads share": {"model": checkpoints.biased, "dtype": "half"},
    "speculative decoding (speculative_config)": {"speculative_config": NGRAM},
    "LoRA adapters (enable_lora)": {"enable_lora": True},
    "kv_cache_dtype='fp8'": {"kv_cache_dtype": "fp8"},
    "kv_cache_dtype='float16'": {"kv_cache_dtype": "float16"},
    "max_num_seqs=5000 (at most 4096)": {"max_num_seqs": 5000, "max_num_batched_tokens": 8192},
    "KV connectors (kv_transfer_config": {"kv_transfer_config": CONNECTOR},
    "KV connectors (kv_transfer_config, kv_offloading_size)": {"kv_offloading_size": 1},
    "weights offloaded to host memory (cpu_offload_gb": {"cpu_offload_gb": 1},
    "weights offloaded to host memory (cpu_offload_gb, offload_group_size)": {"offload_group_size": 2},
    "prefill_context_parallel_size=2": {"prefill_context_parallel_size": 2},
    "decode_context_parallel_size=2": {"decode_context_parallel_size": 2, "tensor_parallel_size": 4},
    "microbatches (enable_dbo": {"enable_dbo": True},
    "numa_bind without numa_bind_nodes": {"numa_bind": True},
    "mamba_cache_mode='align' (there are no": {"mamba_cache_mode": "align"},
    "all2all_backend='deepep_low_latency'": {"all2all_backend": "deepep_low_latency"},
    "load_format='rfork' (there are auto, ": {"load_format": "rfork"},
    "load_format='fastsafetensors', which reads into": {"load_format": "fastsafetensors"},
    "load_format='tensorizer', which reads into": {"load_format": "tensorizer"},
    "weights that a trainer sends by 'nccl'": {"weight_transfer_config": {}},
    "weights that a trainer sends by 'ipc'": {"weight_transfer_config": {"backend": "ipc"}},
    "watermarks (watermark_config)": {"watermark_config": {"algorithm": "gumbel", "key": 7}},
    "kernels of vllm_c (ir_op_priority takes native, torch_npu)": {"ir_op_priority": {"rms_norm": ["vllm_c"]}},
    "attention to later tokens": {"attention_config": {"use_non_causal": True}},
    "use_inductor_graph_partition: there is no Inductor": {
        "compilation_config": {"use_inductor_graph_partition": True}
    },
    "encoder outputs from elsewhere": {
        "ec_transfer_config": {"ec_connector": "ECExampleConnector", "ec_role": "ec_both"}
    },
    "linear_backend='cutlass'": {"linear_backend": "cutlass"},
    "profiler_config.profiler='torch'": {"profiler_config": {"profiler": "torch", "torch_profiler_dir": "traces"}},
    "ranges of NVTX": {"enable_layerwise_nvtx_tracing": True},
    "communicators that sleep": {"enable_sleep_mode": True, "enable_nccl_comm_suspend": True},
    "sampling in float64": {"use_fp64_gumbel": True},
    "ranks that are replaced while others go on": {
        "model": checkpoints.mixture_of_experts,
        "enable_fault_tolerance": True,
        **ONE_OF_TWO_REPLICAS,
    },
    "sampling divided among ranks": {"enable_batch_sharded_sampling": True, "tensor_parallel_size": 2},
    "moe_backend='triton'": {"moe_backend": "triton"},
    "the attention backend TRITON_ATTN": {"attention_backend": "TRITON_ATTN"},
    "the compilation backend 'inductor'": {"compilation_config": {"backend": "inductor"}},
    "splitting_ops without attention": {"compilation_config": {"splitting_ops": ["vllm::moe_forward"]}},
}


@pytest.mark.parametrize(("words", "arguments"), REFUSED.items(), ids=REFUSED.keys())
def test_what_does_not_work_is_refused_by_name(
    words: str, arguments: dict[str, Any], configured: Callable[..., Any], models: Path
) -> None:
    made = {"model": arguments["model"](models)} if "model" in arguments else {}
    with pytest.raises(ValueError, match="not supported on NPUs") as refusal:
        configured(**{**arguments, **made})
    assert words in str(refusal.value)


def test_everything_that_does_not_work_is_named_at_once(configured: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"speculative decoding .*; LoRA adapters .*; kv_cache_dtype='fp8'"):
        configured(speculative_config=NGRAM, enable_lora=True, kv_cache_dtype="fp8")


def test_batch_invariance_is_refused(configured: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with pytest.raises(ValueError, match=r"not supported on NPUs: answers that do not depend on the batch"):
        configured()


def test_netloader_is_refused_where_its_plugin_is_left_out(
    configured: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER

    assert configured(load_format="netloader").load_config.load_format == "netloader"
    monkeypatch.delitem(_LOAD_FORMAT_TO_MODEL_LOADER, "netloader")
    monkeypatch.setenv("VLLM_PLUGINS", "ascend")
    with pytest.raises(ValueError, match=r"load_format='netloader' \(there are auto.*VLLM_PLUGINS='ascend' leaves"):
        configured(load_format="netloader")


def test_fp32_is_for_the_simulator_only(configured: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms import current_platform

    monkeypatch.setenv("CANN_SIM_FP32", "0")
    with pytest.raises(ValueError, match=r"float32 is not supported on NPUs.*choose --dtype bfloat16"):
        configured(dtype="float32")
    assert str(configured(dtype="half").model_config.dtype) == "torch.float16"
    monkeypatch.setenv("CANN_SIM_FP32", "1")
    assert str(configured(dtype="float32").model_config.dtype) == "torch.float32"
    assert [str(dtype) for dtype in current_platform.supported_dtypes][:2] == ["torch.bfloat16", "torch.float16"]


def test_what_is_not_chosen_suits_an_npu(
    configured: Callable[..., Any], models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "fork")
    config = configured()
    assert config.parallel_config.worker_cls == "vllm_ascend.worker.worker.NPUWorker"
    assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
    assert (config.compilation_config.cudagraph_mode.name, config.compilation_config.backend) == ("PIECEWISE", "eager")
    assert config.kernel_config.ir_op_priority.rms_norm == ["torch_npu", "native"]
    assert not config.use_v2_model_runner
    assert (config.shutdown_timeout, configured(shutdown_timeout=60).shutdown_timeout) == (5, 60)
    assert configured(enforce_eager=True).compilation_config.cudagraph_mode.name == "NONE"
    assert configured(model=with_heads_of_80(models), block_size=128).cache_config.block_size == 128
    assert configured(model=checkpoints.deepseek_v2(models)).model_config.use_mla


@pytest.mark.parametrize(
    "make",
    [checkpoints.w8a8, compressed_tensors({}, STATIC), compressed_tensors({"strategy": "tensor"})],
    ids=["dynamic", "static", "a scale for each matrix"],
)
def test_w8a8_of_compressed_tensors_is_taken(
    make: Callable[[Path], str], configured: Callable[..., Any], models: Path
) -> None:
    config = configured(model=make(models))
    assert config.model_config.quantization == "compressed-tensors"
    assert type(config.quant_config).__name__ == "NPUCompressedTensorsConfig"


@pytest.mark.parametrize("asked", [{}, {"quantization": "ascend"}], ids=["by itself", "asked for"])
def test_modelslims_checkpoints_are_known_by_their_description(
    asked: dict[str, str], configured: Callable[..., Any], models: Path
) -> None:
    config = configured(model=checkpoints.modelslim(models), **asked)
    assert config.model_config.quantization == "ascend"
    assert config.quant_config.description.kind(DOWN) == "W8A8_DYNAMIC"
    assert config.quant_config.description.kind("lm_head") == "FLOAT"


def test_a_configuration_of_the_model_counts_more_than_a_description(
    configured: Callable[..., Any], models: Path
) -> None:
    model = compressed_tensors()(models)
    description = Path(checkpoints.modelslim(models)) / "quant_model_description.json"
    (Path(model) / description.name).write_bytes(description.read_bytes())
    assert configured(model=model).model_config.quantization == "compressed-tensors"


def test_a_model_without_a_description_is_none_of_modelslim(configured: Callable[..., Any]) -> None:
    with pytest.raises(
        ValueError, match="--quantization ascend is for checkpoints of ModelSlim, which have a quant_model"
    ):
        configured(quantization="ascend")


def test_what_is_no_description_is_refused_with_its_model(configured: Callable[..., Any], models: Path) -> None:
    model = modelslim()(models)
    (Path(model) / "quant_model_description.json").write_text("[]")
    with pytest.raises(ValueError, match=rf"{model}: quant_model_description.json holds a list"):
        configured(model=model)


def test_a_choice_of_formats_that_does_not_exist_is_refused(
    configured: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ASCEND_ENABLE_NZ", "true")
    with pytest.raises(ValueError, match=r"VLLM_ASCEND_ENABLE_NZ='true': it is 0, 1 or 2"):
        configured()


def test_the_second_model_runner_is_refused(configured: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(ValueError, match=r"VLLM_USE_V2_MODEL_RUNNER: .* on NPUs set it to 0"):
        configured()


@pytest.mark.parametrize("mode", ["FULL", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE"])
def test_full_graphs_become_piecewise_with_a_notice(mode: str, configured: Callable[..., Any]) -> None:
    with notices() as heard:
        config = configured(compilation_config={"cudagraph_mode": mode})
    assert config.compilation_config.cudagraph_mode.name == "PIECEWISE"
    assert any(f"full graphs (cudagraph_mode={mode}) are not supported on NPUs" in line for line in heard)


def test_sleep_mode_goes_without_graphs_with_a_notice(configured: Callable[..., Any]) -> None:
    with notices() as heard:
        config = configured(enable_sleep_mode=True)
    assert config.compilation_config.cudagraph_mode.name == "NONE"
    assert any("using no graphs" in line for line in heard)


@pytest.mark.parametrize("size", [1, 16, 64, 200, 1024])
def test_a_block_size_that_attention_does_not_take_becomes_128_with_a_notice(
    size: int, configured: Callable[..., Any]
) -> None:
    with notices() as heard:
        assert configured(block_size=size).cache_config.block_size == 128
    assert heard.count(f"the KV cache has no blocks of {size} tokens on NPUs (block_size): using 128") == 1


def test_a_block_size_that_attention_takes_is_used_without_a_word(configured: Callable[..., Any]) -> None:
    with notices() as heard:
        configured(block_size=128)
        configured()
    assert not [line for line in heard if "block" in line]


def test_settings_that_change_nothing_are_named_once(
    configured: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ASCEND_ENABLE_NZ", "2")  # this one is read
    monkeypatch.setenv("VLLM_ASCEND_ENABLE_MLAPO", "1")
    monkeypatch.setenv("DYNAMIC_EPLB", "true")
    with notices() as heard:
        for _ in range(2):
            configured(additional_config={"weight_nz_mode": 2, "scheduler_config": {}})
    about = "additional_config changes nothing on this platform, which reads none of it: "
    assert [line for line in heard if "changes nothing" in line] == [about + "scheduler_config, weight_nz_mode"]
    about = "set and not read by this platform, so they change nothing: "
    assert [line for line in heard if "not read" in line] == [about + "DYNAMIC_EPLB, VLLM_ASCEND_ENABLE_MLAPO"]


def test_the_process_of_the_engine_names_them_no_second_time(configured: Callable[..., Any]) -> None:
    config = configured()
    config.additional_config = {"refresh": True}
    with notices() as heard:
        config.__post_init__()
    assert not [line for line in heard if "changes nothing" in line]


def test_without_such_settings_nothing_is_named(configured: Callable[..., Any]) -> None:
    with notices() as heard:
        configured()
    assert not [line for line in heard if "nothing" in line]


class notices(list[str]):  # noqa: N801
    """What this package logs meanwhile; vLLM keeps its loggers' messages from pytest."""

    def __enter__(self) -> list[str]:
        self._handler = logging.Handler()
        self._handler.emit = lambda record: self.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("vllm_ascend").addHandler(self._handler)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("vllm_ascend").removeHandler(self._handler)


def test_a_deep_model_has_fewer_graphs_than_a_device_has_streams(
    configured: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_ascend import graphs

    def sizes(**arguments: Any) -> list[int]:
        chosen: list[int] = configured(**arguments).compilation_config.cudagraph_capture_sizes
        return chosen

    everything = sizes()
    assert len(everything) > 20
    monkeypatch.setattr(graphs, "STREAMS", 3 * 20)  # the model's two layers make three pieces
    alone, of_two = sizes(), sizes(tensor_parallel_size=2)
    assert (len(alone), len(of_two)) == (20, 10)
    for some in (alone, of_two):
        assert set(some) < set(everything)
        assert (some[0], some[-1]) == (everything[0], everything[-1])
    monkeypatch.setattr(graphs, "STREAMS", 1)
    assert sizes() == everything[-1:]


def test_configuring_makes_no_context_on_a_device(models: Path) -> None:
    script = """
import sys
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
EngineArgs(model=sys.argv[1], skip_tokenizer_init=True, tensor_parallel_size=2).create_engine_config()
assert current_platform.device_count() >= 2 and current_platform.get_device_name()
assert not torch.npu.is_initialized()
"""
    subprocess.run([sys.executable, "-c", script, checkpoints.dense(models)], check=True, timeout=200)


@pytest.mark.parametrize(
    ("soc", "name"),
    [("Ascend310P3", "Ascend 310P (Atlas inference products), number 202"), ("Ascend950PR_9589", "Ascend 950 (A5)")],
)
def test_other_npus_are_refused_by_name(soc: str, name: str, models: Path) -> None:
    script = """
import sys
import torch
from vllm.engine.arg_utils import EngineArgs
try:
    EngineArgs(model=sys.argv[1], skip_tokenizer_init=True).create_engine_config()
except ValueError as refusal:
    assert not torch.npu.is_initialized()
    print(refusal)
"""
    environment = {**os.environ, "CANN_SIM_SOC": soc}
    command = [sys.executable, "-c", script, checkpoints.dense(models)]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=200).stdout
    assert f"this machine's NPUs are {name}" in told
    assert "supported are Atlas A2 (Ascend 910B) and Atlas A3 (Ascend 910_93)" in told


def test_an_old_cann_is_told_from_a_new_one() -> None:
    from vllm_ascend.hardware import is_too_old

    assert [is_too_old(each) for each in ("8.5.0", "9.0.RC1", "9.0.0")] == [True] * 3
    assert [is_too_old(each) for each in ("9.1.0", "9.1.0.alpha002", "9.10.0", "10.0.0", "")] == [False] * 5


def test_an_old_cann_gets_a_warning(configured: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_ascend import hardware

    monkeypatch.setattr(hardware, "OLDEST_CANN", (99, 0))
    with notices() as heard:
        configured()
        configured()
    assert len([line for line in heard if "is older than 99.0" in line]) == 1
