"""vLLM's platform for Ascend NPUs: what differs from a GPU, answered hook by hook.

The worker and the model runner are vLLM's own, which know devices through `torch.accelerator` and this class. What they
still call `torch.cuda` is mapped in `worker.runner`. Models are computed by torch_npu's operators without a compiler of
kernels: vLLM's compilation stops at splitting a model into pieces, which run as they are, or as captured graphs.

Processes that only configure or schedule ask the class methods too, so these must not make a context on a device.
"""

from __future__ import annotations

import functools
import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

import torch
import torch_npu
import vllm
from vllm.platforms.interface import Platform, PlatformEnum

from vllm_ascend import envs, versions
from vllm_ascend.compatibility import choose_block_size, name_what_is_not_read
from vllm_ascend.graphs import choose_graphs
from vllm_ascend.hardware import refuse_other_npus, warn_of_old_cann
from vllm_ascend.limits import refuse_unsupported
from vllm_ascend.quantization import COMPRESSED_TENSORS, SUPPORTED

if TYPE_CHECKING:
    from torch._C._distributed_c10d import PrefixStore
    from torch.distributed import ProcessGroup

SHUTDOWN_SECONDS: Final = 5
"""What a server's engine has to end in, where vLLM's default is to kill it at once: as on XPUs, so that it leaves its
groups and its device itself. Requests under way go on meanwhile."""


