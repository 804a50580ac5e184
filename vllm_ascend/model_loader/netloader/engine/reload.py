"""New weights for a model that is already in use, through vLLM's layerwise reload.

Post-processing may have replaced the parameters of the model, so new raw weights cannot be written over them. A second,
scratch model of the same configuration takes them first, exactly as in a first load: from a source or from disk, into
an arena in host memory, which is served afterwards. When it is complete, a `rehearsal` shows whether layers of every
kind can take over such weights. Only then does the model in use change, layer by layer (`takeover`): vLLM gives a layer
its raw tensors back, and they are filled, post-processed, and copied into the memory that the model computes with. So
whatever goes wrong before leaves the instance as it was, and it goes on serving what it has.

vLLM's `reload_weights` knows only checkpoints. It takes an iterator from the loader's `get_all_weights` and passes it
to the model's `load_weights`. `hand_over` lends the model a `load_weights` for that one iterator.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype

from vllm_ascend.distributed.gather import agreed, alike
from vllm_ascend.model_loader.netloader.engine.takeover import NewWeights, take_over
from vllm_ascend.model_loader.netloader.errors import ReloadRefused


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
    """Ends when all ranks have done what they do within. If it fails on one of them, it fails on all.

    Raises ReloadRefused if another rank has failed, and otherwise what was raised within.
    """
    try:
        yield
    except BaseException:
        agreed(False)
        raise
    if not agreed(True):
        raise ReloadRefused("another rank of this instance could not get its weights, see its log: nothing was changed")


def require_ranks_alike(fingerprint: str) -> None:
    """Raises ReloadRefused, on all ranks, if they have new weights of different checkpoints. All of them must call it.

    `fingerprint` is that of this rank's new weights, empty if it is unknown.
    """
    if not alike(int(fingerprint[:15], 16) if fingerprint else None):
        raise ReloadRefused(
            f"the ranks of this instance got weights of different checkpoints, this one of "
            f"{fingerprint or 'an unknown one'}: nothing was changed, reload again when nobody changes them"
        )


def scratch_model(vllm_config: VllmConfig, model_config: ModelConfig) -> nn.Module:
    """Makes a model like the one in use, not loaded yet, in host memory, which has room for it.

    The engine does not get to know it.
    """
    config = copy.copy(vllm_config)
    config.compilation_config = copy.copy(vllm_config.compilation_config)
    config.compilation_config.static_forward_context = {}  # layers register here, and each name may come once
    config.compilation_config.static_all_moe_layers = []
    with set_default_torch_dtype(model_config.dtype), torch.device("cpu"):
        model: nn.Module = initialize_model(vllm_config=config, model_config=model_config)
    return model


def hand_over(
    weights: NewWeights,
    model: nn.Module,
    dtype: torch.dtype,
    within: Callable[[], contextlib.AbstractContextManager[None]],
    otherwise: Callable[[], None],
) -> Iterator[tuple[str, torch.Tensor]]:
    """Makes the iterator by which `model`, whose type is `dtype`, takes over `weights`: pass it to its `load_weights`.

    The model changes within `within`. If `load_weights` is called with any other iterator, it does what it does without
    us, and the new weights are dropped. If the iterator is read instead, the model stays as it is, `otherwise` is
    called, and ReloadRefused is raised.
    """

    def read_elsewhere() -> Iterator[tuple[str, torch.Tensor]]:
        vars(model).pop("load_weights", None)
        otherwise()
        raise ReloadRefused("Netloader brings weights as a model loads them: set is_checkpoint_format to true")
        yield

    nothing_to_read = read_elsewhere()

    def load_weights(iterator: Any) -> Any:
        vars(model).pop("load_weights", None)
        if iterator is not nothing_to_read:
            load_checkpoint: Any = model.load_weights  # the class's own
            return load_checkpoint(iterator)
        with within(), set_default_torch_dtype(dtype):  # as in a first load: CPU kernels for int8 give results of it
            return take_over(weights, model)

    vars(model)["load_weights"] = load_weights
    return nothing_to_read
