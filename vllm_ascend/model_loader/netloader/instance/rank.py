"""What a load has to know of its engine, and may ask of it: the one place where vLLM comes in.

Everything that a load decides, it decides from these values. So the policy needs no engine, and whoever wants to see it
at work hands over a `Rank` made of a few constants and small functions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn

from vllm_ascend.model_loader.netloader.checkpoint.record import ReadRecord
from vllm_ascend.model_loader.netloader.server.answers import ModelFiles
from vllm_ascend.model_loader.netloader.weights.identity import ModelIdentity, RankCoordinates

logger = logging.getLogger(__name__)

Progress = Callable[[int], None]
"""Is told how many more bytes have arrived, by any thread."""


@dataclass(frozen=True, eq=False)
class Rank:
    """One rank of an instance, as the load of one of its models sees it.

    `number` counts all ranks of the deployment, `role` is that of the model: ``target`` or ``draft``. `engine` is an
    object that all loads of this rank share and that lives exactly as long as its engine. The engine computes on
    `computes_on`; the model that is loaded lies on `loads_on`, which differs for a scratch model.
    """

    number: int
    role: str
    coordinates: RankCoordinates
    engine: object
    computes_on: torch.device
    loads_on: torch.device

    identify: Callable[[], ModelIdentity]
    """Says which model this is, by everything but its files: the fingerprint is left empty."""
    fingerprint: Callable[[nn.Module], str]
    """Gives the fingerprint of the files that a load from disk would read, empty unless all are on this host."""
    load_from_disk: Callable[[nn.Module], ReadRecord]
    """Fills a model from the checkpoint. Raises whatever the engine's own loader raises."""
    gather: Callable[[bytes], list[bytes]]
    """Exchanges a few bytes with all ranks of the instance. All of them must call it."""
    own_address: Callable[[], str]
    """Gives the address by which other hosts reach this one."""
    progress_bar: Callable[[int], AbstractContextManager[Progress]]
    """Shows the progress of a transfer of so many bytes for as long as it is open."""
    watch_changes: Callable[[], None]
    """Makes the engine's workers suspend serving before they move or change weights on the accelerator."""
    small_files: Callable[[], ModelFiles | None] = lambda: None
    """Gives the files that the model has beside its weights, None if it has no directory. Never raises."""

    @property
    def weights_name(self) -> str:
        """What log messages call the weights of this rank."""
        return f"the {self.role} weights of rank {self.number}"

    def log_not_served(self, reason: str) -> None:
        """Logs why the weights of this rank are not served, although the configuration asks for it."""
        logger.error("%s cannot be served: %s", self.weights_name, reason)
