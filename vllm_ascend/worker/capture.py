"""Capturing as many graphs as the device has streams for.

`graphs` estimates how many batch sizes fit. How many do is only known by trying: HCCL takes streams that nobody tells,
and so do other processes on the device, and groups that Netloader makes while inference goes on. So a capture that runs
out of them is no failure of the engine: all graphs are dropped, and the sizes are thinned to fewer than fitted. Where
not one fits, the model runs without graphs.

Every rank has to come to the same sizes, because batches are padded to them before ranks meet in a collective. So all
ranks agree after each size whether everybody has it, over the group on the CPU: nothing that is captured takes part in
that.
"""

from __future__ import annotations

import gc
import re
from typing import Any, Final

import torch
import torch.distributed as dist
from vllm.compilation.cuda_graph import CUDAGraphWrapper
from vllm.config import CUDAGraphMode
from vllm.distributed.parallel_state import get_world_group
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_ascend.graphs import thinned

logger = init_logger(__name__)

KEPT: Final = 7 / 8
"""Of the sizes that fitted: the rest leaves streams to what is made later."""
_NO_STREAMS: Final = re.compile(r"\b207008\b|Alloc sq cq fail", re.IGNORECASE)
"""How CANN says that a device has no more streams: the number since its 9.0, the words before."""


class OutOfStreams(RuntimeError):
    """Some rank has no streams for graphs of this size."""

    def __init__(self, size: int, reason: str) -> None:
        super().__init__(reason)
        self.size = size


def agree_that_it_fits(size: int, failure: RuntimeError | None) -> None:
    """Returns where every rank has captured graphs of this size; otherwise raises OutOfStreams on every rank.

    To be called by all ranks of the world. A `failure` that is another one is raised as it is.
    """
    if failure is not None and not is_out_of_streams(failure):
        raise failure
    fits = torch.tensor([int(failure is None)])
    dist.all_reduce(fits, dist.ReduceOp.MIN, group=get_world_group().cpu_group)
    if not fits.item():
        raise OutOfStreams(size, "another rank has none left" if failure is None else _line_of(failure)) from failure


def is_out_of_streams(error: BaseException) -> bool:
    """Whether it, or what it came of, says so: ending a capture that has failed fails as well."""
    before = error.__cause__ or error.__context__
    return _NO_STREAMS.search(str(error)) is not None or (before is not None and is_out_of_streams(before))


def begin_again_with_fewer(runner: Any, fitted: int, reason: str) -> list[Any]:
    """What `runner` has to capture now, where its device had streams for `fitted` of its sizes; empty for no graphs."""
    CUDAGraphWrapper.clear_all_graphs()
    _take_a_new_pool()
    gc.collect()
    torch.accelerator.synchronize()
    torch.accelerator.empty_cache()

    compilation, dispatcher = runner.compilation_config, runner.cudagraph_dispatcher
    for keys in dispatcher.cudagraph_keys.values():
        keys.clear()
    if not fitted:
        logger.warning("the device has not even streams for graphs of one batch size (%s): using no graphs", reason)
        compilation.cudagraph_mode = CUDAGraphMode.NONE
        dispatcher.initialize_cudagraph_keys(CUDAGraphMode.NONE)
        return []

    compilation.cudagraph_capture_sizes = thinned(compilation.cudagraph_capture_sizes, int(fitted * KEPT))
    dispatcher.initialize_cudagraph_keys(dispatcher.cudagraph_mode, runner.uniform_decode_query_len)
    logger.warning(
        "the device has streams for graphs of %d batch sizes, and no more (%s): using these: %s",
        fitted,
        reason,
        compilation.cudagraph_capture_sizes,
    )
    return [description for _, descriptions in dispatcher.get_capture_descs() for description in descriptions]


def _take_a_new_pool() -> None:
    """For the memory of graphs; nothing can be captured into one in which a capture has failed to begin."""
    platform: Any = type(current_platform)
    platform._global_graph_pool = None
    for wrapper in CUDAGraphWrapper._all_instances:
        wrapper.graph_pool = current_platform.get_global_graph_pool()


def _line_of(error: BaseException) -> str:
    """The line that says it."""
    lines = [line for line in str(error).splitlines() if _NO_STREAMS.search(line)]
    before = error.__cause__ or error.__context__
    return lines[-1].strip() if lines else _line_of(before) if before is not None else str(error)
