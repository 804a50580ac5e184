"""Loads a model with a vLLM model loader, without an engine around it, and prints what happened as one line of JSON.

This is vLLM's own worker: real configuration, parallel groups, model code, loader and post-processing, in about a third
of the time that an instance takes to start. The tests and benchmarks use it where no answers are needed.

    python tools/load_once.py '{"model": "DIR", "extra": {"LISTEN_PORT": 19000}}' < /dev/null

The specification is the argument; after the result line the process goes on serving until its standard input ends.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_CI_ENV", "1")  # no warm-up
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # an engine runs in this process


def load_once(specification: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Returns the worker, or the engine, which holds the model, and the result.

    `specification`: model (a directory or hub name), load_format, extra (the loader's configuration), engine (further
    engine arguments), digests (whether to hash the parameters as they are before post-processing), rank and init_method
    (for one process of several that make up an instance), prompts (lists of token ids: makes a whole engine in this
    process, which answers them).
    Result: weight_seconds of `load_weights`, private_bytes that it added to this process, parameter_bytes, digests,
    answers (greedy, token ids).
    """
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.plugins import load_general_plugins
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.utils.network_utils import get_open_port

    load_general_plugins()
    arguments = {
        "model": specification["model"],
        "load_format": specification.get("load_format", "netloader"),
        "model_loader_extra_config": specification.get("extra", {}),
        "enforce_eager": True,
        "max_model_len": 256,
        **specification.get("engine", {}),
    }
    vllm_config = EngineArgs(**arguments).create_engine_config()
    loader_class = type(get_model_loader(vllm_config.load_config))
    observer = _Observer(loader_class, with_digests=specification.get("digests", False))
    if "prompts" in specification:
        return _answering_engine(arguments, specification["prompts"], observer)
    worker_class = resolve_obj_by_qualname(vllm_config.parallel_config.worker_cls)
    with set_current_vllm_config(vllm_config):
        rank = specification.get("rank", 0)
        init_method = specification.get("init_method") or f"tcp://127.0.0.1:{get_open_port()}"
        worker = worker_class(vllm_config, rank, rank, init_method, is_driver_worker=rank == 0)
        worker.init_device()
        worker.load_model()
    return worker, observer.result


def _answering_engine(
    arguments: dict[str, Any], prompts: list[list[int]], observer: _Observer
) -> tuple[Any, dict[str, Any]]:
    from vllm import LLM, SamplingParams

    engine = LLM(**arguments)
    sampling = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    observer.result["answers"] = [list(output.outputs[0].token_ids) for output in outputs]
    return engine, observer.result


class _Observer:
    """Measures a loader's `load_weights` from outside."""

    def __init__(self, loader_class: Any, *, with_digests: bool) -> None:
        self.result: dict[str, Any] = {}
        self._with_digests = with_digests
        original = loader_class.load_weights

        def load_weights(loader: Any, model: Any, model_config: Any) -> None:
            self.observe(lambda: original(loader, model, model_config), model)

        loader_class.load_weights = load_weights

    def observe(self, load_weights: Callable[[], None], model: Any) -> None:
        from vllm.model_executor.model_loader.weight_checksum import compute_tensor_digests

        private_before, begun = private_bytes(), time.perf_counter()
        load_weights()
        self.result["weight_seconds"] = time.perf_counter() - begun
        self.result["private_bytes"] = private_bytes() - private_before
        self.result["parameter_bytes"] = sum(each.numel() * each.element_size() for each in model.parameters())
        if self._with_digests:
            self.result["digests"] = compute_tensor_digests(model)


def private_bytes() -> int:
    """Memory that only this process uses; pages shared with a peer do not count."""
    kibibytes = 0
    with open("/proc/self/smaps_rollup", encoding="ascii") as rollup:
        for line in rollup:
            if line.startswith(("Private_Clean:", "Private_Dirty:")):
                kibibytes += int(line.split()[1])
    return kibibytes * 1024


def main() -> None:
    holder, result = load_once(json.loads(sys.argv[1]))
    print(json.dumps(result), flush=True)
    sys.stdin.read()
    if hasattr(holder, "shutdown"):
        holder.shutdown()


if __name__ == "__main__":
    main()
