"""Engines as `serving` knows them: objects that load models of small tensors and are served at an address."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import msgspec
from torch import nn

from support.sources import IDENTITY, Tensors
from vllm_ascend.model_loader.netloader.config import NetLoaderConfig
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.instance import serving
from vllm_ascend.model_loader.netloader.transport.base import Timeouts, Transport
from vllm_ascend.model_loader.netloader.transport.in_process import InProcessTransport
from vllm_ascend.model_loader.netloader.transport.sender import Sender
from vllm_ascend.model_loader.netloader.transport.store import WeightStore
from vllm_ascend.model_loader.netloader.weights.identity import ModelIdentity
from vllm_ascend.model_loader.netloader.wire.access import Access
from vllm_ascend.model_loader.netloader.wire.pacing import Pacer


class StuckTransport(InProcessTransport):
    """Whose sessions do not end before `go` is set, by a fault of the server's own."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()

    def sender(self, store: WeightStore, timeouts: Timeouts, pacer: Pacer) -> Sender:
        sender = super().sender(store, timeouts, pacer)
        sender.run = self.go.wait  # type: ignore[method-assign, assignment]
        return sender


TRANSPORTS: tuple[Transport, ...] = (InProcessTransport(),)


class Engine:
    """What serving knows of one: an object that its loads share, and its models."""

    def __init__(self, name: str = "org/model", **config: Any) -> None:
        self.name = name
        self.options = serving.ServeOptions(
            NetLoaderConfig(listen_host="127.0.0.1", **config), Access(), TRANSPORTS, rank=0, engine=self
        )
        self.models: dict[str, nn.Module] = {}

    def begins(self, role: str = "target", **config: Any) -> None:
        """A load, with options of its own."""
        config_now = replace(self.options.config, **config)
        self.options = replace(self.options, config=config_now)
        serving.open_listener(role, self.options)

    def loads(self, tensors: Tensors, role: str = "target", fingerprint: str = "f00d", **config: Any) -> Endpoint:
        """Loads `tensors` and serves them. Returns where."""
        self.begins(role, **config)
        model = self.models.setdefault(role, nn.Module())
        request = tensors.request(identity(self.name, role, fingerprint))
        weights = serving.LoadedWeights(request, tensors.store().memory, {})
        return Endpoint("127.0.0.1", serving.serve(model, weights, self.options).port)


def identity(name: str = "org/model", role: str = "target", fingerprint: str = "f00d") -> ModelIdentity:
    return msgspec.structs.replace(IDENTITY, name=name, role=role, fingerprint=fingerprint)


def close_listeners() -> None:
    """Closes all listeners of this process, those of engines that still live included."""
    for service in list(serving._services):
        serving._services.remove(service)
        service.server.close()
