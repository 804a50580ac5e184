"""What loading sets on a model beside the contents of its tensors.

Some models note facts while they read a checkpoint: an EAGLE draft, for example, that it brought its own embedding. A
copy of the weights alone does not carry that. So whoever loads from disk compares the modules before and after, and
serves the flags, numbers and texts that changed together with the weights; a client sets them on its model. What
else may change (a tensor held as a plain attribute, an attribute deleted) cannot be told to another process.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import nn

from vllm_ascend.model_loader.netloader.errors import ProtocolError, UnsupportedModel

Plain = bool | int | float | str | None
"""An attribute's value that travels."""

_PLAIN_TYPES = (bool, int, float, str, type(None))
"""Exactly these: an enumeration's members are numbers or texts to `isinstance`, and no more than that to a peer."""
_INTEGERS = range(-(1 << 63), 1 << 63)
_SURROGATES = re.compile("[\ud800-\udfff]")
"""Of which there is no UTF-8."""
_TEXT_LIMIT = 4096
"""Characters of a text in a message."""


@dataclass(frozen=True)
class Snapshot:
    """Which modules a model has, by name, and what they hold as attributes of their own, by qualified name."""

    modules: frozenset[str]
    attributes: dict[str, object]

    @classmethod
    def of(cls, model: nn.Module) -> Snapshot:
        modules = dict(model.named_modules())
        held = {
            qualified(prefix, name): value for prefix, each in modules.items() for name, value in vars(each).items()
        }
        return cls(frozenset(modules), held)

    def changes(self, model: nn.Module) -> dict[str, Plain]:
        """The plain values that `model` has gained or changed since.

        Raises UnsupportedModel, naming the attributes, where something else happened that another process cannot be
        told. What happens within other objects, such as lists, is not seen.
        """
        after = Snapshot.of(model)
        names = [*after.attributes, *(name for name in self.attributes if name not in after.attributes)]
        changed = {name: after.attributes.get(name) for name in names if self._is_changed(name, after)}
        if impossible := sorted(name for name in changed if not self._travels(name, after)):
            raise UnsupportedModel(f"loading set {', '.join(impossible[:8])}, which cannot be told to another process")
        return {name: value for name, value in changed.items() if _is_plain(value)}

    def _is_changed(self, name: str, after: Snapshot) -> bool:
        if name not in after.attributes or name not in self.attributes:
            known = self.attributes.get(name, after.attributes.get(name))
            return _is_plain(known) or isinstance(known, torch.Tensor)
        ours, theirs = self.attributes[name], after.attributes[name]
        if _is_plain(ours) and _is_plain(theirs):
            return not _same(ours, theirs)
        return ours is not theirs and any(_is_plain(each) or isinstance(each, torch.Tensor) for each in (ours, theirs))

    def _travels(self, name: str, after: Snapshot) -> bool:
        prefix, _, attribute = name.rpartition(".")
        value = after.attributes.get(name)
        return (
            name in after.attributes
            and prefix in self.modules
            and attribute.isidentifier()
            and _is_plain(self.attributes.get(name))
            and _fits_into_a_message(value)
        )


def require_settable(model: nn.Module, attributes: Mapping[str, Plain]) -> None:
    """Raises ProtocolError where `attributes` from a peer are not plain attributes of `model`'s own modules."""
    modules = dict(model.named_modules())
    for name in attributes:
        prefix, _, attribute = name.rpartition(".")
        module = modules.get(prefix)
        if module is None or not attribute.isidentifier() or attribute.startswith("__"):
            raise ProtocolError(f"the source sets {name!r}, and this model has no such module")
        held = {**module._parameters, **module._buffers, **module._modules}
        current = held.get(attribute, inspect.getattr_static(module, attribute, None))
        if attribute in held or not _is_plain(current):
            raise ProtocolError(f"the source sets {name!r}, which is a {type(current).__name__} in this model")


def apply(model: nn.Module, attributes: Mapping[str, Plain]) -> None:
    """Sets what `require_settable` has let pass."""
    for name, value in attributes.items():
        prefix, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(prefix), attribute, value)


def qualified(prefix: str, name: str) -> str:
    """How torch names what a module holds; `prefix` is the module's own name, empty for the model itself."""
    return f"{prefix}.{name}" if prefix else name


def _is_plain(value: object) -> TypeGuard[Plain]:
    return type(value) in _PLAIN_TYPES


def _fits_into_a_message(value: object) -> bool:
    if isinstance(value, str):
        return type(value) is str and len(value) <= _TEXT_LIMIT and not _SURROGATES.search(value)
    return _is_plain(value) and (type(value) is not int or value in _INTEGERS)


def _same(before: Plain, after: Plain) -> bool:
    """Tells 1 from True and 1.0, and 0.0 from -0.0; NaN is itself."""
    if type(before) is not type(after):
        return False
    return repr(before) == repr(after) if isinstance(before, float) else before == after
