"""Makes the models of the catalogue, in the layout of the hub's cache.

The tokenizer of generative models is a real one, with a chat template in the manner of Qwen's: answers are gibberish,
but they are text, and what forms requests and answers (chats, tools, grammars) works as with a trained model.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from support.vllm.fetch_model import fetch_model
from tools.upstream_e2e.catalogue import Adapter, Described, Recipe, Weights

COMMIT = "0" * 40
"""The hub names each version of a repository by a commit."""
CLOSING = set('"]}:,')
MOST_TOKENS = 512

CHAT_TEMPLATE = """\
{%- if tools %}
{{- '<|im_start|>system\\nCall one of these functions by <tool_call>{"name": ..., "arguments": ...}</tool_call>:' }}
{%- for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string %}{{ message.content }}
{%- elif message.content %}{% for part in message.content %}{{ part.text }}{% endfor %}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""

MINICPM_CONFIGURATION = """\
from transformers import PretrainedConfig


class MiniCPMConfig(PretrainedConfig):
    model_type = "minicpm"
"""
"""transformers does not know this kind of model, which brings its configuration along."""


def make_cache(home: Path, models: dict[str, Recipe]) -> None:
    """Puts what is missing of `models` into the cache below `home`, which is to be HF_HOME."""
    for name, recipe in models.items():
        repository = home / "hub" / f"models--{name.replace('/', '--')}"
        if (repository / "refs" / "main").is_file():
            continue
        shutil.rmtree(repository, ignore_errors=True)
        snapshot = repository / "snapshots" / COMMIT
        snapshot.mkdir(parents=True)
        make_model(snapshot, recipe)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(COMMIT)


def make_model(directory: Path, recipe: Recipe) -> None:
    match recipe:
        case Adapter():
            write(directory / "adapter_config.json", {"peft_type": "LORA", "r": 8, "target_modules": ["q_proj"]})
        case Described():
            write(directory / "config.json", recipe.configuration)
            _save_chat_tokenizer(directory)
        case Weights():
            if recipe.tokenizer == "chat":
                _save_chat_tokenizer(directory)
            else:
                _save_encoder_tokenizer(directory, recipe.tokenizer, _longest_text(recipe))
            _save_weights(directory, recipe)
            if recipe.pooling:
                _describe_pooling(directory, recipe)


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=1))


def _save_weights(directory: Path, recipe: Weights) -> None:
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    # What vLLM takes for MiniCPM has the names of Llama.
    model_type = "llama" if recipe.model_type == "minicpm" else recipe.model_type
    config = transformers.AutoConfig.for_model(model_type, **recipe.configuration)
    if recipe.tokenizer == "chat":
        config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, 2
    model = getattr(transformers, recipe.auto_class).from_config(config, dtype=torch.bfloat16)
    if recipe.prefers_to_close:
        _prefer_to_close(model, directory)
    model.save_pretrained(directory)
    if recipe.prefers_to_close:
        _limit_answers(directory)
    if recipe.model_type == "minicpm":
        (directory / "configuration_minicpm.py").write_text(MINICPM_CONFIGURATION)
        described = json.loads((directory / "config.json").read_text())
        remote = {"AutoConfig": "configuration_minicpm.MiniCPMConfig"}
        changed = {"model_type": "minicpm", "architectures": ["MiniCPMForCausalLM"], "auto_map": remote}
        write(directory / "config.json", {**described, **changed})


def _prefer_to_close(model: Any, directory: Path) -> None:
    """The first value of every token's embedding becomes large, and the output layer favours by it what closes."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    closing = [
        number
        for number in range(model.config.vocab_size)
        if (text := tokenizer.decode([number])) and set(text) <= CLOSING
    ]
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = 2.0
        model.lm_head.weight[[*closing, tokenizer.eos_token_id], 0] += 1.0


def _limit_answers(directory: Path) -> None:
    """Answers end after MOST_TOKENS, whatever a request asks for: some ask for no limit, and a model may go on."""
    path = directory / "generation_config.json"
    write(path, {**json.loads(path.read_text()), "max_new_tokens": MOST_TOKENS})


def _save_chat_tokenizer(directory: Path) -> None:
    source = Path(fetch_model())
    shutil.copyfile(source / "tokenizer.json", directory / "tokenizer.json")
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings.pop("local_files_only", None)
    write(directory / "tokenizer_config.json", settings)
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    write(directory / "generation_config.json", {"bos_token_id": 1, "eos_token_id": [2], "pad_token_id": 2})


def _longest_text(recipe: Weights) -> int:
    positions: int = recipe.configuration["max_position_embeddings"]
    return positions - 2 if recipe.tokenizer == "roberta" else positions


def _save_encoder_tokenizer(directory: Path, kind: str, longest: int) -> None:
    """A tokenizer of letters, with the special tokens of its kind around one text and between two."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    if kind == "bert":
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        pad, unknown, first, last, mask = special
        single, pair = f"{first} $A {last}", f"{first} $A {last} $B:1 {last}:1"
    else:
        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        first, pad, last, unknown, mask = special
        single, pair = f"{first} $A {last}", f"{first} $A {last} {last} $B {last}"
    letters = [chr(code) for code in range(33, 127)]
    vocabulary = [*special, *letters, *(f"##{letter}" for letter in letters)]
    numbers = {token: number for number, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordPiece(numbers, unk_token=unknown))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [(first, numbers[first]), (last, numbers[last])]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ends)
    names = {"pad_token": pad, "unk_token": unknown, "cls_token": first, "sep_token": last, "mask_token": mask}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=longest, **names).save_pretrained(directory)


def _describe_pooling(directory: Path, recipe: Weights) -> None:
    """What sentence-transformers and vLLM read beside a model for embeddings."""
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    listed = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(modules)
    ]
    write(directory / "modules.json", listed)
    write(directory / "sentence_bert_config.json", {"max_seq_length": _longest_text(recipe)})
    ways = {
        "mean": "pooling_mode_mean_tokens",
        "cls": "pooling_mode_cls_token",
        "lasttoken": "pooling_mode_lasttoken",
    }
    chosen = {way: name == recipe.pooling for name, way in ways.items()}
    write(
        directory / "1_Pooling" / "config.json",
        {"word_embedding_dimension": recipe.configuration["hidden_size"], **chosen},
    )
    (directory / "2_Normalize").mkdir()
