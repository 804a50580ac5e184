"""What loading sets on a model beside the contents of its tensors.

Some models note facts while they read a checkpoint: an EAGLE draft, for example, that it brought its own embedding. A
copy of the weights alone does not carry that. So whoever loads from disk compares the modules before and after, and
serves the flags, numbers and texts that changed together with the weights; a client sets them on its model. What
else may change (a tensor held as a plain attribute, an attribute deleted) cannot be told to another process.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from vllm_ascend.model_loader.netloader.errors import ProtocolError, UnsupportedModel

Plain = bool | int | float | str | None
"""An attribute's value that travels."""

_INT64 = range(-(1 << 63), 1 << 63)


def snapshot(model: nn.Module) -> dict[str, Plain | torch.Tensor]:
    """The plain values and the tensors that modules hold as their own attributes, by qualified name."""
    found: dict[str, Plain | torch.Tensor] = {}
    for prefix, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor | bool | int | float | str) or value is None:
                found[qualified(prefix, name)] = value
    return found


def changes(before: Mapping[str, Plain | torch.Tensor], model: nn.Module) -> dict[str, Plain]:
    """The plain values that `model` has gained or changed since the `snapshot` `before`.

    Raises UnsupportedModel, naming the attributes, where something else happened.
    """
    after = snapshot(model)
    changed = [name for name in after if name not in before or not _same(before[name], after[name])]
    gone = [name for name in before if name not in after]
    if impossible := sorted([*gone, *(name for name in changed if not _travels(after[name]))]):
        raise UnsupportedModel(f"loading set {', '.join(impossible[:8])}, which cannot be told to another process")
    return {name: value for name in changed if not isinstance(value := after[name], torch.Tensor)}


def require_settable(model: nn.Module, attributes: Mapping[str, Plain]) -> None:
    """Raises ProtocolError where `attributes` from a peer are not plain attributes of `model`'s own modules."""
    modules = dict(model.named_modules())
    for name in attributes:
        prefix, _, attribute = name.rpartition(".")
        module = modules.get(prefix)
        if module is None or not attribute.isidentifier() or attribute.startswith("__"):
            raise ProtocolError(f"the source sets {name!r}, and this model has no such module")
        current = getattr(module, attribute, None)
        if not isinstance(current, bool | int | float | str | None):
            raise ProtocolError(f"the source sets {name!r}, which is a {type(current).__name__} in this model")


def apply(model: nn.Module, attributes: Mapping[str, Plain]) -> None:
    """Sets what `require_settable` has let pass."""
    for name, value in attributes.items():
        prefix, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(prefix), attribute, value)


def qualified(prefix: str, name: str) -> str:
    """How torch names what a module holds; `prefix` is the module's own name, empty for the model itself."""
    return f"{prefix}.{name}" if prefix else name


def _same(before: Plain | torch.Tensor, after: Plain | torch.Tensor) -> bool:
    if isinstance(before, torch.Tensor) or isinstance(after, torch.Tensor):
        return before is after
    return repr(before) == repr(after)  # tells 1 from True and 1.0, and NaN is itself


def _travels(value: Plain | torch.Tensor) -> bool:
    if isinstance(value, torch.Tensor):
        return False
    return isinstance(value, bool) or not isinstance(value, int) or value in _INT64
