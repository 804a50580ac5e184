"""What is known of pages beside the pages, and the proof that pages are what is known of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import msgspec

from vllm_ascend.model_loader.netloader.cache.messages import Note, Want
from vllm_ascend.model_loader.netloader.errors import Damaged, ProtocolError
from vllm_ascend.model_loader.netloader.transport import digests as chunked
from vllm_ascend.model_loader.netloader.transport.digests import DIGEST_BYTES, digest_of, root_of
from vllm_ascend.model_loader.netloader.transport.store import Request
from vllm_ascend.model_loader.netloader.weights.arena import Arena
from vllm_ascend.model_loader.netloader.weights.identity import ModelIdentity
from vllm_ascend.model_loader.netloader.weights.manifest import Manifest, chunks
from vllm_ascend.model_loader.netloader.wire.access import Access
from vllm_ascend.model_loader.netloader.wire.messages import AttributeValue


@dataclass(frozen=True, eq=False)
class Contents:
    """The weights of one rank, without their bytes. A Note says the same in a message.

    `digests` are those of all chunks, None where they are not known yet. `guards` is what kept strangers away from
    these weights where they come from, see `guards_of`.
    """

    request: Request
    attributes: Mapping[str, AttributeValue] = field(default_factory=dict)
    digests: tuple[bytes, ...] | None = None
    guards: frozenset[str] = frozenset()

    @classmethod
    def told_by(cls, note: Note) -> Contents:
        """What `note` says. Raises ProtocolError if that is not consistent."""
        manifest = Manifest.decode(note.manifest)
        expected = len(list(chunks(manifest.nbytes, chunked.CHUNK_BYTES))) * DIGEST_BYTES
        if note.digests and len(note.digests) != expected:
            raise ProtocolError(f"the digests have {len(note.digests)} bytes: expected {expected}")
        parts = (note.digests[at : at + DIGEST_BYTES] for at in range(0, len(note.digests), DIGEST_BYTES))
        request = Request(note.identity, note.coordinates, manifest)
        digests = tuple(parts) if note.digests or not expected else None
        return cls(request, note.attributes, digests, frozenset(note.guards))

    @property
    def note(self) -> Note:
        """The same as a part of a message."""
        identity, coordinates, manifest = self.request.identity, self.request.coordinates, self.request.manifest
        digests = b"".join(self.digests or ())
        return Note(identity, coordinates, manifest.encoded, dict(self.attributes), digests, tuple(sorted(self.guards)))

    @property
    def nbytes(self) -> int:
        """The size of the weights in bytes."""
        return self.request.manifest.nbytes

    @cached_property
    def root(self) -> str:
        """The root digest in hexadecimal, empty as long as digests are not known."""
        if self.digests is None:
            return ""
        return root_of(self.request.manifest.digest, self.attributes, self.digests)

    def why_not(self, want: Want) -> str:
        """Why these are not the weights that an engine wants; empty if they are."""
        mine = self.request
        differing = mine.identity.mismatch(want.identity) + mine.coordinates.mismatch(want.coordinates)
        if differing:
            return ", ".join(map(str, differing))
        return "" if mine.manifest.digest == want.manifest_digest else "the tensors differ"

    def is_of_the_same_rank(self, other: Contents) -> bool:
        """Whether both are of one rank of one model, whatever checkpoint their bytes are from.

        An engine that sees no files knows such weights by name, so it could be given either.
        """
        return not (
            _without_files(self).mismatch(_without_files(other))
            or self.request.coordinates.mismatch(other.request.coordinates)
        )


def guards_of(access: Access) -> frozenset[str]:
    """What keeps strangers away from weights that are served under `access`."""
    found = {"token": access.token is not None, "tls": access.server_tls is not None}
    return frozenset(name for name, is_there in found.items() if is_there)


def verified(contents: Contents, pages: Arena, is_sure_of: Callable[[int], bool]) -> Contents | None:
    """Reads all `pages`, and returns `contents` with the digests of every chunk.

    `is_sure_of` is told after each chunk how many bytes have passed, and says whether to go on; if not, the result is
    None. Raises Damaged if a chunk is not the one of its digest.
    """
    data, found = pages.reader(), list[bytes]()
    for offset, length in chunks(contents.nbytes, chunked.CHUNK_BYTES):
        digest = digest_of(data[offset : offset + length])
        if contents.digests is not None and contents.digests[len(found)] != digest:
            raise Damaged(f"chunk {len(found)} of the pages is not the one of its digest")
        found.append(digest)
        if not is_sure_of(offset + length):
            return None
    return replace(contents, digests=tuple(found))


def _without_files(contents: Contents) -> ModelIdentity:
    return msgspec.structs.replace(contents.request.identity, fingerprint="")