class NPUPlatform(Platform):
    _enum = PlatformEnum.OOT
    device_name = "npu"
    device_type = "npu"
    dispatch_key = "PrivateUse1"
    ray_device_key = "NPU"
    dist_backend = "hccl"
    device_control_env_var = "ASCEND_RT_VISIBLE_DEVICES"
    ray_noset_device_env_vars = ("RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES",)
    simple_compile_backend = "eager"

    @property
    def supported_dtypes(self) -> list[torch.dtype]:
        half = [torch.bfloat16, torch.float16]
        return [*half, torch.float32] if envs.fp32() else half

    @classmethod
    def check_if_supports_dtype(cls, dtype: torch.dtype) -> None:
        if dtype not in cls().supported_dtypes:
            raise ValueError(
                f"{dtype} is not supported on NPUs, whose fused attention computes in float16 and bfloat16: "
                f"choose --dtype bfloat16"
            )

    @classmethod
    def verify_quantization(cls, quant: str) -> None:
        """Raises ValueError for other kinds than those of `vllm_ascend.quantization`. vLLM asks before it uses one."""
        if quant not in SUPPORTED:
            raise ValueError(
                f"quantization {quant!r} is not supported on NPUs: use a checkpoint of {' or '.join(SUPPORTED)}, or "
                f"one in bfloat16 or float16"
            )
        if quant == COMPRESSED_TENSORS:
            import vllm_ascend.quantization.compressed_tensors  # noqa: F401  registers itself

    # The device

    @classmethod
    def set_device(cls, device: torch.device) -> None:
        torch_npu.npu.set_device(device)

    @classmethod
    def device_count(cls) -> int:
        return int(torch_npu.npu.device_count())

    @classmethod
    def manual_seed_all(cls, seed: int) -> None:
        torch_npu.npu.manual_seed_all(seed)

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        return str(torch_npu.npu.get_device_name(device_id))

    @classmethod
    def get_device_total_memory(cls, device_id: int = 0) -> int:
        """Raises RuntimeError in a process that does not use NPUs, which vLLM takes for an unknown size."""
        if not torch_npu.npu.is_initialized():
            raise RuntimeError("asking an NPU for its memory would make a context on it")
        return int(torch_npu.npu.get_device_properties(device_id).total_memory)

    @classmethod
    def get_current_memory_usage(cls, device: torch.types.Device | None = None) -> float:
        torch_npu.npu.reset_peak_memory_stats(device)
        return float(torch_npu.npu.max_memory_allocated(device))

    @classmethod
    def num_compute_units(cls, device_id: int = 0) -> int:
        return int(torch_npu.npu.get_device_properties(device_id).cube_core_num)

    # Configuration

    @classmethod
    def pre_register_and_update(cls, parser: Any = None) -> None:
        """What must be known before a configuration is made: a model runner without Triton, and ModelSlim's format."""
        if os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0") != "0":
            raise ValueError("VLLM_USE_V2_MODEL_RUNNER: vLLM's model runner V2 needs Triton; on NPUs set it to 0")
        import vllm_ascend.quantization.modelslim  # noqa: F401  makes `--quantization ascend` known

    @classmethod
    def apply_config_platform_defaults(cls, vllm_config: Any) -> None:
        """Settles what vLLM would otherwise choose for GPUs: full graphs, kernels of Triton, fused passes.

        Raises ValueError for a vLLM that this platform cannot run on: no hook is called earlier for a configuration.
        """
        from vllm.config import CUDAGraphMode

        versions.require_not_older("The platform for NPUs", vllm.__version__, versions.NPU_PLATFORM)
        versions.warn_if_untried("The platform for NPUs", vllm.__version__, versions.NPU_PLATFORM)

        compilation = vllm_config.compilation_config
        if compilation.cudagraph_mode is None:
            compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE
        for option in vars(compilation.pass_config):
            if option.startswith(("fuse_", "enable_")):
                setattr(compilation.pass_config, option, False)
        vllm_config.kernel_config.enable_jit_warmup = False

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        from vllm_ascend.quantization.modelslim import choose_by_file

        refuse_other_npus()
        choose_by_file(vllm_config)
        refuse_unsupported(vllm_config)
        envs.enable_nz()
        warn_of_old_cann()
        model = vllm_config.model_config
        if model is not None:
            cls.check_if_supports_dtype(model.dtype)
        choose_block_size(vllm_config)
        choose_graphs(vllm_config)
        parallel = vllm_config.parallel_config
        parallel.disable_custom_all_reduce = True
        if parallel.worker_cls == "auto":  # as it is until this has run: vLLM runs it again in the engine's process
            name_what_is_not_read(vllm_config)
            parallel.worker_cls = "vllm_ascend.worker.worker.NPUWorker"
        if vllm_config.shutdown_timeout == 0:
            vllm_config.shutdown_timeout = SHUTDOWN_SECONDS
        # A device context does not survive a fork.
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"

    @classmethod
    def is_sleep_mode_available(cls) -> bool:
        return True

    @classmethod
    def is_cumem_allocator_available(cls) -> bool:
        return False

    @classmethod
    def support_hybrid_kv_cache(cls) -> bool:
        return True

    # What models are made of

    @classmethod
    def import_kernels(cls) -> None:
        """The operators are torch_npu's, which is imported."""

    @classmethod
    def import_ir_kernels(cls) -> None:
        super().import_ir_kernels()
        import vllm_ascend.ops.norm  # noqa: F401

    @classmethod
    def get_default_ir_op_priority(cls, vllm_config: Any) -> Any:
        from vllm.config.kernel import IrOpPriorityConfig

        from vllm_ascend.ops.norm import PROVIDER

        normalise = [PROVIDER, "native"]
        return IrOpPriorityConfig.with_default(["native"], rms_norm=normalise, fused_add_rms_norm=normalise)

    @classmethod
    @functools.cache
    def register_triton_kernel_overrides(cls) -> None:
        """Once in a process: vLLM would take the replacement for a kernel."""
        from vllm.triton_utils.dispatcher import register_kernels

        from vllm_ascend.ops.slot_mapping import compute_slot_mapping

        register_kernels({"vllm.v1.worker.block_table.ComputeSlotMappingKernel.kernel": compute_slot_mapping})

    @classmethod
    def get_attn_backend_cls(
        cls, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        from vllm.v1.attention.backend import AttentionType

        from vllm_ascend.attention.backend import NPUAttentionBackend
        from vllm_ascend.attention.encoder import NPUEncoderBackend

        backend: Any = NPUAttentionBackend
        if attn_selector_config.attn_type == AttentionType.ENCODER_ONLY:
            backend = NPUEncoderBackend
        if attn_selector_config.use_mla:
            from vllm_ascend.attention.mla import NPUMLABackend

            backend = NPUMLABackend
        reasons = backend.validate_configuration(device_capability=None, **attn_selector_config._asdict())
        if reasons:
            raise ValueError(f"{attn_selector_config} does not work on NPUs: {', '.join(reasons)}")
        return f"{backend.__module__}.{backend.__name__}"

    @classmethod
    def get_mla_prefill_backend_cls(cls, mla_selector_config: Any) -> Any:
        from vllm_ascend.attention.mla import NPUMLAPrefill

        return NPUMLAPrefill

    @classmethod
    def opaque_attention_op(cls) -> bool:
        """Attention is where models are split into pieces."""
        return True

    # Graphs

    @classmethod
    def support_static_graph_mode(cls) -> bool:
        return True

    @classmethod
    def get_static_graph_wrapper_cls(cls) -> str:
        return "vllm.compilation.cuda_graph.CUDAGraphWrapper"

    # Groups of processes

    @classmethod
    def get_device_communicator_cls(cls) -> str:
        return "vllm_ascend.distributed.communicator.NPUCommunicator"

    @classmethod
    def stateless_init_device_torch_dist_pg(
        cls, backend: str, prefix_store: PrefixStore, group_rank: int, group_size: int, timeout: timedelta
    ) -> ProcessGroup:
        """See `make_stateless_group`."""
        from vllm_ascend.distributed.stateless_group import make_stateless_group

        if backend != "hccl":
            raise ValueError(f"process groups of NPUs have the backend 'hccl', not {backend!r}")
        return make_stateless_group(prefix_store, group_rank, group_size, timeout, envs.stateless_group_buffer())
