"""What this platform does not do, told before anything is loaded.

vLLM offers more than has been written for NPUs. What is asked for and missing would fail late, in a worker, or be
ignored; so a configuration is looked through when it is made, and everything that is missing is named at once. What a
configuration does not tell (a layer with ALiBi, how a MoE layer routes) the layers refuse when the model is built.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from vllm import envs

from vllm_ascend.attention.rules import (
    MAX_ENCODER_REQUESTS,
    MAX_MLA_TOKENS,
    MAX_REQUESTS,
    Heads,
    LatentSizes,
    encoder_refusals,
    mla_refusals,
    refusals,
)
from vllm_ascend.quantization import COMPRESSED_TENSORS, MODELSLIM, SUPPORTED

ATTENTION_BACKEND = "CUSTOM"
"""The name that vLLM keeps for backends from elsewhere."""
MOST_RETURNED_EXPERTS = 256
"""vLLM returns the routes among more as uint16, in which NPUs do not compute."""
FOR_GPUS = {"fastsafetensors", "instanttensor", "ipc_cache", "modelexpress", "tensorizer"}
ATTENTION_OPS = {"vllm::unified_attention_with_output"}
MLA_OPS = {"vllm::unified_mla_attention_with_output", "vllm::unified_mla_kv_cache_update"}
"""Where models are split into pieces for graphs; with MLA, writing the cache is an operator of its own."""
PROVIDERS = {"native", "torch_npu"}
"""Of vLLM's IR operators: others are compiled for CPUs and GPUs."""


def refuse_unsupported(vllm_config: Any) -> None:
    """Raises ValueError that names everything in `vllm_config` which does not work on NPUs."""
    reasons = [*_features(vllm_config), *_kernels(vllm_config), *_tools(vllm_config), *_parallelism(vllm_config)]
    if vllm_config.model_config is not None:
        reasons += [*_model(vllm_config), *_experts(vllm_config), *_heads(vllm_config), *_mla(vllm_config)]
    if reasons:
        raise ValueError(f"not supported on NPUs: {'; '.join(reasons)}")


def _features(config: Any) -> Iterator[str]:
    yield from _load_format(config.load_config.load_format)
    if config.speculative_config is not None:
        yield "speculative decoding (speculative_config)"
    if config.lora_config is not None:
        yield "LoRA adapters (enable_lora)"
    if config.kv_transfer_config is not None or config.cache_config.kv_offloading_size is not None:
        yield "KV connectors (kv_transfer_config, kv_offloading_size)"
    if config.ec_transfer_config is not None:
        yield "encoder outputs from elsewhere (ec_transfer_config)"
    if config.offload_config.uva.cpu_offload_gb or config.offload_config.prefetch.offload_group_size:
        yield "weights offloaded to host memory (cpu_offload_gb, offload_group_size)"
    if (transfer := config.weight_transfer_config) is not None:
        yield f"weights that a trainer sends by {transfer.backend!r} (weight_transfer_config)"
    if config.watermark_config is not None:
        yield "watermarks (watermark_config), which need vLLM's model runner V2"
    if envs.VLLM_BATCH_INVARIANT:
        yield "answers that do not depend on the batch (VLLM_BATCH_INVARIANT=1)"


def _kernels(config: Any) -> Iterator[str]:
    kernels = config.kernel_config
    if kernels.moe_backend != "auto":
        yield f"moe_backend={kernels.moe_backend!r} (there is one, 'auto')"
    if kernels.linear_backend != "auto" or kernels.linear_backend_per_quant:
        yield f"linear_backend={kernels.linear_backend!r} (there is one, 'auto')"
    providers = {provider for chosen in vars(kernels.ir_op_priority).values() for provider in chosen}
    if others := sorted(providers - PROVIDERS):
        yield f"kernels of {', '.join(others)} (ir_op_priority takes {', '.join(sorted(PROVIDERS))})"
    if (prefill := config.attention_config.mla_prefill_backend) is not None:
        yield f"mla_prefill_backend={prefill.name!r} (leave the choice to vLLM)"
    if config.attention_config.use_non_causal:
        yield "attention to later tokens (attention_config.use_non_causal)"
    backends = {config.attention_config.backend, *config.attention_config.backend_per_kind.values()} - {None}
    if others := sorted(each.name for each in backends if each.name != ATTENTION_BACKEND):
        yield f"the attention backend {', '.join(others)} (leave the choice to vLLM)"
    compilation = config.compilation_config
    if compilation.backend not in ("", "eager"):
        yield f"the compilation backend {compilation.backend!r} (there is 'eager')"
    if compilation.use_inductor_graph_partition:
        yield "use_inductor_graph_partition: there is no Inductor, and attention would not be left out of graphs"
    attention = MLA_OPS if config.model_config is not None and config.model_config.use_mla else ATTENTION_OPS
    if compilation.splitting_ops and not attention.issubset(compilation.splitting_ops):
        yield "splitting_ops without attention: it is not captured in graphs"


def _tools(config: Any) -> Iterator[str]:
    if config.profiler_config.profiler is not None:
        yield f"profiler_config.profiler={config.profiler_config.profiler!r} (vLLM has none for NPUs)"
    if config.observability_config.enable_layerwise_nvtx_tracing:
        yield "ranges of NVTX (enable_layerwise_nvtx_tracing)"
    if config.parallel_config.enable_fault_tolerance:
        yield "ranks that are replaced while others go on (enable_fault_tolerance)"
    model = config.model_config
    if model is not None and model.enable_nccl_comm_suspend:
        yield "communicators that sleep (enable_nccl_comm_suspend)"
    if model is not None and model.use_fp64_gumbel:
        yield "sampling in float64 (use_fp64_gumbel)"


