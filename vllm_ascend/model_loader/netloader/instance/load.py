"""One load of one model into one rank, from the question where its weights come from to the report.

Its steps are methods, because the engine works in between: `fill` an untouched model, post-process it, `publish` what
was loaded, let the ranks meet, `report`. What can be known to be wrong before anything is loaded shows when a load is
made. A load that ends before its weights are published takes back what it has begun.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Final

from torch import nn

from vllm_ascend.model_loader.netloader.config import NetLoaderConfig
from vllm_ascend.model_loader.netloader.errors import ReloadRefused
from vllm_ascend.model_loader.netloader.instance import serving
from vllm_ascend.model_loader.netloader.instance.caching import HostCache
from vllm_ascend.model_loader.netloader.instance.filling import Filler, Loaded
from vllm_ascend.model_loader.netloader.instance.output import OutputFiles
from vllm_ascend.model_loader.netloader.instance.publishing import Published, Publisher
from vllm_ascend.model_loader.netloader.instance.rank import Rank
from vllm_ascend.model_loader.netloader.instance.ranks import meet_ranks
from vllm_ascend.model_loader.netloader.report import LoadReport, Phases
from vllm_ascend.model_loader.netloader.traits import SHARED_MEMORY
from vllm_ascend.model_loader.netloader.transport.base import Transport
from vllm_ascend.model_loader.netloader.transport.digests import BLAKE3
from vllm_ascend.model_loader.netloader.wire.access import Access

logger = logging.getLogger(__name__)

_MIXTURE: Final = "a reload failed halfway, so this instance may have old weights and new ones: start it anew"


class ModelLoad:
    """Brings weights into a model of `rank` and serves them. Its steps run within `failure_reported`."""

    def __init__(
        self, config: NetLoaderConfig, rank: Rank, transports: tuple[Transport, ...], *, reloads: bool = False
    ) -> None:
        """Opens the listener. Raises ConfigError for what cannot be as it is configured.

        `transports` are those by which weights may come and go, best first. `reloads` says that a model in use is to
        get the weights that there are now, whatever there was before.
        """
        rows = [transport.traits for transport in transports]
        config.require_ports(rows, os.environ)
        self._rank = rank
        self._phases = Phases()
        access = Access.configured(config)
        self._output = OutputFiles.of(config, rank.number, rank.role)
        self._publisher = Publisher(config, rank, access, transports, self._output)
        self._published = Published()
        self.summary = LoadReport(
            rank.role,
            rank.number,
            "failed",
            seconds=self._phases.seconds,
            not_served=self._publisher.not_served or None,
        )
        keep = not self._publisher.not_served
        cache = HostCache.of(config, rank.number, access)
        self._filler = Filler(
            config,
            rank,
            access,
            transports,
            keep,
            None if reloads else cache,
            self._publisher.options if keep and config.relays_by(rows) else None,
            self._phases,
            self.summary.attempts,
            self._note_not_served,
        )
        self._undo = contextlib.ExitStack()
        """What is to be taken back if the load ends before its weights are published."""
        self._undo.callback(self._publisher.abandon)

    def fill(self, model: nn.Module) -> Loaded:
        """Fills `model`, which nobody has loaded yet, from the first source that delivers, else from disk.

        Raises SourcesExhausted or UnsupportedModel if FALLBACK forbids the disk, NoRoom if this process would be killed
        for the memory that it takes, or whatever the engine's loader raises.
        """
        loaded = self._filler.fill(model)
        if loaded.kept is not None:
            self._undo.callback(loaded.kept.release)

        self.summary.outcome = "cache" if loaded.cached is not None else "disk" if loaded.fetched is None else "p2p"
        self.summary.bytes = loaded.nbytes
        self._note_not_served(loaded.not_served)
        self._note_transfer(loaded)
        return loaded

    def publish(self, model: nn.Module, loaded: Loaded) -> None:
        """Serves what was `loaded` for as long as `model` lives. Never fails because that is not possible.

        `model` is post-processed. It may be another one than was filled.
        """
        self._undo.pop_all()  # the model has changed by now, so nothing that was served before comes back
        with self._phases("serve"):
            self._published = published = self._publisher.publish(model, loaded)
        if published.server is None:
            self._undo.callback(self._publisher.abandon)

        self.summary.listening = published.listening
        self.summary.changed = published.changed
        self._note_not_served(published.not_served)

    def meet_ranks(self, loaded: Loaded) -> None:
        """Makes all ranks of the instance known to each other. Each has to call it, after it has published.

        They meet for the target model only: of a draft model some ranks may hold nothing.
        """
        if self._rank.role == "target":
            meet_ranks(self._rank, self._publisher.host, self._published.server, loaded.fingerprint)

    def suspend(self) -> None:
        """Ends serving from the parameters of a model in use, which is about to change. `publish` serves again.

        Raises TimeoutError, and nothing has changed, if they are still being read.
        """
        if self._rank.computes_on.type != "cpu":
            self._undo.callback(serving.suspend(self._rank.engine, "its weights are being replaced"))

    @contextlib.contextmanager
    def replacing(self) -> Iterator[None]:
        """Within, a model in use gets its new weights, and they are published.

        If that ends by an exception, the model may have some of both, and what was served before is not served again.
        """
        try:
            yield
        except BaseException:
            self._publisher.give_up(_MIXTURE)
            raise

    def abandon(self) -> None:
        """Takes back what the load has begun, if its weights are not published. A model in use is served as before."""
        self._undo.close()

    @contextlib.contextmanager
    def failure_reported(self) -> Iterator[None]:
        """Abandons and reports a load that ends within by an exception."""
        try:
            yield
        except BaseException:
            self.abandon()
            self.summary.outcome = "failed"
            self.report()
            raise

    def report(self) -> None:
        """Logs a line on how the load went, and writes the report file if one is wanted."""
        logger.info("%s", self.summary.line())
        self._output.write_report(self.summary)

    def _note_not_served(self, reason: str) -> None:
        self.summary.not_served = self._publisher.not_served or reason or self.summary.not_served

    def _note_transfer(self, loaded: Loaded) -> None:
        if loaded.cached is not None:
            self.summary.source, self.summary.transport = loaded.cached.path, SHARED_MEMORY.name
            self.summary.verified, self.summary.root = BLAKE3, loaded.cached.root
        fetched = loaded.fetched
        if fetched is None:
            return
        self.summary.source, self.summary.transport = str(fetched.source), fetched.transport
        self.summary.received, self.summary.shared = dict(loaded.received), dict(loaded.shared)
        if fetched.evidence is not None:
            self.summary.verified, self.summary.root = BLAKE3, fetched.evidence.root


def require_one_checkpoint(loaded: Loaded) -> None:
    """Raises ReloadRefused if the model that was filled may have weights of two checkpoints."""
    if loaded.mixture:
        raise ReloadRefused(f"{loaded.mixture}: nothing was changed, reload again when nobody writes to it")
