"""Loads models with a vLLM model loader, one after another in one process, as its standard input asks.

This is vLLM's own worker, or a whole engine where answers are wanted: real configuration, parallel groups, model code,
loader and post-processing. A process that has imported vLLM once loads a small model in a few seconds, a fraction of
what an instance takes to start. The tests and benchmarks use it.

    echo '{"model": "DIR", "extra": {"LISTEN_PORT": 19000}}' | python -m support.vllm.load_models

Each line is one request, a JSON object; each is answered by a line ``{"result": ...}`` or ``{"error": "..."}``. What
was loaded is held, and serves its weights, until the next load or the end of the input.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_CI_ENV", "1")  # no warm-up
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # an engine runs in this process

ANSWER_TOKENS = 16


class Loads:
    """The models that this process holds, and how it comes to hold others."""

    def __init__(self) -> None:
        from vllm.plugins import load_general_plugins

        load_general_plugins()
        _register_kernels_once()
        self._engine: Any = None
        self._others: list[Any] = []
        self._worker: Any = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Does what `request` asks.

        {"model": directory or hub name, ...} loads. Further keys: load_format, extra (the loader's configuration),
        engine (further engine arguments), digests (whether to hash the weights as they are before post-processing),
        rank and init_method (for one process of several that make up an instance), parallel (attributes to set on
        vLLM's parallel configuration, where no engine argument does), prompts (makes a whole engine in this process,
        which answers them), beside (goes on holding the engine that is there, until something is loaded without that).
        A prompt is a list of token ids, {"embedded": token ids} to pass their embeddings, {"choices": texts, "tokens":
        token ids} to have one of these texts as the answer, or, for a speech model, {"tone": ..., "decoder": ...}.
        The result has weight_seconds of `load_weights`, private_bytes that it added to this process, parameter_bytes,
        digests, modules, flags (attributes that loading may set), draft (the same of a draft model), answers, on an
        accelerator device_peak, which is taken of it at most until a model is loaded and processed, and without an
        engine device_bytes, which are taken in the end.

        {"reload": {...}, "prompts": [...]} calls vLLM's `reload_weights` with these arguments on the engine that is
        held; the result has the answers after it. Without prompts it is the worker's own `reload_weights`. With
        "directly" it is the loader's `load_weights` on the model in use.

        With "replace_while_reading": [new, old] a load or a reload that reads the disk finds that the file `new` takes
        the place of `old` after the first tensor.

        {"call": name, "arguments": {...}} calls that method of the engine that is held. {"ask": prompts} lets it
        answer; the result has the answers. {"routes": prompts} lets it answer as well, and the result has the experts
        of each token in each layer, but for the last token of an answer.
        """
        with _replaced_while_reading(*request.get("replace_while_reading", ())):
            return self._answer(request)

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if "call" in request:
            getattr(self._engine, request["call"])(**request.get("arguments", {}))
            return {}
        if "ask" in request:
            return {"answers": answers(self._engine, request["ask"])}
        if "routes" in request:
            outputs = generate(self._engine, request["routes"])
            return {"answers": [output.routed_experts.tolist() for output in outputs]}
        if "reload" in request:
            if "prompts" not in request:
                self._worker.reload_weights(**request["reload"])
                return {}
            method = _load_weights_directly if request.get("directly") else "reload_weights"
            self._engine.collective_rpc(method, kwargs=request["reload"])
            self._engine.reset_prefix_cache()
            return {"answers": answers(self._engine, request["prompts"])}
        if request.get("beside"):
            self._others.append(self._engine)
        else:
            self.drop()
        return self._load(request)

    def drop(self) -> None:
        """Gives up all models, and what vLLM keeps once for a process."""
        from vllm.distributed import cleanup_dist_env_and_memory

        for engine in (self._engine, *self._others):
            if engine is not None:
                engine.llm_engine.engine_core.shutdown()
        if self._worker is not None:
            self._worker.shutdown()
        self._engine = self._worker = None
        self._others.clear()
        cleanup_dist_env_and_memory()
        gc.collect()

    def _load(self, request: dict[str, Any]) -> dict[str, Any]:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.model_executor.model_loader import get_model_loader

        arguments = {
            "model": request["model"],
            "load_format": request.get("load_format", "netloader"),
            "model_loader_extra_config": request.get("extra", {}),
            "enforce_eager": True,
            "max_model_len": 256,
            **request.get("engine", {}),
        }
        vllm_config = EngineArgs(**arguments).create_engine_config()
        loader_class = type(get_model_loader(vllm_config.load_config))
        with _Observer(loader_class, with_digests=request.get("digests", False)) as observer:
            if "prompts" in request:
                from vllm import LLM

                self._engine = LLM(**arguments)
                observer.result["answers"] = answers(self._engine, request["prompts"])
            else:
                for name, value in request.get("parallel", {}).items():
                    setattr(vllm_config.parallel_config, name, value)
                self._worker = _worker(vllm_config, request.get("rank", 0), request.get("init_method"))
                observer.result |= _device_bytes()
        return observer.result


