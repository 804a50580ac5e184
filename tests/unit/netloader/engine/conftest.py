from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import (
    destroy_distributed_environment,
    destroy_model_parallel,
    ensure_model_parallel_initialized,
    init_distributed_environment,
)


@pytest.fixture
def groups(tmp_path: Path) -> Iterator[None]:
    """vLLM's parallel groups, of this process alone."""
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{tmp_path}/meeting", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
    yield
    destroy_model_parallel()
    destroy_distributed_environment()
