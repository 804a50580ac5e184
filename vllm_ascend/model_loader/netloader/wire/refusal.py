"""A server's refusal, in words for the operator of the client that was refused."""

from __future__ import annotations

from typing import Final

from vllm_ascend.model_loader.netloader.errors import SourceRefused, one_line
from vllm_ascend.model_loader.netloader.weights.manifest import Manifest
from vllm_ascend.model_loader.netloader.wire.messages import Refuse

SHOWN_DIFFERENCES: Final = 8
"""Differing fields or tensors that are named; the rest is counted."""


def refused(answer: Refuse, wanted: Manifest | None = None) -> SourceRefused:
    """What to raise for `answer`, with what differs as seen from this side.

    Where the server has sent its manifest, the tensors that differ from those of `wanted` are named. Raises
    ProtocolError for a manifest that cannot be read.
    """
    differences = [difference.flipped() for difference in answer.differences]
    if answer.manifest and wanted is not None:
        differences = list(wanted.mismatch(Manifest.decode(answer.manifest))) or differences

    shown = [one_line(str(difference)) for difference in differences[:SHOWN_DIFFERENCES]]
    if len(differences) > SHOWN_DIFFERENCES:
        shown.append(f"and {len(differences) - SHOWN_DIFFERENCES} more")
    details = f": {'; '.join(shown)}" if shown else ""
    return SourceRefused(f"it refused: {one_line(answer.reason)}{details}", answer.referrals)
