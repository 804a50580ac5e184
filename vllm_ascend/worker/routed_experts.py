"""Which experts each token took, returned with a request (enable_return_routed_experts).

vLLM's routers record it on the device, and its connector keeps it for cached prefixes and hands it to the scheduler.
Only the model runner V2 calls the connector, so what that calls is called here: at the begin of a step, after the
forward, and where the host reads what was sampled.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch_npu
from vllm.distributed.aux_output_connector.worker import AuxOutputWorkerConnector
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput


class RoutedExperts:
    """Of a worker; at most one step is between `begin_step` and `end_step`."""

    def __init__(self, model: torch.nn.Module, vllm_config: Any, kv_cache_config: Any) -> None:
        self._connector = AuxOutputWorkerConnector(
            model=model, vllm_config=vllm_config, kv_cache_config=kv_cache_config
        )

    def begin_step(self, scheduler_output: Any) -> None:
        self._connector.begin_step(scheduler_output.aux_output_connector_metadata)

    def end_step(self, requests: Any, query_start_loc: np.ndarray) -> PendingExperts | None:
        """After the forward of these `requests`, vLLM's input batch; None where another rank returns the experts."""
        count = requests.num_reqs
        batch = SimpleNamespace(
            req_ids=requests.req_ids,
            query_start_loc_np=query_start_loc[: count + 1].copy(),
            num_computed_tokens_np=requests.num_computed_tokens_cpu[:count].copy(),
        )
        pending = self._connector.prepare_output(batch)
        return None if pending is None else PendingExperts(pending)

    def close(self) -> None:
        self._connector.close()


class PendingExperts:
    """A step's experts, on their way to the host."""

    def __init__(self, pending: Any) -> None:
        self._pending = pending
        self._rows = pending.routed_experts_gpu.to("cpu", non_blocking=True)
        self._copied = torch_npu.npu.Event()
        self._copied.record()

    def add_to(self, output: ModelRunnerOutput) -> ModelRunnerOutput:
        """Waits for them, and counts on the sampled tokens that `output` has of each request."""
        self._copied.synchronize()
        self._pending.routed_experts = self._rows.numpy()
        self._pending.num_sampled = np.array([len(tokens) for tokens in output.sampled_token_ids])
        self._pending.num_rejected = np.zeros_like(self._pending.num_sampled)
        output.aux_output_connector_output = self._pending.process_output()
        return output


class OutputWithExperts(AsyncModelRunnerOutput):
    def __init__(self, output: AsyncModelRunnerOutput, experts: PendingExperts) -> None:
        self._output = output
        self._experts = experts

    def get_output(self) -> ModelRunnerOutput:
        return self._experts.add_to(self._output.get_output())
