"""What operators write into some tensors, as the memory knows it: whatever loader wrote, and whatever part of a tensor.

vLLM's weight loaders fill one parameter from many tensors: the parts of a fused layer, the experts, each cut to what a
rank holds. All of them end in an operator that changes a view of the parameter. So views are noted, as ranges of bytes
in the storage that they share, and what no range covers has never been written. It works on the meta device, too.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Writes(TorchDispatchMode):
    """A context within which all that operators of this thread write into `tensors` is noted."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        storages = [tensor.untyped_storage() for tensor in tensors]
        self._storages = {storage._cdata: storage for storage in storages}
        self._written: dict[int, list[range]] = {key: [] for key in self._storages}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for index, name in _changed_arguments(func):
            changed = args[index] if index < len(args) else (kwargs or {}).get(name)
            for tensor in changed if isinstance(changed, list | tuple) else [changed]:
                self._note(tensor)
        return result

    def _note(self, tensor: torch.Tensor | None) -> None:
        if tensor is not None and (written := self._written.get(tensor.untyped_storage()._cdata)) is not None:
            written.extend(ranges_of(tensor))

    def left_out(self, tensor: torch.Tensor) -> list[range]:
        """The ranges of bytes, in its storage, of `tensor` that nothing was written into. It must be a watched one."""
        written = _merged(self._written[tensor.untyped_storage()._cdata])
        return [gap for piece in _merged(ranges_of(tensor)) for gap in _without(piece, written)]


@functools.cache
def _changed_arguments(func: Any) -> tuple[tuple[int, str], ...]:
    arguments = enumerate(func._schema.arguments)
    return tuple((index, each.name) for index, each in arguments if each.alias_info and each.alias_info.is_write)


def ranges_of(tensor: torch.Tensor) -> Iterator[range]:
    """Where the elements of `tensor` lie in its storage: ranges of bytes, each in one piece."""
    width, length = tensor.element_size(), 1
    dimensions = sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size != 1)
    while dimensions and dimensions[0][0] == length:
        length *= dimensions.pop(0)[1]
    for offsets in itertools.product(
        *(range(0, stride * size, stride) if stride else (0,) for stride, size in dimensions)
    ):
        start = (tensor.storage_offset() + sum(offsets)) * width
        yield range(start, start + length * width)


def _merged(ranges: Iterable[range]) -> list[range]:
    merged: list[range] = []
    for each in sorted(ranges, key=lambda each: each.start):
        if merged and each.start <= merged[-1].stop:
            merged[-1] = range(merged[-1].start, max(merged[-1].stop, each.stop))
        else:
            merged.append(each)
    return merged


def _without(piece: range, written: Sequence[range]) -> Iterator[range]:
    """What is left of `piece`. `written` is sorted, and its ranges do not touch."""
    start = piece.start
    for each in written:
        if each.start >= piece.stop:
            break
        if each.stop > start:
            if each.start > start:
                yield range(start, each.start)
            start = each.stop
    if start < piece.stop:
        yield range(start, piece.stop)
