"""What was loaded, remembered while post-processing changes it, so that it is found again and nothing is held twice.

Of each tensor three things are remembered. Its address, by which it is found if post-processing leaves it alone; the
tensor itself is not held, so what post-processing replaces is freed. A hash of its bytes, which the device makes
(`universal_hash`). And a copy, of tensors that INT8_CACHE covers, and of the smallest ones in any case: scales, biases
and the like are often combined in a way that has no inverse, and all together they are a small part of the weights.
Those are copied to host memory, which is plentiful, and stays where it is while the model sleeps.

Afterwards each possible reading of the processed memory (`inverses`) is tried, until one gives bytes with that hash. So
nothing is served that was only guessed, and what has neither an inverse nor a copy is named.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import nn

from vllm_ascend.model_loader.netloader.model.inverses import AsLoaded, Contents, has_memory, memory_of, readings
from vllm_ascend.model_loader.netloader.model.tensors import held_tensors, persistent_buffers
from vllm_ascend.model_loader.netloader.model.universal_hash import UniversalHash
from vllm_ascend.model_loader.netloader.model.views import has_plain_format
from vllm_ascend.model_loader.netloader.weights.manifest import TensorSpec

logger = logging.getLogger(__name__)

KEPT_SHARE: Final = 0.01
"""Copies are kept of the smallest tensors up to this share of the weights, whatever INT8_CACHE says."""
KEPT_BYTES: Final = 1 << 20
"""Of weights so small that their share is less, copies of so many bytes are kept."""


@dataclass(frozen=True)
class Int8Cache:
    """Which originals are copied before post-processing may change them, and where to.

    `place` is INT8_CACHE: ``hbm``, ``dram``, or ``no``. `names` is INT8_CACHE_NAME: copied are the tensors whose name
    contains one of them, or with None all tensors.
    """

    place: str = "no"
    names: tuple[str, ...] | None = None

    def may_cover(self, name: str) -> bool:
        """Whether the tensor `name` is among those that `names` allows, whatever the place."""
        return self.names is None or any(part in name for part in self.names)


class Holdings:
    """What a model holds after post-processing: tensors by name, and memory by the address at which its storage begins.

    A tensor with several names, as tied embeddings have, is found by each of them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.tensors = dict(model.named_parameters(remove_duplicate=False)) | persistent_buffers(model)
        holders = [*self.tensors.values(), *(tensor for _, tensor in held_tensors(model))]
        plain = (each for each in holders if has_memory(each) and has_plain_format(each))
        self._by_address = {each.untyped_storage().data_ptr(): each for each in plain}

    def memory_at(self, address: int, offset: int, nbytes: int) -> torch.Tensor | None:
        """The `nbytes` bytes at `offset` in the storage at `address`, None if the model no longer has all of them."""
        holder = self._by_address.get(address)
        if holder is None or holder.untyped_storage().nbytes() < offset + nbytes:
            return None
        empty = torch.empty(0, dtype=torch.uint8, device=holder.device)
        return empty.set_(holder.data.untyped_storage(), offset, (nbytes,), (1,))


class Proof:
    """Tells whether contents are the bytes of a tensor as it was loaded, by their hash. It holds no memory of them."""

    def __init__(self, spec: TensorSpec, memory: torch.Tensor, universal_hash: UniversalHash) -> None:
        """`memory` holds the bytes of the tensor that `spec` describes, and is not kept."""
        self._spec = spec
        self._hash = universal_hash
        self._hashed = universal_hash.of(AsLoaded(memory), spec.nbytes)

    def __call__(self, contents: Contents) -> bool:
        try:
            return self._hash.of(contents, self._spec.nbytes) == self._hashed
        except RuntimeError as error:  # from the device; serving may fail, the load may not
            logger.warning(
                "%s cannot be read as %s on %s, so it is not served like that: %s",
                self._spec.name,
                type(contents).__name__,
                contents.memory.device,
                error,
            )
            return False


class Original:
    """What is remembered of one tensor."""

    def __init__(
        self, spec: TensorSpec, memory: torch.Tensor, copy: torch.Tensor | None, universal_hash: UniversalHash
    ) -> None:
        """`memory` holds the bytes of the tensor, and is not kept; `copy` is a copy of them, if one is to be kept."""
        self._spec = spec
        self._copy = copy
        self.proof = Proof(spec, memory, universal_hash)
        self._place = memory.untyped_storage().data_ptr(), int(memory.storage_offset()), memory.nbytes

    def find(self, holdings: Holdings) -> Contents | None:
        """Where the bytes are now: the first reading that gives them, else their copy, else None."""
        found = next((contents for contents in self._readings(holdings) if self.proof(contents)), None)
        return AsLoaded(self._copy) if found is None and self._copy is not None else found

    def is_copy(self, contents: Contents) -> bool:
        """Whether `contents`, which `find` has returned, is the copy."""
        return self._copy is not None and contents.memory is self._copy

    def _readings(self, holdings: Holdings) -> Iterator[Contents]:
        now = holdings.tensors.get(self._spec.name)
        memories = holdings.memory_at(*self._place), None if now is None else memory_of(now)
        seen: set[int] = set()
        for memory in memories:
            if memory is not None and memory.data_ptr() not in seen:
                seen.add(memory.data_ptr())
                yield from readings(self._spec, memory)


def remember(
    parts: Sequence[tuple[TensorSpec, torch.Tensor]], cache: Int8Cache, kept_bytes: int, device: torch.device
) -> dict[str, Original]:
    """Remembers tensors on `device`, each given with the uint8 tensor of its bytes, by name.

    Copied are those that `cache` covers, and besides them the smallest of up to `kept_bytes` bytes together.
    """
    small = set(_smallest(parts, kept_bytes))
    universal_hash = UniversalHash(device)
    originals: dict[str, Original] = {}
    for spec, memory in parts:
        copy: torch.Tensor | None = None
        if cache.place == "hbm" and cache.may_cover(spec.name):
            copy = memory.clone()
        elif spec.name in small or (cache.place == "dram" and cache.may_cover(spec.name)):
            copy = memory.to("cpu", copy=True)
        originals[spec.name] = Original(spec, memory, copy, universal_hash)
    return originals


def kept_bytes_of(nbytes: int) -> int:
    """How many bytes of small tensors are kept of weights of `nbytes` bytes, whatever INT8_CACHE says."""
    return max(int(nbytes * KEPT_SHARE), KEPT_BYTES)


def _smallest(parts: Sequence[tuple[TensorSpec, torch.Tensor]], most: int) -> Iterator[str]:
    taken = 0
    for spec, _ in sorted(parts, key=lambda part: part[0].nbytes):
        taken += spec.nbytes
        if taken > most:
            return
        yield spec.name
