"""What a fetch brings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from vllm_ascend.model_loader.netloader.client.verification import Evidence
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.weights.memory import Memory
from vllm_ascend.model_loader.netloader.wire.messages import AttributeValue


@dataclass(frozen=True)
class Fetched:
    """The weights and where they came from. The caller closes `memory`.

    `source` is the one that has confirmed them, or brought most where nobody is left to confirm them. `address` is
    where it was reached: its name may stand for several. `fingerprint` is that of the checkpoint that the weights are
    known by, empty where there is none. `evidence` is what every byte was verified by, None where nothing was verified.
    `port` is where what had come was served to others meanwhile, as `source` has been told; 0 where that was not done.
    """

    memory: Memory
    source: Endpoint
    address: Endpoint
    transport: str
    session: bytes
    attributes: Mapping[str, AttributeValue] = field(default_factory=dict)
    fingerprint: str = ""
    evidence: Evidence | None = None
    port: int = 0
