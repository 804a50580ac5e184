"""vLLM's worker on an NPU: which device it has, and how that sleeps. All else is vLLM's own, from GPUs."""

from __future__ import annotations

import atexit
import contextlib
import gc
import weakref
from typing import Any

import torch
from vllm.model_executor.model_loader import get_model_loader
from vllm.platforms import current_platform
from vllm.platforms.interface import set_assigned_physical_gpu_ids
from vllm.utils.mem_utils import MemorySnapshot
from vllm.utils.torch_utils import set_random_seed
from vllm.v1.worker import gpu_worker
from vllm.v1.worker.utils import request_memory

import vllm_ascend.ops.experts
import vllm_ascend.ops.layers  # noqa: F401
from vllm_ascend.hardware import refuse_other_npus
from vllm_ascend.ops.layout import choose_formats
from vllm_ascend.worker.runner import NPUModelRunner
from vllm_ascend.worker.sleep import KV_CACHE, WEIGHTS, NPUSleepMode, device_tensors


def _warm_no_kernels_up(worker: Any) -> None:
    """In place of what tunes kernels for GPUs, and imports models for them to do so."""


gpu_worker.kernel_warmup = _warm_no_kernels_up


class NPUWorker(gpu_worker.Worker):
    local_rank: int
    _sleep_mode_backend: NPUSleepMode | None

    def init_device(self) -> None:
        # vLLM takes the local rank for the number of the device where it makes groups of processes.
        self.local_rank = _visible_device(self.parallel_config, self.local_rank)
        self.device = torch.device("npu", self.local_rank)
        torch.accelerator.set_device_index(self.device)
        refuse_other_npus()
        choose_formats(self.model_config)
        current_platform.check_if_supports_dtype(self.model_config.dtype)
        gpu_worker.init_worker_distributed_environment(
            self.vllm_config, self.rank, self.distributed_init_method, self.local_rank, current_platform.dist_backend
        )
        set_random_seed(self.model_config.seed)
        gc.collect()
        torch.accelerator.empty_cache()
        outside = get_model_loader(self.load_config).get_external_weight_memory(self.vllm_config)
        self.init_snapshot = MemorySnapshot(device=self.device)
        self.requested_memory = request_memory(self.init_snapshot, self.cache_config, outside)
        self._init_workspace_and_model_runner()
        _run_finalizers_before_torch_npu_ends()
        atexit.register(gc.freeze)  # the end of the interpreter would search all modules for cycles, for seconds

    def _make_model_runner(self) -> NPUModelRunner:
        return NPUModelRunner(self.vllm_config, self.device)

    def _maybe_get_memory_pool_context(self, tag: str) -> contextlib.AbstractContextManager[None]:
        """Sleep mode needs no pools of its own."""
        return contextlib.nullcontext()

    @property
    def sleep_mode_backend(self) -> NPUSleepMode:
        if not self.model_config.enable_sleep_mode:
            raise ValueError("this instance cannot sleep: start it with --enable-sleep-mode")
        if self._sleep_mode_backend is None:
            runner = self.model_runner
            self._sleep_mode_backend = NPUSleepMode(
                {WEIGHTS: lambda: device_tensors([runner.get_model()]), KV_CACHE: lambda: runner.kv_caches}
            )
        return self._sleep_mode_backend


def _run_finalizers_before_torch_npu_ends() -> None:
    """At exit, an engine within this process is shut down by a finalizer, and needs its device for that."""
    run_finalizers: Any = weakref.finalize._exitfunc  # type: ignore[attr-defined]
    atexit.unregister(run_finalizers)
    atexit.register(run_finalizers)  # what is registered last is called first


def _visible_device(parallel: Any, local_rank: int) -> int:
    """The number, among the devices that the process sees, of the one for this rank.

    vLLM's data-parallel engines are told their devices; without that, each replica on a machine takes the next ones.
    """
    if parallel.assigned_physical_gpu_ids is not None:
        set_assigned_physical_gpu_ids(parallel.assigned_physical_gpu_ids)
    elif _devices_are_shared_by_replicas(parallel):
        replica = parallel.data_parallel_rank_local
        local_rank += (parallel.data_parallel_index if replica is None else replica) * parallel.world_size
    device: int = current_platform.logical_device_id_to_visible_device_id(local_rank)
    if device >= torch.accelerator.device_count():
        raise ValueError(
            f"rank {local_rank} of this machine needs an NPU of its own; there are {torch.accelerator.device_count()}"
        )
    return device


def _devices_are_shared_by_replicas(parallel: Any) -> bool:
    launched = parallel.distributed_executor_backend in ("ray", "external_launcher")
    return not launched and parallel.data_parallel_backend != "ray" and parallel.nnodes_within_dp == 1
