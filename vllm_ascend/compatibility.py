"""What scripts for other implementations of this package bring along, and what becomes of it here.

They pass a block size of 16, which vLLM's own documentation uses and no NPU takes, and switches of a platform that this
one is not. A size has a meaning that another size has too, so it is replaced. A switch has none, so it changes nothing;
but whoever set it expects that it does, and is told. A script that would run with other results is worse off than one
that says why.
"""

from __future__ import annotations

import os
from typing import Any, Final

from vllm.logger import init_logger

from vllm_ascend.attention.rules import BLOCK_SIZE

logger = init_logger(__name__)

_PREFIX: Final = "VLLM_ASCEND_"
_READ: Final = ("VLLM_ASCEND_ENABLE_NZ",)
_VARIABLES: Final = ("DYNAMIC_EPLB", "EXPERT_MAP_RECORD", "MSMONITOR_USE_DAEMON")
"""Those of upstream's vllm-ascend. What CANN and torch-npu read means the same here and is not among them."""


def choose_block_size(vllm_config: Any) -> None:
    """Blocks of the KV cache that attention can read, whatever was asked for."""
    cache = vllm_config.cache_config
    if cache.user_specified_block_size and cache.block_size != BLOCK_SIZE:
        logger.warning(
            "the KV cache has no blocks of %d tokens on NPUs (block_size): using %d", cache.block_size, BLOCK_SIZE
        )
        cache.block_size = BLOCK_SIZE


def name_what_is_not_read(vllm_config: Any) -> None:
    """Warns of every setting that changes nothing on this platform, once in a process."""
    if additional := vllm_config.additional_config:
        keys = ", ".join(sorted(additional)) if isinstance(additional, dict) else type(additional).__name__
        logger.warning_once("additional_config changes nothing on this platform, which reads none of it: %s", keys)
    others = {name for name in os.environ if name.startswith(_PREFIX) or name in _VARIABLES}
    if variables := sorted(others - set(_READ)):
        logger.warning_once("set and not read by this platform, so they change nothing: %s", ", ".join(variables))
