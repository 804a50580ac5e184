"""Small checkpoints with random weights, one for each kind of model, made on the spot.

Each function makes its checkpoint in a directory of that name under `root` unless it is there, and returns the path.
Formats that transformers does not write are written here, tensor by tensor; the names and layouts are those that vLLM's
loaders for them read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from support.quantised.kinds import make_quantised
from support.vllm.random_model import SMALL, make_random_model

Tensors = Mapping[str, torch.Tensor]

DENSE = {**SMALL, "num_hidden_layers": 2, "tie_word_embeddings": False}
MOE = {**DENSE, "moe_intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 2}
MLA = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 512,  # this and the 64 are what the CPU backend's attention kernel takes
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 512,
}
DEEPSEEK = {
    **MLA,
    "num_attention_heads": 4,
    "qk_nope_head_dim": 128,  # and this and the next are what NPUs' operators take
    "v_head_dim": 128,
    "n_routed_experts": 16,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 3,
}
STRETCHED = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
"""The positions of DeepSeek's models. Others than stretched ones vLLM's CPU backend turns wrongly in eager mode."""
WIDE = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "moe_intermediate_size": 256}
"""Makes matrices too large for Netloader to keep copies of most of them, as it does of small ones."""
LARGE = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 16,
    "head_dim": 128,
    "moe_intermediate_size": 1024,
    "num_experts": 8,
}
"""Makes about 100 MB of quantised matrices, beside which a few megabytes of the device do not show."""
ODD = {"hidden_size": 272, "intermediate_size": 80, "moe_intermediate_size": 80, "num_experts": 6}
"""Of matrices with these sizes some, and some halves of them, do not consist of whole blocks of FRACTAL_NZ."""
GROUP = 64
"""How many weights share a scale in the 4-bit formats."""


def dense(root: Path) -> str:
    return str(make_random_model(root / "dense", DENSE))


def dense_with_words(root: Path) -> str:
    """The model of `dense`, with a tokenizer."""
    directory = make_random_model(root / "dense_with_words", DENSE)
    return save_tokenizer(directory)


def dense_retrained(root: Path) -> str:
    """A checkpoint with the layout of `dense` and other weights."""
    return str(make_random_model(root / "dense_retrained", DENSE, seed=1))


def tied(root: Path) -> str:
    return str(make_random_model(root / "tied", {**DENSE, "tie_word_embeddings": True}, architecture="qwen3"))


def tied_with_a_head(root: Path) -> str:
    """Its configuration says that embeddings are tied, and its checkpoint has a head of its own."""
    directory = make_random_model(root / "tied_with_a_head", DENSE, architecture="qwen3")
    _change_config(directory, {"tie_word_embeddings": True})
    return str(directory)


def tied_retrained(root: Path) -> str:
    configuration = {**DENSE, "tie_word_embeddings": True}
    return str(make_random_model(root / "tied_retrained", configuration, architecture="qwen3", seed=1))


def biased(root: Path) -> str:
    """A model whose layer norms and linear layers have biases, and whose positions are learnt."""
    configuration = {"vocab_size": 2048, "n_embd": 256, "n_layer": 2, "n_head": 4, "n_positions": 512}
    return str(make_random_model(root / "biased", configuration, architecture="gpt2"))


def state_space(root: Path) -> str:
    """A model that computes with a view of its convolution's weight."""
    configuration = {
        "vocab_size": 2048,
        "hidden_size": 256,
        "num_hidden_layers": 2,
        "state_size": 16,
        "conv_kernel": 4,
        "time_step_rank": 16,
    }
    return str(make_random_model(root / "state_space", configuration, architecture="mamba"))


def mixture_of_experts(root: Path) -> str:
    return str(make_random_model(root / "mixture_of_experts", MOE, architecture="qwen3_moe"))


def mixture_of_experts_retrained(root: Path) -> str:
    return str(make_random_model(root / "mixture_of_experts_retrained", MOE, architecture="qwen3_moe", seed=1))


def latent_attention(root: Path) -> str:
    configuration = {**MLA, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "topk_method": "greedy"}
    return str(make_random_model(root / "latent_attention", configuration, architecture="deepseek_v2"))


def latent_attention_retrained(root: Path) -> str:
    configuration = {**MLA, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "topk_method": "greedy"}
    return str(
        make_random_model(root / "latent_attention_retrained", configuration, architecture="deepseek_v2", seed=1)
    )


