"""What a rank asks for, and what a server hands out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from vllm_ascend.model_loader.netloader.transport.digests import StoreDigests, root_of
from vllm_ascend.model_loader.netloader.weights.identity import ModelIdentity, RankCoordinates
from vllm_ascend.model_loader.netloader.weights.manifest import Manifest
from vllm_ascend.model_loader.netloader.weights.memory import Memory, Readable
from vllm_ascend.model_loader.netloader.wire.messages import AttributeValue


@dataclass(frozen=True)
class Request:
    """The weights that one rank needs."""

    identity: ModelIdentity
    coordinates: RankCoordinates
    manifest: Manifest


@dataclass(frozen=True)
class WeightStore:
    """Memory that stays as it is, its manifest, and a generation that grows whenever a process replaces these weights.

    `memory` must be servable; whoever publishes the store closes it. `attributes` is what else loading has set on the
    model; without `digests`, clients cannot verify what they get.
    """

    manifest: Manifest
    memory: Memory
    generation: int
    attributes: Mapping[str, AttributeValue] = field(default_factory=dict)
    digests: StoreDigests | None = None

    @cached_property
    def bytes(self) -> Readable:
        """All bytes, read-only, in the manifest's address space."""
        return self.memory.reader()

    def root(self) -> str:
        """The root digest of the contents; makes what digests there are not. Empty where there are to be none."""
        return "" if self.digests is None else self._root

    @cached_property
    def _root(self) -> str:
        assert self.digests is not None
        return root_of(self.manifest.digest, self.attributes, self.digests.all())

    def root_if_known(self) -> str:
        """As `root`, but empty as long as a digest is missing, so that it costs nothing."""
        return self.root() if self.digests is not None and self.digests.complete else ""

    def close(self) -> None:
        """Gives up the memory; a session that still reads from an arena keeps its mapping. Idempotent."""
        if self.digests is not None:
            self.digests.stop()
        self.memory.close()
