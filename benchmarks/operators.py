"""How many operators a decoder layer of a small Llama and of a small Qwen3-MoE runs on an NPU, in bfloat16 and in W8A8.

    source tools/npu_sim.sh
    python -m benchmarks.operators

Outside of graphs, the host starts each by itself, which takes some microseconds even if it does little. Attention is
one of them, whatever it consists of. What the layers compute with is random.
"""

from __future__ import annotations

import collections
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from support.operators import operators_of
from support.vllm import checkpoints

MODELS: dict[str, Callable[[Path], str]] = {
    "Llama": checkpoints.dense,
    "Qwen3-MoE": checkpoints.mixture_of_experts,
    "Llama in W8A8": checkpoints.w8a8,
    "Qwen3-MoE in W8A8": checkpoints.w8a8_experts,
}
TOKENS = 8


def main() -> None:
    import vllm_ascend

    vllm_ascend.register()
    with tempfile.TemporaryDirectory() as directory:
        for name, make in MODELS.items():
            names = operators_of_a_layer(make(Path(directory)))
            counts = collections.Counter(names).most_common()
            print(f"{name}: {len(names)} operators", *(f"{count:>4} {each}" for each, count in counts), sep="\n")


def operators_of_a_layer(checkpoint: str) -> list[str]:
    from vllm.config import set_current_vllm_config
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.engine.arg_utils import EngineArgs
    from vllm.forward_context import set_forward_context

    arguments = EngineArgs(model=checkpoint, skip_tokenizer_init=True, enforce_eager=True, dtype="bfloat16")
    config = arguments.create_engine_config()
    with set_current_vllm_config(config), config.kernel_config.ir_op_priority.set_priority():
        layer = _layer(config)
        hidden = torch.randn(TOKENS, config.model_config.get_hidden_size(), device="npu", dtype=torch.bfloat16)
        residual, positions = hidden.clone(), torch.arange(TOKENS, device="npu")
        with set_forward_context(None, config, num_tokens=TOKENS):
            names = operators_of(lambda: layer(positions, hidden, residual))
    cleanup_dist_env_and_memory()
    return names


def _layer(config: Any) -> torch.nn.Module:
    """A layer that runs its experts where operators are seen, and not behind one of vLLM's."""
    import torch_npu
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.model_executor.layers.fused_moe.runner import moe_runner
    from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
    from vllm.utils.network_utils import get_open_port

    import vllm_ascend.ops.experts
    import vllm_ascend.ops.layers  # noqa: F401
    from vllm_ascend.ops.layout import choose_formats

    torch_npu.npu.set_device(0)
    choose_formats(config.model_config)
    init_distributed_environment(1, 0, f"tcp://127.0.0.1:{get_open_port()}", 0, "hccl")
    initialize_model_parallel(1)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("npu"):
        model = initialize_model(vllm_config=config)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data.normal_(0, 0.02)
    process_weights_after_loading(model, config.model_config, torch.device("npu"))
    for module in model.modules():
        if isinstance(module, moe_runner.MoERunner):
            module._forward_entry = moe_runner._moe_forward
    layer: torch.nn.Module = model.model.layers[1]
    return layer


if __name__ == "__main__":
    main()
