"""Whatever tensor a quantised checkpoint lacks, loading it is refused with the name of that tensor.

Models are vLLM's own, made on the meta device, on which nothing is computed.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from support.quantised.files import tensors_of
from support.vllm import checkpoints
from vllm_ascend.quantization.completeness import IncompleteCheckpoint

MAKERS = {
    "compressed-tensors": checkpoints.w8a8,
    "compressed-tensors, static": checkpoints.w8a8_static,
    "experts of compressed-tensors": checkpoints.w8a8_experts,
    "ModelSlim": checkpoints.modelslim,
    "ModelSlim, static": checkpoints.modelslim_static,
    "experts of ModelSlim": checkpoints.modelslim_experts,
    "experts of ModelSlim in four bits": checkpoints.modelslim_four_bits,
}
OF_ALL_PARTS = {("compressed-tensors, static", part) for part in ("input_scale", "input_zero_point")}
"""vLLM has one such value for a fused layer, which any of its parts brings."""


@pytest.fixture(scope="module")
def _one_rank() -> Iterator[None]:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import cleanup_dist_env_and_memory, init_distributed_environment, initialize_model_parallel

    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port = chosen.getsockname()[1]
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"tcp://127.0.0.1:{port}", 0, "gloo")
        initialize_model_parallel()
    yield
    cleanup_dist_env_and_memory()


def made(checkpoint: str) -> Any:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model

    import vllm_ascend.ops.layers  # noqa: F401  norms have biases by it

    config = EngineArgs(model=checkpoint, skip_tokenizer_init=True, dtype="bfloat16").create_engine_config()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            return initialize_model(config)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize("kind", MAKERS)
def test_each_tensor_that_a_checkpoint_lacks_is_named(kind: str, tmp_path: Path) -> None:
    make: Callable[[Path], str] = MAKERS[kind]
    checkpoint = make(tmp_path)
    weights = dict(tensors_of(Path(checkpoint)))
    model = made(checkpoint)
    for missing in (name for name in weights if not re.search(r"experts\.[1-6]\.", name)):
        block, _, part = missing.rsplit(".", 2) if missing.count(".") > 1 else ("", "", "")
        shared = (kind, part) in OF_ALL_PARTS
        lacking = (
            {each for each in weights if each.startswith(f"{block}.") and each.endswith(part)} if shared else {missing}
        )
        with pytest.raises(IncompleteCheckpoint) as refusal:
            model.load_weights((name, tensor) for name, tensor in weights.items() if name not in lacking)
        assert missing in str(refusal.value)
        assert shared or f"has no {missing}, or not" in str(refusal.value)
    model.load_weights(weights.items())
