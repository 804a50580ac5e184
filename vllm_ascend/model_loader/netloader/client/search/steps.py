"""What a client can do next, as `SourceOrder` decides it and `Search` does it."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_ascend.model_loader.netloader.client.candidates import Candidate


@dataclass(frozen=True)
class Ask:
    """The step to ask `candidate` for the weights, by the transports of these names."""

    candidate: Candidate
    transports: tuple[str, ...]


@dataclass(frozen=True)
class AwaitTurn:
    """The step to wait up to `seconds` for a turn at a busy source, and to say how long it took (`waited`)."""

    seconds: float


@dataclass(frozen=True)
class LeaveQueues:
    """The step to give up all places in queues, because WAIT_TIMEOUT is used up."""


@dataclass(frozen=True)
class Pause:
    """The step to do nothing for `seconds`, before the next round."""

    seconds: float


Step = Ask | AwaitTurn | LeaveQueues | Pause