def latent_attention_with_mtp(root: Path) -> str:
    """DeepSeek-V3 with one layer for multi-token prediction, whose weights vLLM loads as a draft model."""
    directory = root / "latent_attention_with_mtp"
    if directory.exists():
        return str(directory)
    configuration = {**MLA, "q_lora_rank": 128, "n_group": 2, "topk_group": 1}
    make_random_model(directory, configuration, architecture="deepseek_v3")
    tensors = load_file(directory / "model.safetensors")
    last, extra = "model.layers.1.", "model.layers.2."
    tensors |= {name.replace(last, extra): tensor.clone() for name, tensor in tensors.items() if name.startswith(last)}
    hidden = MLA["hidden_size"]
    ones = {name: torch.ones(hidden) for name in ("enorm.weight", "hnorm.weight", "shared_head.norm.weight")}
    added = {
        **ones,
        "eh_proj.weight": _random(hidden, 2 * hidden),
        "shared_head.head.weight": tensors["lm_head.weight"].clone(),
        "embed_tokens.weight": tensors["model.embed_tokens.weight"].clone(),
    }
    tensors |= {extra + name: tensor.bfloat16() for name, tensor in added.items()}
    _save(directory, tensors)
    routing = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "routed_scaling_factor": 1.0}
    _change_config(directory, {**routing, "norm_topk_prob": True, "num_nextn_predict_layers": 1})
    return str(directory)


def deepseek_v2(root: Path) -> str:
    """With heads as the real one has them, and experts in groups, whose scores are not normalised."""
    directory = root / "deepseek_v2"
    if not directory.exists():
        routing = {"topk_method": "group_limited_greedy", "norm_topk_prob": False, "routed_scaling_factor": 2.0}
        make_random_model(directory, {**DEEPSEEK, **routing, "q_lora_rank": None}, architecture="deepseek_v2")
        _change_config(directory, {"rope_parameters": STRETCHED})
    return str(directory)


def deepseek_v3(root: Path) -> str:
    """As the real one: queries of low rank, and sigmoid scores with a correction bias."""
    directory = root / "deepseek_v3"
    if directory.exists():
        return str(directory)
    configuration = {**DEEPSEEK, "q_lora_rank": 128, "norm_topk_prob": True, "routed_scaling_factor": 2.5}
    make_random_model(directory, configuration, architecture="deepseek_v3")
    tensors = load_file(directory / "model.safetensors")
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    tensors[bias] = torch.rand(len(tensors[bias]), generator=torch.Generator().manual_seed(0)) / 4
    _save(directory, tensors)
    _change_config(directory, {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "rope_parameters": STRETCHED})
    return str(directory)


def encoder_only(root: Path) -> str:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=2048, hidden_size=256, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512
    )
    return _saved(root / "encoder_only", lambda: BertModel(config))


def multilingual_encoder(root: Path) -> str:
    """An XLM-RoBERTa, whose positions begin behind that of the padding token, with its head size of 64."""
    from transformers import XLMRobertaConfig, XLMRobertaModel

    config = XLMRobertaConfig(
        vocab_size=2048,
        hidden_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=514,
        type_vocab_size=1,
        position_embedding_type="absolute",  # as the real ones say
    )
    return _saved(root / "multilingual_encoder", lambda: XLMRobertaModel(config))


def cross_encoder(root: Path) -> str:
    """A BERT with a score for pairs of texts and a head size of 32, as the small rerankers have."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=2048,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        num_labels=1,
        initializer_range=0.2,
    )
    return _saved(root / "cross_encoder", lambda: BertForSequenceClassification(config))


def minicpm(root: Path) -> str:
    """A Llama that scales its embeddings, residuals and logits, in which each query head has a KV head of its own."""
    directory = root / "minicpm"
    if not directory.exists():
        make_random_model(directory, {**DENSE, "num_key_value_heads": 4})
        scales = {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 64}
        _change_config(directory, {"architectures": ["MiniCPMForCausalLM"], **scales})
    return str(directory)


def sequence_classifier(root: Path) -> str:
    """A decoder with a head for three classes, as fine-tuned classifiers have it."""
    from transformers import Qwen2Config, Qwen2ForSequenceClassification

    configuration = {name: value for name, value in DENSE.items() if name != "head_dim"}
    config = Qwen2Config(**configuration, num_labels=3, pad_token_id=0, initializer_range=0.2)
    return _saved(root / "sequence_classifier", lambda: Qwen2ForSequenceClassification(config))


def pooling(root: Path) -> str:
    """A decoder that gives embeddings in place of tokens."""
    directory = make_random_model(root / "pooling", DENSE, architecture="qwen3")
    save_tokenizer(directory)
    return str(directory)


def reranker(root: Path) -> str:
    """A decoder of which vLLM makes a classifier, and whose head is the embedding."""
    directory = make_random_model(root / "reranker", {**DENSE, "tie_word_embeddings": True}, architecture="qwen3")
    save_tokenizer(directory)
    return str(directory)


def encoder_decoder(root: Path) -> str:
    """A model for speech to text: an audio encoder, and a decoder with cross attention."""
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

    directory = root / "encoder_decoder"
    if directory.exists():
        return str(directory)
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=2048,
        d_model=256,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=256,
        decoder_ffn_dim=256,
        decoder_start_token_id=5,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    WhisperForConditionalGeneration(config).bfloat16().save_pretrained(directory)
    WhisperFeatureExtractor().save_pretrained(directory)
    save_tokenizer(directory)
    return str(directory)


def w8a8(root: Path) -> str:
    """`dense` in compressed-tensors' int8, with a scale per output channel and activations quantised per token."""
    return make_quantised("compressed-tensors-w8a8", Path(dense(root)), root / "w8a8")


