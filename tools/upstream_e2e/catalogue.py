"""What stands in for the models that upstream's tests name.

A model of a kind that this platform runs has random weights (`Weights`). Any other is no more than a configuration
(`Described`): vLLM reads that much before the platform refuses the model. Names of both hubs are in one list.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Tokenizer = Literal["chat", "bert", "roberta"]
Pooling = Literal["", "mean", "cls", "lasttoken"]


@dataclass(frozen=True)
class Weights:
    model_type: str
    auto_class: str = "AutoModelForCausalLM"
    configuration: dict[str, Any] = field(default_factory=dict)
    tokenizer: Tokenizer = "chat"
    pooling: Pooling = ""
    """How sentence-transformers makes one vector of the last layer; empty if the model is not for embeddings."""
    prefers_to_close: bool = False
    """Whether it mostly ends strings, lists and answers: a random model would go on until max_tokens."""


@dataclass(frozen=True)
class Described:
    configuration: dict[str, Any]


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter, of which there is no more than a directory: adapters are refused before one is read."""


Recipe = Weights | Described | Adapter

VOCABULARY = 49152
DENSE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "initializer_range": 0.08,
    "tie_word_embeddings": False,
}
MOE = {**DENSE, "moe_intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True}
LONG_MOE = {**MOE, "max_position_embeddings": 131072}
ENCODER = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.08,
}
ROBERTA = {
    **ENCODER,
    "max_position_embeddings": 8194,  # the first position has the number 2
    "position_embedding_type": "absolute",
    "type_vocab_size": 1,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
ONE_LABEL = {"num_labels": 1}
TWO_LABELS = {**DENSE, "head_dim": 64, "num_labels": 2, "initializer_range": 0.02}
"""Small weights: its answers in bfloat16 are compared with those in float32."""
CLASSIFIER = "AutoModelForSequenceClassification"
MINICPM = {**DENSE, "head_dim": 64, "num_key_value_heads": 4, "dim_model_base": 64, "scale_depth": 1.4, "scale_emb": 12}

QWEN3 = Weights("qwen3", configuration=DENSE)
QWEN3_MOE = Weights("qwen3_moe", configuration=MOE)


def _described(model_type: str, architecture: str, **configuration: Any) -> Described:
    return Described({"model_type": model_type, "architectures": [architecture], **configuration})


QWEN3_DESCRIBED = _described("qwen3", "Qwen3ForCausalLM")
QWEN3_MOE_DESCRIBED = _described("qwen3_moe", "Qwen3MoeForCausalLM")
LLAMA = _described("llama", "LlamaForCausalLM", num_key_value_heads=8, max_position_embeddings=131072, dtype="bfloat16")
DEEPSEEK_V2 = _described("deepseek_v2", "DeepseekV2ForCausalLM")
DEEPSEEK_V3 = _described("deepseek_v3", "DeepseekV3ForCausalLM", num_nextn_predict_layers=1)
QWEN3_5 = _described("qwen3_5", "Qwen3_5ForConditionalGeneration")
QWEN3_5_MOE = _described("qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration")
QWEN3_VL = _described("qwen3_vl", "Qwen3VLForConditionalGeneration")
QWEN3_VL_MOE = _described("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration")
EAGLE3 = _described("llama", "LlamaForCausalLMEagle3", draft_vocab_size=VOCABULARY)

MODELS: dict[str, Recipe] = {
    "BAAI/bge-m3": Weights("xlm-roberta", "AutoModel", ROBERTA, "roberta", "cls"),
    "BAAI/bge-reranker-v2-m3": Weights("xlm-roberta", CLASSIFIER, {**ROBERTA, **ONE_LABEL}, "roberta"),
    "Eco-Tech/Qwen3.5-35B-A3B-w8a8-mtp": QWEN3_5_MOE,
    "Howeee/Qwen2.5-1.5B-apeach": Weights("qwen2", CLASSIFIER, TWO_LABELS),
    "LLM-Research/Meta-Llama-3.1-8B-Instruct": LLAMA,
    "MNN/Qwen3-VL-8B-Instruct-Eagle3": EAGLE3,
    "OpenBMB/MiniCPM4-0.5B": Weights("minicpm", configuration=MINICPM),
    "Qwen/Qwen2-Audio-7B-Instruct": _described("qwen2_audio", "Qwen2AudioForConditionalGeneration"),
    "Qwen/Qwen2-VL-2B-Instruct": _described("qwen2_vl", "Qwen2VLForConditionalGeneration"),
    "Qwen/Qwen2.5-VL-3B-Instruct": _described("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration"),
    "Qwen/Qwen2.5-VL-7B-Instruct": _described("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration"),
    "Qwen/Qwen3-0.6B": QWEN3,
    "Qwen/Qwen3-1.7B": QWEN3_DESCRIBED,
    "Qwen/Qwen3-8B": QWEN3,
    "Qwen/Qwen3-30B-A3B": QWEN3_MOE,
    "Qwen/Qwen3-Coder-30B-A3B-Instruct": QWEN3_MOE_DESCRIBED,
    "Qwen/Qwen3-Embedding-0.6B": Weights("qwen3", "AutoModel", DENSE, pooling="lasttoken"),
    "Qwen/Qwen3-Reranker-0.6B": QWEN3_DESCRIBED,
    "Qwen/Qwen3-VL-4B-Instruct": QWEN3_VL,
    "Qwen/Qwen3-VL-8B-Instruct": QWEN3_VL,
    "Qwen/Qwen3-VL-30B-A3B-Instruct": QWEN3_VL_MOE,
    "Qwen/Qwen3.5-0.8B": QWEN3_5,
    "Qwen/Qwen3.5-4B": QWEN3_5,
    "Qwen/Qwen3.5-35B-A3B": QWEN3_5_MOE,
    "Qwen/Qwen3.6-27B": QWEN3_5,
    "RedHatAI/Qwen3-8B-speculator.eagle3": EAGLE3,
    "allenai/OLMoE-1B-7B-0125-Instruct": _described("olmoe", "OlmoeForCausalLM"),
    "amazon/Qwen3-Coder-30B-A3B-Instruct-P-EAGLE": EAGLE3,
    "amd/PARD-Llama-3.2-1B": LLAMA,
    "charent/self_cognition_Alice": Adapter(),
    "charent/self_cognition_Bob": Adapter(),
    "deepseek-ai/DeepSeek-V2-Lite": DEEPSEEK_V2,
    "deepseek-ai/DeepSeek-V2-Lite-Chat": DEEPSEEK_V2,
    "deepseek-ai/dspark_qwen3_8b_block7": _described("qwen3", "Qwen3DSparkModel"),
    "dengcao/ms-marco-MiniLM-L6-v2": Weights("bert", CLASSIFIER, {**ENCODER, **ONE_LABEL}, "bert"),
    "google/gemma-4-26B-A4B-it": _described("gemma4", "Gemma4ForConditionalGeneration"),
    "intfloat/multilingual-e5-small": Weights("bert", "AutoModel", ENCODER, "bert", "mean"),
    "jeeejeee/llama32-3b-text2sql-spider": Adapter(),
    "meta-llama/Llama-3.2-3B-Instruct": LLAMA,
    "openai-mirror/whisper-large-v3-turbo": _described("whisper", "WhisperForConditionalGeneration"),
    "openbmb/MiniCPM-2B-sft-bf16": Weights("minicpm", configuration=MINICPM),
    "sentence-transformers/all-MiniLM-L12-v2": Weights("bert", "AutoModel", ENCODER, "bert", "mean"),
    "unsloth/gpt-oss-20b-BF16": _described("gpt_oss", "GptOssForCausalLM"),
    "vllm-ascend/DeepSeek-V2-Lite-W8A8": DEEPSEEK_V2,
    "vllm-ascend/DeepSeek-V3-Pruning": DEEPSEEK_V3,
    "vllm-ascend/EAGLE-LLaMA3.1-Instruct-8B": _described("llama", "LlamaForCausalLM"),
    "vllm-ascend/EAGLE3-LLaMA3.1-Instruct-8B": EAGLE3,
    "vllm-ascend/HunyuanOCR": _described("hunyuan_vl", "HunYuanVLForConditionalGeneration"),
    "vllm-ascend/Llama-3.2-3B-Instruct": LLAMA,
    "vllm-ascend/Qwen3-1.7B_eagle3": EAGLE3,
    "vllm-ascend/Qwen3-30B-A3B-W8A8": QWEN3_MOE_DESCRIBED,
    "vllm-ascend/Qwen3-30B-A3B-vwn-eagle-model": EAGLE3,
    "vllm-ascend/Qwen3-8B-W8A8": QWEN3_DESCRIBED,
    "vllm-ascend/ilama-3.2-1B": LLAMA,
    "vllm-ascend/ilama-text2sql-spider": Adapter(),
    "vllm-ascend/olmoe-instruct-text2sql-spider": Adapter(),
    "vllm-ascend/qwen-linear-algebra-coder": Adapter(),
    "vllm-ascend/qwen2-vl-lora-pokemon": Adapter(),
    "vllm-ascend/qwen2.5-3b-vl-lora-vision-connector": Adapter(),
    "vllm-ascend/qwen25-vl-lora-pokemon": Adapter(),
    "vllm-ascend/qwen2vl-flickr-lora-language": Adapter(),
    "vllm-ascend/qwen2vl-flickr-lora-tower": Adapter(),
    "vllm-ascend/qwen2vl-flickr-lora-tower-connector": Adapter(),
    "vllm-ascend/qwen3-4b-vl-lora-vision-connector": Adapter(),
    "vllm-ascend/qwen3-moe-text2sql-spider": Adapter(),
    "vllm-ascend/qwen35-4b-text-only-sql-lora": Adapter(),
    "wemaster/deepseek_mtp_main_random_bf16": DEEPSEEK_V3,
    "z-lab/Qwen3-8B-DFlash-b16": _described("qwen3", "DFlashDraftModel"),
}


@dataclass(frozen=True)
class Group:
    """Tests that need other stand-ins than the rest, or share a server and so a process."""

    folder: str
    """Where they are in the checkout; a file counts, too."""
    models: dict[str, Recipe] = field(default_factory=dict)
    """All that they name, if they need others than the rest."""
    one_process: bool = False
    device_memory: str = "1536M"
    """Of a simulated NPU. vLLM fills most of it with its KV cache, which is host memory: the less, the better."""


GROUPS = [
    # These measure that more than 1.5 GiB of a device become free.
    Group("tests/e2e/pull_request/one_card/rlhf", device_memory="2560M"),
    # Served by a model for images, but all requests of this group are text: their subject is the HTTP interface.
    Group(
        "tests/e2e/weekly/single_node/engine_func_test_robot",
        {"Qwen/Qwen3-VL-30B-A3B-Instruct": Weights("qwen3_moe", configuration=LONG_MOE, prefers_to_close=True)},
        one_process=True,
    ),
    Group(
        "tests/e2e/pull_request/one_card/test_guided_decoding.py",
        {"Qwen/Qwen3-0.6B": Weights("qwen3", configuration=DENSE, prefers_to_close=True)},
    ),
]
