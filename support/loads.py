"""Loads without an engine: ranks made of constants, small models, and a checkpoint that holds one number."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn

from support.engines import TRANSPORTS
from support.sources import IDENTITY
from vllm_ascend.model_loader.netloader.checkpoint.fingerprint import checkpoint_fingerprint, files_in
from vllm_ascend.model_loader.netloader.checkpoint.record import ReadRecord
from vllm_ascend.model_loader.netloader.config import NetLoaderConfig, Source
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.instance.filling import Loaded
from vllm_ascend.model_loader.netloader.instance.load import ModelLoad
from vllm_ascend.model_loader.netloader.instance.rank import Rank
from vllm_ascend.model_loader.netloader.model.tensors import current_tensors
from vllm_ascend.model_loader.netloader.transport.base import Transport
from vllm_ascend.model_loader.netloader.weights.identity import RankCoordinates

CPU = torch.device("cpu")


class Model(nn.Module):
    """Two parameters, one buffer, and a flag that loading sets if the checkpoint says so."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.zeros(5, 3), requires_grad=False)
        self.second = nn.Parameter(torch.zeros(4000), requires_grad=False)
        self.register_buffer("scale", torch.zeros(2))
        self.has_own_embedding = False

    @property
    def value(self) -> float:
        """The number that all weights hold. Fails the test if they hold several."""
        (value,) = {float(each) for tensor in current_tensors(self).values() for each in tensor.flatten()}
        return value


@dataclass
class Checkpoint:
    """A folder with one file, whose number becomes that of all weights; `meanwhile` happens while it is loaded."""

    folder: Path
    meanwhile: Callable[[Model], object] = lambda _: None
    times_read: int = 0

    @property
    def file(self) -> Path:
        return self.folder / "model.safetensors"

    def holding(self, value: float) -> Checkpoint:
        """Writes `value` into the file, in place of what it held."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file.write_text(str(value))
        return self

    def fingerprint(self, _: nn.Module | None = None) -> str:
        return checkpoint_fingerprint(files_in(self.folder, [self.file])) if self.file.exists() else ""

    def load(self, model: nn.Module) -> ReadRecord:
        """Loads as an engine does. Raises FileNotFoundError if there is no file."""
        assert isinstance(model, Model)
        record = ReadRecord()
        _, (path,) = record.begin(str(self.folder), [str(self.file)])
        value = float(Path(path).read_text())
        self.times_read += 1
        for tensor in current_tensors(model).values():
            tensor.data.fill_(value)
        self.meanwhile(model)
        return record


class EngineKey:
    """What all loads of one engine share."""


@dataclass
class Instance:
    """One rank of an instance that loads from `checkpoint`, with further keys of the configuration."""

    checkpoint: Checkpoint
    config: dict[str, Any] = field(default_factory=dict)
    rank_values: dict[str, Any] = field(default_factory=dict)
    engine: EngineKey = field(default_factory=EngineKey)
    model: Model = field(default_factory=Model)
    loads: list[ModelLoad] = field(default_factory=list)
    transports: tuple[Transport, ...] = TRANSPORTS
    loaded: Loaded | None = None

    @property
    def rank(self) -> Rank:
        rank = Rank(
            number=0,
            role="target",
            coordinates=RankCoordinates(),
            engine=self.engine,
            computes_on=CPU,
            loads_on=CPU,
            identify=lambda: msgspec.structs.replace(IDENTITY, fingerprint=""),
            fingerprint=self.checkpoint.fingerprint,
            load_from_disk=self.checkpoint.load,
            gather=lambda payload: [payload],
            own_address=lambda: "127.0.0.1",
            progress_bar=lambda _: contextlib.nullcontext(lambda _: None),
            watch_changes=lambda: None,
        )
        return dataclasses.replace(rank, **self.rank_values)

    def begin(self, *sources: Endpoint) -> ModelLoad:
        """A load that asks `sources` first. Raises ConfigError."""
        config = NetLoaderConfig(**{"listen_host": "127.0.0.1", "source": tuple(map(Source, sources))} | self.config)
        self.loads.append(ModelLoad(config, self.rank, self.transports))
        return self.loads[-1]

    def start(self, *sources: Endpoint, process: Callable[[Model], object] = lambda _: None) -> Instance:
        """Does all the steps of a start, with `process` in the place of post-processing."""
        load = self.begin(*sources)
        with load.failure_reported():
            self.loaded = load.fill(self.model)
            process(self.model)
            load.publish(self.model, self.loaded)
            load.meet_ranks(self.loaded)
        load.report()
        return self

    @property
    def summary(self) -> Any:
        """The report of the last load."""
        return self.loads[-1].summary

    @property
    def address(self) -> Endpoint:
        return Endpoint.parse(self.summary.listening)
