"""One pull: from the addresses of an instance to a directory that vLLM loads.

First everything is found out that can be wrong: which model it is, whether all of its ranks can be had, whether the
format can hold them, whether there is room. Then the weights come, one rank after another, each into a file that has
its final name only when all of them are there. So a directory never has the weights of two checkpoints: all ranks are
of one identity, and with several of them the instance is asked again in the end whether it still has what it had.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec

from vllm_ascend.model_loader.netloader.checkpoint.note import Note
from vllm_ascend.model_loader.netloader.client.fetch import Client
from vllm_ascend.model_loader.netloader.client.options import FetchOptions
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import (
    CannotBeWritten,
    DirectoryFailed,
    SourceError,
    SourcesExhausted,
    TransportError,
    one_line,
)
from vllm_ascend.model_loader.netloader.holding.request import request_for
from vllm_ascend.model_loader.netloader.holding.survey import Offered, Survey, survey
from vllm_ascend.model_loader.netloader.pull.directory import Directory, open_directory
from vllm_ascend.model_loader.netloader.pull.file_memory import FileMemory
from vllm_ascend.model_loader.netloader.pull.sharded_state import (
    file_name,
    layout_of,
    require_expressible,
    require_no_attributes,
)
from vllm_ascend.model_loader.netloader.pull.small_files import CONFIGURATION, configured, files_at
from vllm_ascend.model_loader.netloader.transport.base import Timeouts
from vllm_ascend.model_loader.netloader.transport.registry import transports
from vllm_ascend.model_loader.netloader.transport.store import Request
from vllm_ascend.model_loader.netloader.weights.identity import RankCoordinates
from vllm_ascend.model_loader.netloader.wire.access import Access

_TRANSPORTS: Final = ("tcp",)
"""Those that copy into a file. Pages of another process are no file of the directory."""

Bar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""Shows the progress of what has a name and so many bytes, as long as it is open."""


class PulledRank(msgspec.Struct, frozen=True):
    """The weights of one rank: the file, its weights and what of them had to be fetched, in bytes, and the root."""

    file: str
    tp_rank: int
    pp_rank: int
    bytes: int
    fetched: int
    root: str


class Pulled(msgspec.Struct, frozen=True):
    """What a pull has written. `left_out` says, by role, what is not in the directory, and why."""

    directory: str
    name: str
    fingerprint: str
    files: tuple[str, ...]
    ranks: tuple[PulledRank, ...]
    left_out: dict[str, str]
    tp_size: int
    pp_size: int
    seconds: float


@dataclass(frozen=True)
class _Part:
    """The weights of one rank, how they are asked for, and the file that they go to."""

    offered: Offered
    request: Request
    memory: FileMemory