@contextlib.contextmanager
def _replaced_while_reading(*files: str) -> Iterator[None]:
    """os.replace(*files), if there are any, as soon as vLLM's loader has read a tensor from disk."""
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    original = DefaultModelLoader.get_all_weights

    def get_all_weights(loader: Any, *arguments: Any) -> Iterator[Any]:
        weights = original(loader, *arguments)
        for first in weights:
            yield first
            os.replace(*files)
            break
        yield from weights

    if files:
        DefaultModelLoader.get_all_weights = get_all_weights
    try:
        yield
    finally:
        DefaultModelLoader.get_all_weights = original


def _load_weights_directly(worker: Any, weights_path: str) -> None:
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model_loader

    vllm_config = worker.vllm_config
    vllm_config.model_config.model = weights_path
    with set_current_vllm_config(vllm_config):
        get_model_loader(vllm_config.load_config).load_weights(worker.get_model(), vllm_config.model_config)


def _register_kernels_once() -> None:
    """vLLM 0.31 and later replace Triton kernels for every worker, and trip over their own replacements next time."""
    from vllm.platforms import current_platform

    register = getattr(current_platform, "register_triton_kernel_overrides", None)
    if register is not None:
        type(current_platform).register_triton_kernel_overrides = staticmethod(functools.cache(register))


def _worker(vllm_config: Any, rank: int, init_method: str | None) -> Any:
    from vllm.config import set_current_vllm_config
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.utils.network_utils import get_open_port

    worker_class = resolve_obj_by_qualname(vllm_config.parallel_config.worker_cls)
    with set_current_vllm_config(vllm_config):
        init_method = init_method or f"tcp://127.0.0.1:{get_open_port()}"
        worker = worker_class(vllm_config, rank, rank, init_method, is_driver_worker=rank == 0)
        worker.init_device()
        worker.load_model()
    return worker


def _device_bytes() -> dict[str, int]:
    import torch

    if not torch.accelerator.is_available():
        return {}
    for thread in threading.enumerate():
        if thread.name == "netloader-digests":  # it takes a little memory while it reads
            thread.join()
    torch.accelerator.synchronize()  # torch-npu's queue lets go of tensors later than whoever has put them into it
    gc.collect()
    return {"device_bytes": torch.accelerator.memory_allocated()}


def answers(engine: Any, prompts: list[Any]) -> list[Any]:
    """Greedy token ids with their log probabilities, or embeddings or probabilities of classes where `engine` pools."""
    if engine.model_config.runner_type == "pooling":
        if "embed" not in engine.supported_tasks:
            return [output.outputs.probs for output in engine.classify(_inputs(prompts), use_tqdm=False)]
        return [output.outputs.embedding for output in engine.embed(_inputs(prompts), use_tqdm=False)]
    return [
        [[token, logprobs[token].logprob] for token, logprobs in zip(output.token_ids, output.logprobs, strict=True)]
        for output in generate(engine, prompts)
    ]


def generate(engine: Any, prompts: list[Any]) -> list[Any]:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    common: dict[str, Any] = {"temperature": 0, "detokenize": False, "logprobs": 0}
    sampling = [
        SamplingParams(**common, max_tokens=1, structured_outputs=StructuredOutputsParams(choice=prompt["choices"]))
        if "choices" in prompt
        else SamplingParams(**common, max_tokens=ANSWER_TOKENS, ignore_eos=True)
        for prompt in prompts
    ]
    inputs = _inputs(prompts, engine.model_config.model)
    return [output.outputs[0] for output in engine.generate(inputs, sampling, use_tqdm=False)]


def _inputs(prompts: list[Any], model: str = "") -> list[dict[str, Any]]:
    return [_input(prompt, model) for prompt in prompts]


