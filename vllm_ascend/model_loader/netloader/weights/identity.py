"""Which weights these are, and which part of them one rank holds.

Two values decide whether one process may take the bytes of another. `ModelIdentity` is the model with everything that
changes its bytes, and `RankCoordinates` is the partition. Both are frozen, travel as they are, and answer
`mismatch(other)` with the fields that differ, so that a refusal can name them.

A model is recognised by its contents if possible. If both sides see the files of the checkpoint, their fingerprints
decide, and paths do not matter. If one side does not see them (a client may have no weights at all), the names decide:
the configured MODEL, a repository of the hub, or as a last resort the same path.

A process asks for weights by the identity of the files that it sees, and serves weights under the identity of the bytes
that it has got, from disk or from a source. The two can differ only in the fingerprint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Final

import msgspec

_NAMING: Final = {"name", "revision"}


class Difference(msgspec.Struct, frozen=True, array_like=True):
    """A field in which two sides differ, with the value on each side as text, empty if there is none."""

    field: str
    ours: str
    theirs: str

    def flipped(self) -> Difference:
        """The same difference, as the other side sees it."""
        return Difference(self.field, self.theirs, self.ours)

    def __str__(self) -> str:
        return f"{self.field} (here {self.ours or 'none'}, there {self.theirs or 'none'})"


class RankCoordinates(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A worker's place in the partition of a model.

    The kinds of parallelism are tensor (tp), pipeline (pp), prefill context (pcp) and expert (ep). Data parallelism is
    absent, because the replicas of a rank hold the same bytes.
    """

    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    pcp_rank: int = 0
    pcp_size: int = 1
    ep_rank: int = 0
    ep_size: int = 1
    expert_placement: str = ""

    def mismatch(self, other: RankCoordinates) -> tuple[Difference, ...]:
        """The fields in which `other` differs, with `self` as "here"."""
        return _differing_fields(self, other, self.__struct_fields__)


class ModelIdentity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that decides about the bytes of a model, as one process sees it.

    `name` is MODEL, a repository of the hub, or a path if `name_is_path`. `fingerprint` is empty if no files of the
    checkpoint are known. `load_options` are settings of the engine that change the bytes, as text. `versions` are those
    of the software that must agree on the layout of weights, by package. Digests are in hexadecimal.
    """

    name: str
    architecture: str
    config_digest: str
    dtype: str
    name_is_path: bool = False
    revision: str = ""
    quantization: str = ""
    fingerprint: str = ""
    role: str = "target"
    load_options: str = ""
    versions: Mapping[str, str] = {}

    def mismatch(self, other: ModelIdentity) -> tuple[Difference, ...]:
        """The fields in which `other` differs, with `self` as "here".

        If names had to decide, and differ, the fingerprints are among the fields, to show which side has none.
        """
        exempt = {"name_is_path", *self._fields_without_evidence(other)}
        differing = _differing_fields(self, other, [field for field in self.__struct_fields__ if field not in exempt])
        if "fingerprint" in exempt and any(each.field in _NAMING for each in differing):
            differing += (Difference("fingerprint", self.fingerprint, other.fingerprint),)
        return differing

    def _fields_without_evidence(self, other: ModelIdentity) -> set[str]:
        if not (self.fingerprint and other.fingerprint):
            return {"fingerprint"}
        return _NAMING if self.name_is_path or other.name_is_path else set()


def canonical_digest(value: Any) -> str:
    """The SHA-256 of `value` as JSON with sorted keys, in hexadecimal.

    A set is represented by the sorted texts of its members, and any other object that JSON lacks by its text.
    """
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), default=_as_json)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _as_json(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)


def _differing_fields(ours: msgspec.Struct, theirs: msgspec.Struct, names: Any) -> tuple[Difference, ...]:
    pairs = ((name, getattr(ours, name), getattr(theirs, name)) for name in names)
    return tuple(Difference(name, _text(here), _text(there)) for name, here, there in pairs if here != there)


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {value[key]}" for key in sorted(value))
    return str(value)
