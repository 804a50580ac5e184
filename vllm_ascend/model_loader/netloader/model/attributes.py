"""What loading sets on a model beside its weights.

Some models note facts while they read a checkpoint. An EAGLE draft, for example, notes that it has brought its own
embedding. Copying the weights does not copy that. So a load from disk compares the model before and after, and serves
the flags, numbers and texts that have changed together with the weights. A client sets them on its model.

Other changes, such as a table computed from the checkpoint, or an attribute or module that is deleted, cannot be told
to another process. A model on which loading makes such changes is not served.
"""

from __future__ import annotations

import inspect
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import nn

from vllm_ascend.model_loader.netloader.errors import SourceRefused, UnsupportedModel, one_line
from vllm_ascend.model_loader.netloader.model.tensors import own_tensors, qualified
from vllm_ascend.model_loader.netloader.wire.messages import AttributeValue

_PLAIN_TYPES = (bool, int, float, str, type(None))
"""Types of values that travel. Subclasses do not, such as enumerations: a peer would only see a number or a text."""
_INTEGERS = range(-(1 << 63), 1 << 63)
_SURROGATES = re.compile("[\ud800-\udfff]")
"""Characters for which there is no UTF-8."""
_TEXT_LIMIT = 4096
"""The most characters of a text that travels."""
_MISSING = object()


@dataclass(frozen=True)
class Snapshot:
    """What the modules of a model hold beside weights, by qualified name.

    `modules` are the types of the modules. `tensors` are plain attributes and buffers that are not saved, each with a
    checksum of its contents; views of weights have no checksum, because they change with the weights.
    """

    modules: dict[str, type[nn.Module]]
    attributes: dict[str, object]
    tensors: dict[str, tuple[torch.Tensor, int | None]]

    @classmethod
    def of(cls, model: nn.Module) -> Snapshot:
        """Takes a snapshot of `model` as it is."""
        saved = (tensor for module in model.modules() for _, tensor in own_tensors(module))
        weights = {tensor.untyped_storage().data_ptr() for tensor in saved}
        attributes: dict[str, object] = {}
        tensors: dict[str, tuple[torch.Tensor, int | None]] = {}
        modules = dict(model.named_modules())
        for prefix, module in modules.items():
            attributes |= {qualified(prefix, name): value for name, value in vars(module).items()}
            derived = {name: module._buffers.get(name) for name in module._non_persistent_buffers_set}
            for name, value in (vars(module) | derived).items():
                if isinstance(value, torch.Tensor):
                    tensors[qualified(prefix, name)] = value, _checksum(value, weights)
        return cls({name: type(module) for name, module in modules.items()}, attributes, tensors)

    def changes(self, model: nn.Module) -> dict[str, AttributeValue]:
        """The plain values that `model` has gained since the snapshot, and those that have changed, by qualified name.

        Raises UnsupportedModel, naming modules or attributes, if something else has changed. Changes within other
        objects, such as lists, are not seen.
        """
        after = Snapshot.of(model)
        self._require_same_modules(after)

        changed = [name for name in self.attributes | after.attributes if self._has_changed(name, after)]
        impossible = {name for name in changed if not self._travels(name, after, model)}
        impossible |= {name for name in self.tensors | after.tensors if not self._same_tensor(name, after)}
        if impossible:
            names = ", ".join(sorted(impossible)[:8])
            raise UnsupportedModel(f"loading set {names}, which cannot be told to another process")

        return {name: value for name in changed if _is_plain_value(value := after.attributes[name])}

    def _require_same_modules(self, after: Snapshot) -> None:
        """Raises UnsupportedModel, naming the outermost modules that are gone, new, or of another class."""
        ours, theirs = self.modules, after.modules
        changed = {name for name in ours.keys() | theirs.keys() if ours.get(name) is not theirs.get(name)}
        within = {name for name in changed for other in changed if name.startswith(f"{other}.")}
        if outermost := sorted(changed - within)[:8]:
            happened = (
                "added" if name not in ours else "replaced" if name in theirs else "removed" for name in outermost
            )
            events = ", ".join(f"{verb} the module {name}" for verb, name in zip(happened, outermost, strict=True))
            raise UnsupportedModel(f"loading {events}, which cannot be told to another process")

    def _has_changed(self, name: str, after: Snapshot) -> bool:
        ours, theirs = self.attributes.get(name, _MISSING), after.attributes.get(name, _MISSING)
        if not (_is_scalar(ours) or _is_scalar(theirs)):
            return False
        if type(ours) is not type(theirs):
            return True
        return repr(ours) != repr(theirs) if isinstance(ours, float) else ours != theirs  # of NaN and of -0.0

    def _same_tensor(self, name: str, after: Snapshot) -> bool:
        (ours, before), (theirs, now) = self.tensors.get(name, (None, None)), after.tensors.get(name, (None, None))
        return ours is theirs and before == now

    def _travels(self, name: str, after: Snapshot, model: nn.Module) -> bool:
        prefix, _, attribute = name.rpartition(".")
        if prefix not in self.modules or not _is_plain_value(self.attributes.get(name)):
            return False
        fits = _fits_into_a_message(after.attributes.get(name, _MISSING))
        return fits and _is_settable(type(model.get_submodule(prefix)), attribute)


def require_settable(model: nn.Module, attributes: Mapping[str, AttributeValue]) -> None:
    """Raises SourceRefused if one of the `attributes` from a peer is no plain attribute of a module of `model`."""
    modules = dict(model.named_modules())
    for name in attributes:
        prefix, _, attribute = name.rpartition(".")
        module = modules.get(prefix)
        if module is None or not _is_name(attribute):
            raise SourceRefused(f"the source sets {one_line(repr(name))}, and this model has no such module")
        held = {**module._parameters, **module._buffers, **module._modules}
        current = held.get(attribute, inspect.getattr_static(module, attribute, None))
        if attribute in held or not _is_plain_value(current):
            raise SourceRefused(
                f"the source sets {one_line(repr(name))}, which is a {type(current).__name__} in this model"
            )


def apply(model: nn.Module, attributes: Mapping[str, AttributeValue]) -> None:
    """Sets `attributes` on `model`. Those from a peer must have passed `require_settable`."""
    for name, value in attributes.items():
        prefix, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(prefix), attribute, value)


def _checksum(tensor: torch.Tensor, weights: set[int]) -> int | None:
    if tensor.is_meta or tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        return None
    if tensor.untyped_storage().data_ptr() in weights:
        return None
    values = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().flatten()
    return zlib.crc32(values.view(torch.uint8).numpy().data)


def _is_name(attribute: str) -> bool:
    return attribute.isidentifier() and not attribute.startswith("__")


def _is_settable(module_type: type[nn.Module], attribute: str) -> bool:
    return _is_name(attribute) and _is_plain_value(inspect.getattr_static(module_type, attribute, None))


def _is_scalar(value: object) -> bool:
    """Whether it is a plain value, or like one, as numpy's numbers and members of enumerations are."""
    return value is None or isinstance(value, int | float | str)


def _is_plain_value(value: object) -> TypeGuard[AttributeValue]:
    return type(value) in _PLAIN_TYPES


def _fits_into_a_message(value: object) -> bool:
    if isinstance(value, str):
        return type(value) is str and len(value) <= _TEXT_LIMIT and not _SURROGATES.search(value)
    return _is_plain_value(value) and (type(value) is not int or value in _INTEGERS)
