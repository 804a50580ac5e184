"""Groups over HCCL beside those of torch.distributed, each with a configuration of its own.

The configuration counts only for what goes through the group's own communicator. torch-npu gives `send` and `recv`
another one for each pair of ranks, to which no configuration applies: its buffer is P2P_HCCL_BUFFSIZE, and its
operations wait for a dead peer for HCCL_EXEC_TIMEOUT, half an hour. So whoever sends in such a group uses
`batch_isend_irecv`, or a collective.
"""

from __future__ import annotations

import math
import uuid
from datetime import timedelta
from typing import TYPE_CHECKING, Final

import torch
import torch_npu
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import GroupName

if TYPE_CHECKING:
    from torch._C._distributed_c10d import PrefixStore

NAME_LENGTH: Final = 32
"""Characters that torch-npu's documentation allows for the name of a group."""
_STOPPED: Final = 2
"""Of torch-npu's watchdog (WatchdogStatus in ProcessGroupHCCL.hpp), which would end the process when a peer is gone."""


def make_stateless_group(store: PrefixStore, rank: int, size: int, timeout: timedelta, buffer: int) -> ProcessGroup:
    """A group with a name that no other has and a buffer of `buffer` MiB, which a device holds twice.

    On the device, an operation waits for its peers for `timeout`, rounded up to seconds. Its failures are for the
    caller to see, at the next synchronisation: they do not end the process. Coming together is not limited by `timeout`
    but by HCCL_CONNECT_TIMEOUT, which no group can choose for itself. The device is the one that is current in the
    calling thread when the first operation runs.
    """
    process_group_hccl = torch_npu._C._distributed_c10d.ProcessGroupHCCL
    name = _agree_on_name(store, rank)
    options = process_group_hccl.Options()
    options._timeout = timeout
    options.group_id = name
    options.global_ranks_in_group = list(range(size))
    options.hccl_config = {
        "group_name": name,
        "hccl_buffer_size": buffer,
        "hccl_exec_timeout": max(1, math.ceil(timeout.total_seconds())),
    }
    group = ProcessGroup(store, rank, size)
    group._set_default_backend(ProcessGroup.BackendType.CUSTOM)
    implementation = process_group_hccl(store, rank, size, options)
    implementation.set_watchdog_status(_STOPPED)
    implementation._set_sequence_number_for_group()
    group._register_backend(torch.device("npu"), ProcessGroup.BackendType.CUSTOM, implementation)
    group._set_group_name(GroupName(name))
    return group


def _agree_on_name(store: PrefixStore, rank: int) -> str:
    if rank == 0:
        store.set("name", f"stateless-{uuid.uuid4().hex}"[:NAME_LENGTH])
    return store.get("name").decode()
