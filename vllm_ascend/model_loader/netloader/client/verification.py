"""What a client verifies bytes by: the digests of the source's chunks, and the root digest over all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from vllm_ascend.model_loader.netloader.client.candidates import Candidate
from vllm_ascend.model_loader.netloader.errors import Damaged, ProtocolError, SessionEnded, SourceRefused, one_line
from vllm_ascend.model_loader.netloader.transport import digests
from vllm_ascend.model_loader.netloader.transport.base import Timeouts
from vllm_ascend.model_loader.netloader.transport.chunks.inventory import Chunk
from vllm_ascend.model_loader.netloader.transport.digests import BLAKE3, DIGEST_BYTES, digest_of, root_of
from vllm_ascend.model_loader.netloader.weights.manifest import Manifest, chunks
from vllm_ascend.model_loader.netloader.weights.memory import Memory
from vllm_ascend.model_loader.netloader.wire.channel import Channel, Deadline
from vllm_ascend.model_loader.netloader.wire.messages import (
    DIGESTS_LIMIT,
    Accept,
    AskDigests,
    AttributeValue,
    Digests,
    End,
    Message,
)

LEAST_DIGEST_RATE: Final = 100 << 20
"""Bytes per second that a source digests at the very least, in the little time that inference leaves it.

A replica has made its digests before it was named, so it gets no such time.
"""


@dataclass(frozen=True)
class Evidence:
    """The digests of all chunks, in order, and the root digest of the contents, in hexadecimal.

    `attributes` is what the source has told beside, and what the root covers too.
    """

    digests: tuple[bytes, ...]
    root: str
    attributes: Mapping[str, AttributeValue] = field(default_factory=dict)


def evidence_of(
    candidate: Candidate,
    control: Channel,
    accept: Accept,
    manifest: Manifest,
    timeouts: Timeouts,
    *,
    known: Evidence | None,
    wanted_root: str = "",
) -> Evidence:
    """What the chunks of `candidate` are verified by. Raises SourceRefused where it has nothing, or not what it has
    promised or what is wanted, PeerError where it fails. `wanted_root` is as `FetchOptions.root`.

    It is told once by any source, and holds for all that have the same root digest: `known` is what another has told.
    """
    promised = candidate.contents
    if known is not None and accept.root == known.root and (promised is None or promised.root == known.root):
        return known

    making = 0.0 if candidate.is_replica else manifest.nbytes / LEAST_DIGEST_RATE
    told = _ask_for_digests(control, accept, manifest, timeouts.connect, Deadline(timeouts.stall + making))
    evidence = Evidence(tuple(told), root_of(manifest.digest, accept.attributes, told), accept.attributes)
    if promised is not None and promised.root != evidence.root:
        raise SourceRefused(
            f"it holds other contents than those for which {candidate.referrer} named it: its root digest is "
            f"{evidence.root[:16]}..., expected {promised.root[:16]}..."
        )
    if wanted_root and evidence.root != wanted_root:
        raise SourceRefused(other_root(evidence.root, wanted_root))
    return evidence


def other_root(found: str, wanted: str) -> str:
    """What is to be said of a source whose contents have the root digest `found`."""
    return (
        f"it holds other contents than those that were asked for: its root digest is {one_line(found[:16])}..., "
        f"expected {wanted[:16]}..."
    )


def _ask_for_digests(
    control: Channel, accept: Accept, manifest: Manifest, send_timeout: float, deadline: Deadline
) -> list[bytes]:
    """The digests of all chunks, all of which have to come before `deadline`.

    `send_timeout` is how many seconds one request may take.
    """
    if accept.digest != BLAKE3:
        kind = f"its digests are {accept.digest!r}" if accept.digest else 'it has no digests (its VERIFY is "off")'
        raise SourceRefused(f'{one_line(kind)}, and VERIFY is "on" here')

    told: list[bytes] = []
    count = -(-manifest.nbytes // digests.CHUNK_BYTES)
    for first, number in chunks(count, DIGESTS_LIMIT):
        control.send(AskDigests(first, number), send_timeout)
        answer = not_ended(control.receive(deadline))
        assert isinstance(answer, Digests)
        if len(answer.digests) != number or any(len(digest) != DIGEST_BYTES for digest in answer.digests):
            raise ProtocolError(
                f"the source sent {len(answer.digests)} digests: expected {number} of {DIGEST_BYTES} bytes each"
            )
        told += answer.digests
    return told


def verify(memory: Memory, parts: Sequence[Chunk], evidence: Evidence) -> None:
    """Reads `memory`, which somebody else has filled, chunk by chunk.

    Raises Damaged where a chunk is not the one of its digest.
    """
    data = memory.contents()
    for chunk in parts:
        if digest_of(data[chunk.offset : chunk.offset + chunk.length]) != evidence.digests[chunk.number]:
            raise Damaged(f"chunk {chunk.number} of the memory that it shares is not the one of its digest")


def not_ended(message: Message) -> Message:
    """`message`, unless it is the one by which a source ends the session.

    Raises SessionEnded with the source's reason then.
    """
    if isinstance(message, End):
        raise SessionEnded(one_line(message.reason), denies=message.denies)
    return message