def w8a8_wide(root: Path) -> str:
    """As `w8a8`, with larger matrices."""
    source = make_random_model(root / "dense_wide", {**DENSE, **{key: WIDE[key] for key in WIDE if key in DENSE}})
    return make_quantised("compressed-tensors-w8a8", source, root / "w8a8_wide")


def w8a8_large(root: Path) -> str:
    """As `w8a8`, with about 100 MB."""
    source = make_random_model(root / "large", {**DENSE, **{key: LARGE[key] for key in LARGE if key in DENSE}})
    return make_quantised("compressed-tensors-w8a8", source, root / "w8a8_large")


def w8a8_large_experts(root: Path) -> str:
    """As `w8a8_experts`, with about 150 MB."""
    source = make_random_model(root / "large_experts", {**MOE, **LARGE}, architecture="qwen3_moe")
    return make_quantised("compressed-tensors-w8a8", source, root / "w8a8_large_experts")


def w8a8_odd_experts(root: Path) -> str:
    """As `w8a8_experts`, with sizes that FRACTAL_NZ does not fit everywhere."""
    source = make_random_model(root / "odd_experts", {**MOE, **ODD}, architecture="qwen3_moe")
    return make_quantised("compressed-tensors-w8a8", source, root / "w8a8_odd_experts")


def w8a8_static(root: Path) -> str:
    """`dense` in compressed-tensors' int8, with a static scale and a zero point for the activations of each layer."""
    return make_quantised("compressed-tensors-w8a8-static", Path(dense(root)), root / "w8a8_static")


def w8a8_experts(root: Path) -> str:
    return make_quantised("compressed-tensors-w8a8", Path(mixture_of_experts(root)), root / "w8a8_experts")


def w8a8_experts_wide(root: Path) -> str:
    """As `w8a8_experts`, with larger matrices."""
    source = make_random_model(root / "experts_wide", {**MOE, **WIDE}, architecture="qwen3_moe")
    return make_quantised("compressed-tensors-w8a8", source, root / "w8a8_experts_wide")


def w8a8_deepseek(root: Path) -> str:
    return make_quantised("compressed-tensors-w8a8", Path(deepseek_v3(root)), root / "w8a8_deepseek")


def modelslim_deepseek(root: Path) -> str:
    """As ModelSlim quantises the real one: attention is static, but for one layer in float, and experts are dynamic."""
    return make_quantised("modelslim-w8a8", Path(deepseek_v3(root)), root / "modelslim_deepseek")


def modelslim(root: Path) -> str:
    """The numbers of `w8a8`, as ModelSlim writes them."""
    return make_quantised("modelslim-w8a8-dynamic", Path(dense(root)), root / "modelslim")


def modelslim_odd(root: Path) -> str:
    """Static, with sizes that FRACTAL_NZ does not fit everywhere."""
    source = make_random_model(root / "odd", {**DENSE, **{key: ODD[key] for key in ODD if key in DENSE}})
    return make_quantised("modelslim-w8a8", source, root / "modelslim_odd")


def modelslim_experts(root: Path) -> str:
    """The numbers of `w8a8_experts`, as ModelSlim writes them."""
    source = Path(mixture_of_experts(root))
    return make_quantised("modelslim-w8a8-dynamic", source, root / "modelslim_experts")


def modelslim_static(root: Path) -> str:
    """Of both ages: with norms that have a bias, and one layer that is not quantised."""
    source, left_out = Path(dense(root)), ("layers.1.mlp.down_proj",)
    return make_quantised("modelslim-w8a8", source, root / "modelslim_static", older=True, left_out=left_out)


