"""What a rank asks for, and what a server hands out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from vllm_ascend.model_loader.netloader.transport import digests as chunked
from vllm_ascend.model_loader.netloader.transport.chunks.log import ChunkLog
from vllm_ascend.model_loader.netloader.transport.claims import Claim
from vllm_ascend.model_loader.netloader.transport.digests import StoreDigests, root_of
from vllm_ascend.model_loader.netloader.weights.identity import ModelIdentity, RankCoordinates
from vllm_ascend.model_loader.netloader.weights.manifest import Manifest
from vllm_ascend.model_loader.netloader.weights.memory import Memory, Readable
from vllm_ascend.model_loader.netloader.wire.messages import AttributeValue


@dataclass(frozen=True)
class Request:
    """The weights that one rank needs: which model and role, which part of it, and how its tensors are laid out."""

    identity: ModelIdentity
    coordinates: RankCoordinates
    manifest: Manifest


@dataclass(frozen=True)
class WeightStore:
    """Weights that can be served: memory whose contents no longer change, and what clients must know of it.

    `memory` must be servable, except that of a store which is being filled: there, `held` has the chunks that have
    passed, which are the ones that do not change, and is closed when the store is complete. `generation` grows whenever
    a process replaces these weights. `attributes` is what loading has set on the model beside its tensors. Without
    `digests`, clients cannot verify what they get. `claim` tells other processes of this host that the contents are
    here. Whoever publishes the store closes it.
    """

    manifest: Manifest
    memory: Memory
    generation: int
    attributes: Mapping[str, AttributeValue] = field(default_factory=dict)
    digests: StoreDigests | None = None
    held: ChunkLog | None = None
    claim: Claim | None = None
    sent: ChunkLog = field(init=False)
    """The chunks that were sent to some client."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "sent", ChunkLog(-(-self.manifest.nbytes // chunked.CHUNK_BYTES)))

    @property
    def is_filling(self) -> bool:
        """Whether the process itself still loads these weights, so that it cannot confirm them."""
        return self.held is not None and not self.held.is_closed

    @property
    def nbytes_held(self) -> int:
        """The bytes that can be had by now, to a chunk."""
        whole = self.manifest.nbytes
        return min(len(self.held) * chunked.CHUNK_BYTES, whole) if self.held is not None else whole

    @cached_property
    def bytes(self) -> Readable:
        """All bytes, read-only, in the manifest's address space."""
        return self.memory.reader()

    def root(self) -> str:
        """The root digest of the contents, in hexadecimal. Empty for a store without digests.

        Makes the digests that do not exist yet, which reads the memory.
        """
        return "" if self.digests is None else self._root

    @cached_property
    def _root(self) -> str:
        assert self.digests is not None
        return root_of(self.manifest.digest, self.attributes, self.digests.all())

    def root_if_known(self) -> str:
        """The root digest of the contents if all digests exist and are proven, so that nothing has to be read.

        Otherwise empty.
        """
        return self.root() if self.digests is not None and self.digests.complete else ""

    def close(self) -> None:
        """Gives up the memory. A session that still reads from an arena keeps its own mapping of it. Idempotent."""
        self.give_up_claim()
        if self.digests is not None:
            self.digests.stop()
        self.memory.close()

    def give_up_claim(self) -> None:
        """Tells other processes of this host of these weights no more. Idempotent."""
        if self.claim is not None:
            self.claim.close()
