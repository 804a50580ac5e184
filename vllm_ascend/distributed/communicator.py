"""Collectives of vLLM's groups over torch.distributed with HCCL.

The base class is vLLM's for XPUs, of which nothing is particular to them: it does everything by torch.distributed, and
it is one of the two communicators that vLLM's graph capture accepts. What it leaves to XCCL's habits is done here in
the plain way.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from vllm.distributed.device_communicators.all2all import AgRsAll2AllManager
from vllm.distributed.device_communicators.base_device_communicator import DeviceCommunicatorBase
from vllm.distributed.device_communicators.xpu_communicator import XpuCommunicator


class NPUCommunicator(XpuCommunicator):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        DeviceCommunicatorBase.__init__(self, *args, **kwargs)
        self.ca_comm = None
        if self.use_all2all:
            self.all2all_manager = AgRsAll2AllManager(self.cpu_group)

    def gather(self, input_: torch.Tensor, dst: int = 0, dim: int = -1) -> torch.Tensor | None:
        gathered: torch.Tensor = self.all_gather(input_, dim)
        return gathered if self.rank_in_group == dst else None

    def broadcast(self, tensor: torch.Tensor, src: int = 0) -> torch.Tensor:
        broadcast: torch.Tensor = DeviceCommunicatorBase.broadcast(self, tensor, src)
        return broadcast

    def all_gatherv(
        self, input_: torch.Tensor | list[torch.Tensor], dim: int = 0, sizes: list[int] | None = None
    ) -> torch.Tensor | list[torch.Tensor]:
        if dim != 0:
            raise NotImplementedError(f"all_gatherv along dimension {dim}: only the first can have several sizes")
        if isinstance(input_, list):
            return [self._all_gather_rows(each, sizes) for each in input_]
        return self._all_gather_rows(input_, sizes)

    def _all_gather_rows(self, rows: torch.Tensor, sizes: list[int] | None) -> torch.Tensor:
        if sizes is None or len(set(sizes)) == 1:
            gathered: torch.Tensor = self.all_gather(rows, 0)
            return gathered
        parts = [rows.new_empty((size, *rows.shape[1:])) for size in sizes]
        dist.all_gather(parts, rows, group=self.device_group)
        return torch.cat(parts)

    def reduce_scatterv(self, input_: torch.Tensor, dim: int = -1, sizes: list[int] | None = None) -> torch.Tensor:
        if sizes is None or len(set(sizes)) == 1:
            scattered: torch.Tensor = self.reduce_scatter(input_, dim)
            return scattered
        own: torch.Tensor = self.all_reduce(input_).split(sizes, dim)[self.rank_in_group]
        return own.contiguous()