def _load_format(name: str) -> Iterator[str]:
    """Refuses those that are for GPUs, and one that no loader is registered for, which a worker would find out."""
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER

    if name in FOR_GPUS:
        yield f"load_format={name!r}, which reads into the memory of GPUs"
    if name in _LOAD_FORMAT_TO_MODEL_LOADER:
        return
    plugins = os.environ.get("VLLM_PLUGINS")
    left_out = "" if plugins is None else f"; VLLM_PLUGINS={plugins!r} leaves out what other plugins would add"
    yield f"load_format={name!r} (there are {', '.join(sorted(_LOAD_FORMAT_TO_MODEL_LOADER))}{left_out})"


def _parallelism(config: Any) -> Iterator[str]:
    parallel = config.parallel_config
    if parallel.prefill_context_parallel_size > 1:
        yield f"prefill_context_parallel_size={parallel.prefill_context_parallel_size}"
    if parallel.decode_context_parallel_size > 1:
        yield f"decode_context_parallel_size={parallel.decode_context_parallel_size}"
    if parallel.enable_batch_sharded_sampling:
        yield "sampling divided among ranks (enable_batch_sharded_sampling), which needs vLLM's model runner V2"
    if parallel.enable_dbo or parallel.ubatch_size > 1:
        yield "microbatches (enable_dbo, ubatch_size)"
    if parallel.enable_eplb or parallel.enable_elastic_ep:
        yield "experts that move (enable_eplb, enable_elastic_ep)"
    if parallel.all2all_backend != "allgather_reducescatter":
        yield f"all2all_backend={parallel.all2all_backend!r} (there is 'allgather_reducescatter')"
    if parallel.numa_bind and parallel.numa_bind_nodes is None:
        yield "numa_bind without numa_bind_nodes (vLLM finds out the nodes of GPUs only)"


def _model(config: Any) -> Iterator[str]:
    model, cache = config.model_config, config.cache_config
    yield from _quantisation(model.quantization, config.quant_config)
    if model.is_hybrid:
        yield "layers with a state in place of attention, as Mamba's"
    if model.multimodal_config is not None:
        yield "multimodal models"
    if model.attn_type not in {"decoder", "encoder_only"}:
        yield f"models whose attention is of type {model.attn_type}"
    if model.get_sliding_window() is not None:
        yield f"a sliding window of {model.get_sliding_window()} (disable_sliding_window shortens max_model_len to it)"
    if windowed := sorted(set(getattr(model.hf_text_config, "layer_types", None) or ()) - {"full_attention"}):
        yield f"layers of type {', '.join(windowed)}"
    if getattr(model.hf_text_config, "attn_logit_softcapping", None) is not None:
        yield "soft-capped attention (attn_logit_softcapping)"
    if cache.cache_dtype not in ("auto", str(model.dtype).removeprefix("torch.")):
        yield f"kv_cache_dtype={cache.cache_dtype!r} (it is that of the model, {model.dtype})"
    if cache.mamba_cache_mode != "none":
        yield f"mamba_cache_mode={cache.mamba_cache_mode!r} (there are no models with Mamba layers)"
    most = MAX_ENCODER_REQUESTS if model.attn_type == "encoder_only" else MAX_REQUESTS
    if (requests := config.scheduler_config.max_num_seqs) > most:
        yield f"max_num_seqs={requests} (at most {most})"


def _quantisation(name: str | None, config: Any) -> Iterator[str]:
    if name is None:
        return
    if name not in SUPPORTED:
        yield f"quantization {name!r}"
    if name == COMPRESSED_TENSORS:
        from vllm_ascend.quantization.compressed_tensors import refusals as compressed_tensors_refusals

        yield from compressed_tensors_refusals(config)
    if name == MODELSLIM:
        from vllm_ascend.quantization.modelslim import refusals as modelslim_refusals

        yield from modelslim_refusals(config)


def _experts(config: Any) -> Iterator[str]:
    experts = config.model_config.get_num_experts()
    if config.aux_output_config.enabled and experts > MOST_RETURNED_EXPERTS:
        yield f"the routes of {experts} experts (enable_return_routed_experts: at most {MOST_RETURNED_EXPERTS})"


def _heads(config: Any) -> Iterator[str]:
    model, parallel = config.model_config, config.parallel_config
    if model.use_mla or model.attn_type not in {"decoder", "encoder_only"}:
        return  # refused, or asked by `_mla`
    heads = Heads(
        size=model.get_head_size(),
        queries=model.get_num_attention_heads(parallel),
        key_values=model.get_num_kv_heads(parallel),
    )
    yield from (encoder_refusals if model.attn_type == "encoder_only" else refusals)(heads, model.dtype)


def _mla(config: Any) -> Iterator[str]:
    model = config.model_config
    if not model.use_mla:
        return
    text = model.hf_text_config
    if getattr(text, "index_topk", None) is not None:
        yield "sparse attention (index_topk)"
    sizes = LatentSizes(*(getattr(text, name, 0) for name in LatentSizes.__dataclass_fields__))
    yield from mla_refusals(sizes, model.get_num_attention_heads(config.parallel_config), model.dtype)
    if (tokens := config.scheduler_config.max_num_batched_tokens) > MAX_MLA_TOKENS:
        yield f"max_num_batched_tokens={tokens} with MLA (at most {MAX_MLA_TOKENS})"
