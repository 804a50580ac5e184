"""Which graphs are captured of a model.

Attention takes the lengths of sequences from the host, so what is captured is the pieces between: one for each layer
and one more, for each of some batch sizes. A captured piece holds streams of the device, one for what it computes and
one for each kind of group that it communicates in, and a device has about two thousand. vLLM's batch sizes are chosen
for GPUs, without such a limit; where they are too many, sizes are left out evenly. That is an estimate: where it was
wrong, `worker.capture` goes on with fewer.
"""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger

logger = init_logger(__name__)

STREAMS = 1800
"""For graphs; the rest is for all else that the device does."""


def choose_graphs(vllm_config: Any) -> None:
    from vllm.config import CUDAGraphMode

    compilation, model = vllm_config.compilation_config, vllm_config.model_config
    if compilation.compile_sizes is None:
        compilation.compile_sizes = []
    if compilation.cudagraph_mode.has_full_cudagraphs():
        logger.warning(
            "full graphs (cudagraph_mode=%s) are not supported on NPUs: using PIECEWISE",
            compilation.cudagraph_mode.name,
        )
        compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE
    if model is None or compilation.cudagraph_mode == CUDAGraphMode.NONE:
        return
    if model.enable_sleep_mode:
        logger.warning("sleep mode moves weights, and graphs would go on reading where they were: using no graphs")
        compilation.cudagraph_mode = CUDAGraphMode.NONE
        return
    sizes = compilation.cudagraph_capture_sizes
    compilation.cudagraph_capture_sizes = thinned(sizes, STREAMS // _streams_of_a_size(vllm_config))
    if len(compilation.cudagraph_capture_sizes) < len(sizes):
        logger.info("a device has streams for graphs of these batch sizes: %s", compilation.cudagraph_capture_sizes)


def thinned(sizes: list[int], most: int) -> list[int]:
    """At most so many of the ascending `sizes`, from the smallest to the largest; at least the largest."""
    count = min(len(sizes), max(most, 1))
    if count == 1:
        return sizes[-1:]
    return [sizes[index * (len(sizes) - 1) // (count - 1)] for index in range(count)]


def _streams_of_a_size(vllm_config: Any) -> int:
    parallel = vllm_config.parallel_config
    groups = (parallel.tensor_parallel_size > 1) + (parallel.data_parallel_size > 1) + parallel.enable_expert_parallel
    streams: int = (vllm_config.model_config.get_num_layers(parallel) + 1) * (1 + groups)
    return streams
