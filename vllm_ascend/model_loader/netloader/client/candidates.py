"""Those that a client may ask for weights, and how far each of them is trusted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vllm_ascend.model_loader.netloader.endpoint import Endpoint


@dataclass(frozen=True)
class Contents:
    """What a replica is said to hold: its root digest, and the fingerprint of the checkpoint that it comes from."""

    root: str
    fingerprint: str


@dataclass(frozen=True)
class Candidate:
    """One that may be asked for the weights.

    `referrer` is the source that named it, None for a configured one. `contents` are those that the referrer promised
    of a replica; a configured source and a rank have promised none. `is_nearby` says that it is a process of this host,
    which has these contents or brings them for all.
    """

    endpoint: Endpoint
    referrer: Endpoint | None = None
    contents: Contents | None = None
    is_nearby: bool = False

    @property
    def is_replica(self) -> bool:
        """Whether it is trusted with nothing but time."""
        return self.contents is not None


def endpoints_in(referrals: Sequence[str], address: Endpoint) -> Iterator[Endpoint]:
    """The endpoints in `referrals`. Those without a host are on that of `address`; what is no endpoint is left out."""
    own_host = str(address).rpartition(":")[0]
    for referral in referrals:
        with contextlib.suppress(ValueError):
            yield Endpoint.parse(own_host + referral if referral.startswith(":") else referral)