@dataclass
class Pull:
    """Writes what an instance holds, which is reached at `sources`, into the directory `out`.

    `bar` shows the progress of each rank.
    """

    sources: Sequence[Endpoint]
    out: Path
    access: Access = field(default_factory=Access)
    timeouts: Timeouts = field(default_factory=Timeouts)
    files_only: bool = False
    bar: Bar = lambda _, __: contextlib.nullcontext(lambda _: None)

    def run(self) -> Pulled:
        """Raises SourcesExhausted where the sources do not deliver, CannotBeWritten for what vLLM's format cannot
        hold, and DirectoryFailed where the directory cannot be written.
        """
        begun = time.monotonic()
        with open_directory(self.out) as directory:
            offered, left_out = self._chosen(survey(self.sources, self.timeouts.connect, self.access))
            first = offered[0]
            if self.files_only:
                _require_known(first, directory)
            else:
                for each in offered:
                    require_expressible(each.identity, each.coordinates)

            note = _note_of(first)
            files = self._read_files(directory, first)
            directory.write_note(note)
            ranks: tuple[PulledRank, ...] = ()
            with contextlib.ExitStack() as opened:
                parts = [] if self.files_only else [self._part(each, directory, opened) for each in offered]
                ranks = tuple(self._fetch(part) for part in parts)
                if len(parts) > 1:
                    self._require_unchanged(offered, ranks)
                # What is replaced goes first, so that a start in between finds too little and never a mixture.
                for part in parts:
                    part.memory.retire()
                for name, contents in files.items():
                    directory.write(name, contents)
                for part in parts:
                    part.memory.finish()

            if ranks:
                directory.remove_weights(unless={rank.file for rank in ranks})
                roots = {rank.file: rank.root for rank in ranks}
                directory.write_note(msgspec.structs.replace(note, roots=roots))
            directory.settle()

        place = first.coordinates
        return Pulled(
            directory=str(self.out),
            name=first.identity.name,
            fingerprint=first.identity.fingerprint,
            files=tuple(sorted(files)),
            ranks=ranks,
            left_out=left_out,
            tp_size=place.tp_size,
            pp_size=place.pp_size,
            seconds=round(time.monotonic() - begun, 3),
        )

    def _chosen(self, found: Survey) -> tuple[tuple[Offered, ...], dict[str, str]]:
        """The target weights of all ranks, and what else is held and left out. Raises SourcesExhausted."""
        targets = [each for each in found.offered if each.role == "target"]
        if not targets:
            raise SourcesExhausted(_reasons(found) or ["it holds no weights"])
        first = targets[0]
        for each in targets:
            if differences := first.identity.mismatch(each.identity):
                raise SourcesExhausted(
                    [
                        f"{first.endpoints[0]} and {each.endpoints[0]} hold different models: "
                        f"{one_line('; '.join(map(str, differences)))}"
                    ]
                )

        by_place: dict[tuple[int, int], Offered] = {}
        for each in targets:
            place = (each.coordinates.pp_rank, each.coordinates.tp_rank)
            other = by_place.setdefault(place, each)
            if other is not each and other.coordinates == each.coordinates:
                raise SourcesExhausted(
                    [f"{other.endpoints[0]} and {each.endpoints[0]} hold different weights of the same rank"]
                )
        if not self.files_only:
            _require_all(first.coordinates, by_place, found)
        roles = {each.role for each in found.offered} - {"target"}
        left_out = dict.fromkeys(sorted(roles), "the format holds one model, the target")
        return tuple(by_place[place] for place in sorted(by_place)), {} if self.files_only else left_out

    def _part(self, offered: Offered, directory: Directory, opened: contextlib.ExitStack) -> _Part:
        """Raises as `run`."""
        request = request_for(offered, self.timeouts.connect, self.access)
        layout = layout_of(request.manifest)
        memory = FileMemory(directory.path / file_name(offered.coordinates), layout, request.manifest.nbytes)
        opened.callback(memory.close)
        return _Part(offered, request, memory)

    def _fetch(self, part: _Part) -> PulledRank:
        """Brings what is missing in the file of one rank. Raises as `run`."""
        memory, coordinates = part.memory, part.offered.coordinates
        with self.bar(memory.path.name, memory.nbytes) as progress:
            options = FetchOptions(
                part.request,
                self.timeouts,
                self.access,
                disk_remains=False,
                allocate=lambda _: memory,
                check_attributes=require_no_attributes,
                progress=progress,
                root=part.offered.root,
                found=memory.digests(),
            )
            client = Client(options, transports(_TRANSPORTS))
            try:
                fetched = client.fetch(part.offered.endpoints)
            except SourcesExhausted as error:
                if memory.failure is not None:
                    raise memory.failure from error
                raise
        assert fetched.evidence is not None, "what is pulled is verified"
        return PulledRank(
            file=memory.path.name,
            tp_rank=coordinates.tp_rank,
            pp_rank=coordinates.pp_rank,
            bytes=memory.nbytes,
            fetched=client.received.total(),
            root=fetched.evidence.root,
        )

    def _read_files(self, directory: Directory, expected: Offered) -> dict[str, bytes]:
        """The small files that a source tells, by name. Raises SourcesExhausted."""
        reasons: list[str] = []
        for endpoint in expected.endpoints:
            try:
                with files_at(endpoint, expected.identity, self.timeouts.connect, self.access) as source:
                    if CONFIGURATION not in source.files:
                        raise SourcesExhausted([f"{endpoint}: its model has no {CONFIGURATION}"])
                    files = {name: source.read(name) for name in source.files}
                    files[CONFIGURATION] = configured(
                        files[CONFIGURATION], source.resolved, expected.identity.quantization
                    )
            except (SourceError, TransportError) as error:
                reasons.append(f"{endpoint}: {error}")
            else:
                return {name: each for name, each in files.items() if directory.contents(name) != each}
        raise SourcesExhausted(reasons)

    def _require_unchanged(self, before: Sequence[Offered], ranks: Sequence[PulledRank]) -> None:
        """Raises SourcesExhausted unless the instance has all that was fetched, at one moment.

        A reload between two ranks would leave the weights of two checkpoints.
        """
        found = survey(self.sources, self.timeouts.connect, self.access)
        now = {each.coordinates: each for each in found.offered if each.role == "target"}
        for offered, rank in zip(before, ranks, strict=True):
            current = now.get(offered.coordinates)
            if current is None or not _is_still(current, offered, rank):
                raise SourcesExhausted(
                    [
                        f"{offered.endpoints[0]} does not have any more what was fetched from it as {rank.file}, or "
                        f"does not answer: run the command again, which takes what is still right",
                        *_reasons(found),
                    ]
                )


def _require_all(first: RankCoordinates, there: Mapping[tuple[int, int], Offered], found: Survey) -> None:
    """Raises SourcesExhausted where the weights of a rank cannot be had."""
    for pp_rank in range(first.pp_size):
        for tp_rank in range(first.tp_size):
            if (pp_rank, tp_rank) not in there:
                raise SourcesExhausted(
                    [
                        f"nobody has told of tensor parallel rank {tp_rank} of {first.tp_size}, pipeline parallel rank "
                        f"{pp_rank} of {first.pp_size}: not all ranks serve, or their addresses are missing",
                        *_reasons(found),
                    ]
                )


def _is_still(current: Offered, before: Offered, rank: PulledRank) -> bool:
    """Whether `current` is what was fetched. As long as its root is not known, its generation says so."""
    if current.identity.mismatch(before.identity):
        return False
    return current.root == rank.root if current.root else current.generation == before.generation


def _require_known(offered: Offered, directory: Directory) -> None:
    """Raises CannotBeWritten where nothing would tell an instance without weight files which model this is."""
    identity = offered.identity
    if not identity.fingerprint and identity.name_is_path:
        raise CannotBeWritten(
            "a note of the checkpoint: the source has no fingerprint and knows its model by a path only"
        )
    if directory.weights:
        raise DirectoryFailed(f"{directory.path} has weights, by which an instance goes: name another directory")


def _note_of(offered: Offered) -> Note:
    identity = offered.identity
    if identity.name_is_path:
        return Note(identity.fingerprint)
    return Note(identity.fingerprint, identity.name, identity.revision)


def _reasons(found: Survey) -> list[str]:
    unreached = [f"{endpoint}: {error}" for endpoint, error in found.unreached.items()]
    declined = [
        f"{endpoint}: it cannot serve its {one_line(role)} weights: {one_line(reason)}"
        for endpoint, reasons in found.declined.items()
        for role, reason in reasons.items()
    ]
    return unreached + declined