def _input(prompt: Any, model: str) -> dict[str, Any]:
    if isinstance(prompt, list):
        return {"prompt_token_ids": prompt}
    if "choices" in prompt:
        return {"prompt_token_ids": prompt["tokens"]}
    if "embedded" in prompt:
        return {"prompt_embeds": _embeddings(model)[prompt["embedded"]]}
    return _with_audio(prompt)


def _embeddings(model: str) -> Any:
    from safetensors import safe_open

    with safe_open(Path(model, "model.safetensors"), "pt") as file:
        return file.get_tensor("model.embed_tokens.weight")


def _with_audio(prompt: dict[str, Any]) -> dict[str, Any]:
    """{"decoder": token ids, "tone": hertz} is a second of that tone for the encoder of a speech model."""
    import numpy

    audio = numpy.sin(numpy.arange(16000, dtype=numpy.float32) * (2 * numpy.pi * prompt["tone"] / 16000))
    encoder = {"prompt": "", "multi_modal_data": {"audio": (audio, 16000)}}
    return {"encoder_prompt": encoder, "decoder_prompt": {"prompt_token_ids": prompt["decoder"]}}


@contextlib.contextmanager
def _device_peak(result: dict[str, Any]) -> Iterator[None]:
    """Notes what is taken of an accelerator within at most; vLLM itself starts to count anew after each load."""
    import torch

    if not torch.accelerator.is_available():
        yield
        return
    torch.accelerator.reset_peak_memory_stats()
    yield
    result["device_peak"] = torch.accelerator.max_memory_allocated()


class _Observer:
    """Measures a loader's `load_weights` and `load_model` from outside, for as long as it is entered."""

    def __init__(self, loader_class: Any, *, with_digests: bool) -> None:
        self.result: dict[str, Any] = {}
        self._loader_class = loader_class
        self._load_weights, self._load_model = loader_class.load_weights, loader_class.load_model
        self._with_digests = with_digests

    def __enter__(self) -> _Observer:
        originals = self._load_weights, self._load_model

        def load_weights(loader: Any, model: Any, model_config: Any) -> None:
            load = functools.partial(originals[0], loader, model, model_config)
            self._observe(load, model, self._result_of(model_config))

        def load_model(loader: Any, vllm_config: Any, model_config: Any, prefix: str = "") -> Any:
            with _device_peak(self._result_of(model_config)):
                return originals[1](loader, vllm_config, model_config, prefix)

        self._loader_class.load_weights, self._loader_class.load_model = load_weights, load_model
        return self

    def __exit__(self, *_: object) -> None:
        self._loader_class.load_weights, self._loader_class.load_model = self._load_weights, self._load_model

    def _result_of(self, model_config: Any) -> dict[str, Any]:
        if model_config.runner_type != "draft":
            return self.result
        draft: dict[str, Any] = self.result.setdefault("draft", {})
        return draft

    def _observe(self, load_weights: Callable[[], None], model: Any, result: dict[str, Any]) -> None:
        private_before, begun = private_bytes(), time.perf_counter()
        load_weights()
        result["weight_seconds"] = time.perf_counter() - begun
        result["private_bytes"] = private_bytes() - private_before
        result["parameter_bytes"] = sum(each.numel() * each.element_size() for each in model.parameters())
        result["modules"] = [name for name, _ in model.named_modules(remove_duplicate=False)]
        result["flags"] = {name: value for name, value in vars(model).items() if name.startswith("has_own_")}
        if self._with_digests:
            result["digests"] = digests(model)


def digests(model: Any) -> dict[str, str]:
    """Of all parameters and persistent buffers by all their names; none if parameters have no memory."""
    import torch

    if any(parameter.is_meta for parameter in model.parameters()):
        return {}
    return {
        name: hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).cpu().numpy()).hexdigest()
        for name, tensor in model.state_dict().items()
    }


def private_bytes() -> int:
    """Memory that only this process uses; pages shared with a peer do not count."""
    kibibytes = 0
    with open("/proc/self/smaps_rollup", encoding="ascii") as rollup:
        for line in rollup:
            if line.startswith(("Private_Clean:", "Private_Dirty:")):
                kibibytes += int(line.split()[1])
    return kibibytes * 1024


def main() -> None:
    loads = Loads()
    for line in sys.stdin:
        reply: dict[str, Any]
        try:
            reply = {"result": loads.answer(json.loads(line))}
        except Exception as error:
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), flush=True)
    loads.drop()


if __name__ == "__main__":
    main()
