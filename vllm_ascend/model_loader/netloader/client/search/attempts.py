"""What has become of sessions, as a report of the fetch tells it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Final

from vllm_ascend.model_loader.netloader.client.fetched import Fetched
from vllm_ascend.model_loader.netloader.client.intake import Intake
from vllm_ascend.model_loader.netloader.client.session.session import ClientSession
from vllm_ascend.model_loader.netloader.client.verification import Evidence
from vllm_ascend.model_loader.netloader.errors import SourceFailed, SourcesExhausted, one_line
from vllm_ascend.model_loader.netloader.report import Attempt

logger = logging.getLogger(__name__)

_REASON_LIMIT: Final = 10_000
"""Characters of a reason; a refusal names eight tensors, and says of each what differs."""


class Attempts:
    """What sessions have brought, and why those that failed did. For one thread."""

    def __init__(self, intake: Intake, failed: list[Attempt], received: Counter[str], shared: Counter[str]) -> None:
        """`failed`, `received` and `shared` (bytes by source that came, and that are its own pages) fill as it goes."""
        self._intake = intake
        self._failed = failed
        self._received = received
        self._shared = shared
        self._referrals: list[str] = []
        """What sources have said that only referred to others."""
        self._best: tuple[int, Fetched] | None = None
        """The session that has brought most of what is being loaded, and how much."""

    def over(self, session: ClientSession) -> None:
        """Notes what a session has brought that is over."""
        self._received[str(session.candidate.endpoint)] += session.received
        if session.shared:
            self._shared[str(session.candidate.endpoint)] = session.shared
        evidence = self._intake.evidence
        if evidence is None or session.evidence is None or session.evidence.root != evidence.root:
            return
        if self._best is None or not _is_of(self._best[1], evidence) or session.brought > self._best[0]:
            self._best = session.brought, session.fetched(self._intake.memory, evidence)

    def failed(self, session: ClientSession, error: Exception) -> None:
        """Notes why a session has failed."""
        transport = session.transport.name if session.transport is not None else None
        reason = one_line(str(error), _REASON_LIMIT)
        attempt = Attempt(str(session.candidate.endpoint), transport, reason, session.age, session.received)
        self._failed.append(attempt)
        logger.warning("could not load from %s", attempt)

    def referred(self, session: ClientSession, referrals: Sequence[str], error: Exception) -> None:
        """Notes that a source has only named others."""
        endpoint = session.candidate.endpoint
        logger.info("%s refers to %s: %s", endpoint, one_line(", ".join(referrals)), error)
        self._referrals.append(f"{endpoint}: {error}")

    def settled(self, evidence: Evidence) -> Fetched | None:
        """The weights that `evidence` describes, which nobody replaces any more; None if they were replaced.

        They count as those of the session that has brought most.
        """
        if self._best is None or not _is_of(self._best[1], evidence):
            return None
        try:
            self._intake.settle(evidence)
        except SourceFailed:  # a source whose turn has just come has others
            return None
        return self._best[1]

    def exhausted(self) -> SourcesExhausted:
        """The error for a fetch that has nobody left to ask."""
        return SourcesExhausted([str(attempt) for attempt in self._failed] or self._referrals)

    def forget_the_best(self) -> None:
        """Lets go of the memory: an error that leaves a search keeps the search alive, and it would keep the memory."""
        self._best = None


def _is_of(fetched: Fetched, evidence: Evidence) -> bool:
    return fetched.evidence is not None and fetched.evidence.root == evidence.root
