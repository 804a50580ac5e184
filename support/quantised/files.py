"""The files of a checkpoint: read tensor by tensor, written in parts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

PART_BYTES = 1 << 30
COPIED = {".json", ".txt", ".jinja", ".py"}


def tensors_of(checkpoint: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Each in turn, so that one at a time is in memory."""
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  it is no dictionary
                yield name, file.get_tensor(name)


def copy_other_files(source: Path, target: Path) -> None:
    """The configuration, the tokenizer and code, without indices of weights."""
    for path in source.iterdir():
        if path.suffix in COPIED and not path.name.endswith("index.json"):
            shutil.copyfile(path, target / path.name)


def change_json(path: Path, changes: dict[str, Any], without: str = "") -> None:
    content = json.loads(path.read_text())
    content.pop(without, None)
    path.write_text(json.dumps({**content, **changes}, indent=2))


class PartsWriter:
    """Writes NAME-00001-of-00002.safetensors and so on, with an index of which tensor is where."""

    def __init__(self, directory: Path, name: str) -> None:
        self._directory, self._name = directory, name
        self._waiting: dict[str, torch.Tensor] = {}
        self._parts: list[list[str]] = []
        self._bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        if sum(each.nbytes for each in self._waiting.values()) + tensor.nbytes > PART_BYTES:
            self._write()
        self._waiting[name] = tensor.contiguous()
        self._bytes += tensor.nbytes

    def finish(self) -> None:
        self._write()
        places: dict[str, str] = {}
        for number, names in enumerate(self._parts):
            final = f"{self._name}-{number + 1:05d}-of-{len(self._parts):05d}.safetensors"
            self._part(number).rename(self._directory / final)
            places |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self._bytes}, "weight_map": places}
        (self._directory / f"{self._name}.safetensors.index.json").write_text(json.dumps(index, indent=2))

    def _write(self) -> None:
        if self._waiting:
            save_file(self._waiting, self._part(len(self._parts)), metadata={"format": "pt"})
            self._parts.append(list(self._waiting))
            self._waiting = {}

    def _part(self, number: int) -> Path:
        return self._directory / f".{self._name}-{number}.part"