def modelslim_four_bits(root: Path) -> str:
    """Experts in 4 bits, between attention in 8."""
    return make_quantised("modelslim-w4a8", Path(mixture_of_experts(root)), root / "modelslim_four_bits")


def w8a8_experts_of_four_bits(root: Path) -> str:
    """The numbers of `modelslim_four_bits`, one in each byte, as compressed-tensors writes them."""
    source = Path(mixture_of_experts(root))
    return make_quantised("compressed-tensors-w8a8-coarse", source, root / "w8a8_experts_of_four_bits")


def gptq(root: Path) -> str:
    """A checkpoint with the layout of GPTQ's 4-bit checkpoints and random values."""
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}

    def quantise(weight: torch.Tensor) -> Tensors:
        rows, columns = weight.shape
        return {
            "qweight": _random_int32(columns // 8, rows),
            "qzeros": torch.full((columns // GROUP, rows // 8), 0x77777777, dtype=torch.int32),
            "scales": _random(columns // GROUP, rows).abs(),
            "g_idx": torch.arange(columns, dtype=torch.int32) // GROUP,
        }

    return _quantised(root, "gptq", quantization, quantise)


def awq(root: Path) -> str:
    """A checkpoint with the layout of AWQ's 4-bit checkpoints and random values."""
    quantization = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}

    def quantise(weight: torch.Tensor) -> Tensors:
        rows, columns = weight.shape
        return {
            "qweight": _random_int32(columns, rows // 8),
            "qzeros": _random_int32(columns // GROUP, rows // 8),
            "scales": _random(columns // GROUP, rows).abs(),
        }

    return _quantised(root, "awq", quantization, quantise)


def eagle_draft(root: Path) -> str:
    """An EAGLE head for `dense`. It has an embedding of its own, which vLLM notes while it loads it."""
    directory = root / "eagle_draft"
    if directory.exists():
        return str(directory)
    target = Path(dense(root))
    hidden, vocabulary = DENSE["hidden_size"], DENSE["vocab_size"]
    first = "model.layers.0."
    tensors = {
        name.removeprefix("model."): tensor
        for name, tensor in load_file(target / "model.safetensors").items()
        if name.startswith(first) and "input_layernorm" not in name
    }
    tensors |= {"fc.weight": _random(hidden, 2 * hidden), "embed_tokens.weight": _random(vocabulary, hidden)}
    directory.mkdir()
    _save(directory, tensors)
    (directory / "config.json").write_bytes((target / "config.json").read_bytes())
    _change_config(directory, {"num_hidden_layers": 1})
    return str(directory)


def _quantised(root: Path, name: str, quantization: dict[str, Any], quantise: Callable[[torch.Tensor], Tensors]) -> str:
    directory, plain = root / name, Path(dense(root))
    if directory.exists():
        return str(directory)
    tensors: dict[str, torch.Tensor] = {}
    for tensor_name, tensor in load_file(plain / "model.safetensors").items():
        if tensor_name.endswith("proj.weight"):
            layer = tensor_name.removesuffix("weight")
            tensors |= {layer + part: value for part, value in quantise(tensor).items()}
        else:
            tensors[tensor_name] = tensor
    directory.mkdir()
    _save(directory, tensors)
    (directory / "config.json").write_bytes((plain / "config.json").read_bytes())
    _change_config(directory, {"quantization_config": quantization})
    return str(directory)


def _save(directory: Path, tensors: Tensors) -> None:
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, directory / "model.safetensors", metadata={"format": "pt"})


def _saved(directory: Path, make: Callable[[], Any]) -> str:
    """Saves a model that `make` gives random weights, in bfloat16 and with a tokenizer, unless it is there."""
    if not directory.exists():
        torch.manual_seed(0)
        make().bfloat16().save_pretrained(directory)
        save_tokenizer(directory)
    return str(directory)


def _change_config(directory: Path, changes: dict[str, Any]) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def save_tokenizer(directory: Path, words: list[str] | None = None) -> str:
    """Saves a tokenizer whose words have their numbers in order: some engines need one, even if only ids are asked."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    numbers = {word: number for number, word in enumerate(words or [f"t{number}" for number in range(2048)])}
    special = {"pad_token": "t0", "eos_token": "t1", "bos_token": "t2", "unk_token": "t3"}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="t3"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(directory)
    return str(directory)


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).mul(0.02).bfloat16()


def _random_int32(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(-(1 << 31), 1 << 31, shape, generator=generator).to(torch.int32)
