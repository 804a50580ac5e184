"""The other processes of this host that want the same weights: one of them brings these, and all map its pages.

Who knows the root digest of what it wants claims it (`transport.claims`). Whoever has the claim fetches from sources
and serves what has come; everybody else waits for it, and maps its pages when they are complete. Since there is one
claim, nobody waits for somebody who waits. When its holder is gone, one of those who waited gets it, copies what has
passed by then from the pages that it has already, and goes on.

A process that cannot serve what it loads claims nothing, but it can wait for one that does.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from pathlib import Path
from typing import Final

import msgspec

from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.transport.claims import Claim, holder_of
from vllm_ascend.model_loader.netloader.transport.store import Request
from vllm_ascend.model_loader.netloader.wire.access import Access, derive_key

logger = logging.getLogger(__name__)

_TRIES: Final = 8
"""How often a claim may change hands while this process asks for its holder."""
PURPOSE: Final = b"netloader claim"
"""For what the names of claims are derived."""
_ANSWER_SECONDS: Final = 3.0
"""How long the holder of a claim may take to answer, which it can as soon as it has memory to fill."""
_PAUSE: Final = 0.05
"""Seconds between two tries: a name is free only when the last thread that uses it has noticed."""
_UNLIKE: Final = {"name", "name_is_path", "revision", "fingerprint"}
"""Fields of an identity that may differ between processes that serve each other."""


class Neighbours:
    """Those that want what `request` asks for, under the same `access`. For one thread at a time."""

    def __init__(self, request: Request, access: Access, *, may_claim: bool) -> None:
        """`may_claim` says whether this process can serve others while it loads."""
        self._request = request
        self._access = access
        self._may_claim = may_claim
        self._is_off = False
        self._given_up: set[Endpoint] = set()
        self._claim: Claim | None = None
        self._claimed = ""

    def holder(self, root: str) -> Endpoint | None:
        """Where another process of this host has the contents with the root digest `root`, or brings them.

        None where there is no other one to wait for. Then the claim is this process's, if it may have it.
        """
        return self._holder(root, claims=self._may_claim)

    def find(self, root: str) -> Endpoint | None:
        """As `holder`, but claims nothing, because this process cannot fetch now."""
        return self._holder(root, claims=False)

    def _holder(self, root: str, *, claims: bool) -> Endpoint | None:
        if self._claimed == root or self._is_off:
            return None
        name = self._name(root)
        try:
            for _ in range(_TRIES):
                if claims and (claim := Claim.take(name)) is not None:
                    self.give_up_claim()
                    self._claim, self._claimed = claim, root
                    return None
                holder = holder_of(name, _ANSWER_SECONDS)
                if holder is not None:
                    return None if holder in self._given_up else holder
                if not claims:
                    return None
                time.sleep(_PAUSE)
        except OSError as error:
            self._is_off = True
            logger.warning("this process does without its neighbours: %s", error)
        return None

    def leave(self, holder: Endpoint) -> None:
        """Waits for `holder` no more, whatever it claims."""
        self._given_up.add(holder)

    def take_claim(self, root: str) -> Claim | None:
        """The claim to the contents with the root digest `root`, if this process has it; it is the caller's then."""
        if self._claimed != root:
            return None
        claim, self._claim = self._claim, None
        return claim

    def give_up_claim(self) -> None:
        """Leaves to others what was claimed and not taken. Idempotent."""
        claim, self._claim, self._claimed = self._claim, None, ""
        if claim is not None:
            claim.close()

    def _name(self, root: str) -> str:
        """What nobody can make who is not of the deployment, so that a name tells strangers nothing."""
        identity = msgspec.to_builtins(self._request.identity)
        alike = {field: value for field, value in identity.items() if field not in _UNLIKE}
        wanted = msgspec.json.encode([os.geteuid(), alike, self._request.coordinates, root], order="sorted")
        return f"netloader-{derive_key(_secret(self._access), PURPOSE, wanted).hex()}"


def _secret(access: Access) -> bytes:
    """What only this deployment knows, as far as anything is secret in it."""
    if access.token is not None:
        return access.token
    if access.tls_files is not None:
        _, key, _ = access.tls_files
        return hashlib.sha256(Path(key).read_bytes()).digest()
    return b""
