"""vLLM's model runner on an NPU.

It calls streams, events and graphs by their names in torch.cuda, which have the same meaning in torch.npu. A process
with a runner uses no GPU, so these names lead to torch.npu from then on.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch_npu
from vllm.utils import torch_utils
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_ascend.worker.capture import OutOfStreams, agree_that_it_fits, begin_again_with_fewer
from vllm_ascend.worker.graph import NPUGraph
from vllm_ascend.worker.routed_experts import OutputWithExperts, RoutedExperts

_operators: list[torch.library.Library] = []
"""What was registered with torch lives as long as this."""


class NPUModelRunner(GPUModelRunner):
    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        _lead_cuda_to_npu()
        _define_weak_references()
        super().__init__(vllm_config, device)
        self._routed_experts: RoutedExperts | None = None

    def initialize_kv_cache(self, kv_cache_config: Any, is_profiling: bool = False, *args: Any, **kwargs: Any) -> None:
        super().initialize_kv_cache(kv_cache_config, is_profiling, *args, **kwargs)
        if self.vllm_config.aux_output_config.enabled and not is_profiling:
            self._routed_experts = RoutedExperts(self.get_model(), self.vllm_config, kv_cache_config)

    def _get_slot_mappings(self, *args: Any, **kwargs: Any) -> Any:
        """In int32, of all groups and of all layers: what writes the cache reads no more of a slot, whatever its type.

        Nothing but attention uses them, which is not captured, so that they need not stay where they are.
        """
        of_groups, of_layers = super()._get_slot_mappings(*args, **kwargs)
        if of_groups is None:
            return of_groups, of_layers
        narrow = {id(slots): slots.to(torch.int32) for slots in of_groups.values()}
        return tuple({key: narrow[id(slots)] for key, slots in each.items()} for each in (of_groups, of_layers))

    def execute_model(self, scheduler_output: Any, intermediate_tensors: Any = None) -> Any:
        if self._routed_experts is not None:
            self._routed_experts.begin_step(scheduler_output)
        return super().execute_model(scheduler_output, intermediate_tensors)

    def sample_tokens(self, grammar_output: Any) -> Any:
        experts = None
        if self._routed_experts is not None and self.execute_model_state is not None:
            experts = self._routed_experts.end_step(self.input_batch, self.query_start_loc.np)
        output = super().sample_tokens(grammar_output)
        if experts is None:
            return output
        return experts.add_to(output) if isinstance(output, ModelRunnerOutput) else OutputWithExperts(output, experts)

    def shutdown(self) -> None:
        if self._routed_experts is not None:
            self._routed_experts.close()
        super().shutdown()

    def _capture_cudagraphs(self, batch_descriptors: list[Any], *args: Any, **options: Any) -> None:
        """For each of these batch sizes, the largest first, or for fewer where the device has no streams for all."""
        while batch_descriptors:
            try:
                super()._capture_cudagraphs(batch_descriptors, *args, **options)
                return
            except OutOfStreams as failure:
                fitted = [each.num_tokens for each in batch_descriptors].index(failure.size)
                reason = str(failure)
            # The failure, and the frames that it held on to, are gone by now.
            batch_descriptors = begin_again_with_fewer(self, fitted, reason)

    def _warmup_and_capture(self, desc: Any, *args: Any, **options: Any) -> None:
        failure = None
        try:
            super()._warmup_and_capture(desc, *args, **options)
        except RuntimeError as error:
            failure = error
        try:
            agree_that_it_fits(desc.num_tokens, failure)
        finally:
            del failure  # it and this frame refer to each other


def _lead_cuda_to_npu() -> None:
    """Functions become objects of their own: Dynamo does not accept one function under two names."""
    npu, names = torch_npu.npu, vars(torch.cuda)
    names.update(Stream=npu.Stream, Event=npu.Event, CUDAGraph=NPUGraph)
    for name in ("current_stream", "default_stream", "graph", "graph_pool_handle", "is_current_stream_capturing"):
        names[name] = functools.partial(getattr(npu, name))
    names.update(set_stream=_set_stream, stream=_stream)


def _set_stream(stream: Any) -> None:
    """vLLM asks itself, not torch, for the current stream, which graphs are captured on."""
    torch_utils._current_stream_tls.value = stream
    torch_npu.npu.set_stream(stream)


@contextlib.contextmanager
def _stream(stream: Any) -> Iterator[None]:
    if stream is None:
        yield
        return
    previous = torch_npu.npu.current_stream()
    _set_stream(stream)
    try:
        yield
    finally:
        _set_stream(previous)


def _define_weak_references() -> None:
    """The operator by which vLLM keeps the results of graphs without their memory; its CUDA kernels bring it."""
    if not _operators:
        library = torch.library.Library("_C", "FRAGMENT")
        library.define("weak_ref_tensor(Tensor input) -> Tensor")
        library.impl("weak_ref_tensor", torch_npu._C._weak_ref_tensor, "PrivateUse1")
        _operators.append(library)
