"""What a client verifies bytes by: the digests of the source's chunks, and the root digest over all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vllm_ascend.model_loader.netloader.client.search.order import Candidate
from vllm_ascend.model_loader.netloader.errors import Damaged, ProtocolError, SessionEnded, SourceRefused, one_line
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


@dataclass(frozen=True)
class Evidence:
    """The digests of all chunks, in order, and the root digest of the contents, in hexadecimal.

    `attributes` is what the source has told beside, and what the root covers too.
    """

    digests: tuple[bytes, ...]
    root: str
    attributes: Mapping[str, AttributeValue] = field(default_factory=dict)


def obtain(
    control: Channel, accept: Accept, manifest: Manifest, *, count: int, send_timeout: float, deadline: Deadline
) -> Evidence:
    """Asks the source for the digests of its `count` chunks, all of which have to come before `deadline`.

    `send_timeout` is how many seconds one request may take. Raises SourceRefused where the source has no digests of the
    kind that is wanted, PeerError where it fails.
    """
    if accept.digest != BLAKE3:
        kind = f"its digests are {accept.digest!r}" if accept.digest else 'it has no digests (its VERIFY is "off")'
        raise SourceRefused(f'{one_line(kind)}, and VERIFY is "on" here')

    digests: list[bytes] = []
    for first, number in chunks(count, DIGESTS_LIMIT):
        control.send(AskDigests(first, number), send_timeout)
        answer = not_ended(control.receive(deadline))
        assert isinstance(answer, Digests)
        if len(answer.digests) != number or any(len(digest) != DIGEST_BYTES for digest in answer.digests):
            raise ProtocolError(
                f"the source sent {len(answer.digests)} digests: expected {number} of {DIGEST_BYTES} bytes each"
            )
        digests += answer.digests
    return Evidence(tuple(digests), root_of(manifest.digest, accept.attributes, digests), accept.attributes)


def require_promised(evidence: Evidence, candidate: Candidate) -> None:
    """Raises SourceRefused where the replica `candidate` holds something else than its referrer has promised."""
    promised = candidate.contents
    if promised is not None and promised.root != evidence.root:
        raise SourceRefused(
            f"it holds other contents than those for which {candidate.referrer} named it: its root digest is "
            f"{evidence.root[:16]}..., expected {promised.root[:16]}..."
        )


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
