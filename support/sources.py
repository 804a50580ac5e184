"""Small models, and servers and clients of them on real sockets."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import pytest
import torch

from vllm_ascend.model_loader.netloader.client.fetch import Client
from vllm_ascend.model_loader.netloader.client.fetched import Fetched
from vllm_ascend.model_loader.netloader.client.options import FetchOptions
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import SourcesExhausted
from vllm_ascend.model_loader.netloader.model.device_memory import tensor_in
from vllm_ascend.model_loader.netloader.model.live import LiveMemory
from vllm_ascend.model_loader.netloader.model.views import DTYPES, manifest_of
from vllm_ascend.model_loader.netloader.server.publications import Publication
from vllm_ascend.model_loader.netloader.server.requests import Settings
from vllm_ascend.model_loader.netloader.server.server import WeightServer
from vllm_ascend.model_loader.netloader.transport.base import Timeouts, Transport
from vllm_ascend.model_loader.netloader.transport.digests import StoreDigests
from vllm_ascend.model_loader.netloader.transport.in_process import InProcessTransport
from vllm_ascend.model_loader.netloader.transport.registry import transports
from vllm_ascend.model_loader.netloader.transport.store import Request, WeightStore
from vllm_ascend.model_loader.netloader.weights.arena import Arena
from vllm_ascend.model_loader.netloader.weights.identity import ModelIdentity, RankCoordinates
from vllm_ascend.model_loader.netloader.weights.manifest import Manifest
from vllm_ascend.model_loader.netloader.weights.memory import Memory
from vllm_ascend.model_loader.netloader.wire.access import Access
from vllm_ascend.model_loader.netloader.wire.messages import AttributeValue

SHORT = Timeouts(connect=5.0, stall=5.0)
PATIENT = Timeouts(connect=60.0, stall=60.0)

IDENTITY = ModelIdentity(
    name="org/model",
    architecture="LlamaForCausalLM",
    config_digest="c0ffee",
    dtype="bfloat16",
    fingerprint="f00d",
    versions={"vllm": "0.32.0"},
)


@dataclass(frozen=True)
class Tensors:
    """Named tensors whose contents are always the same.

    They are served from an arena and fetched into one or, where devices are given, live on these.
    """

    by_name: dict[str, torch.Tensor]
    served_on: torch.device | None = None
    wanted_on: torch.device | None = None

    @classmethod
    def of_shapes(cls, *shapes: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensors:
        generator = torch.Generator().manual_seed(seed)
        return cls({f"w{n}": torch.randn(*shape, generator=generator).to(dtype) for n, shape in enumerate(shapes)})

    @property
    def manifest(self) -> Manifest:
        return manifest_of(self.by_name.items())

    def store(self, generation: int = 1, *, verify: bool = True) -> WeightStore:
        """A store of these contents that can be served. The caller closes it, or the server that publishes it."""
        memory = self._memory(self.manifest, self.served_on)
        for spec in self.manifest.tensors:
            tensor_in(memory, spec).copy_(self.by_name[spec.name])
        memory.seal()
        digests = StoreDigests(memory.reader()) if verify else None
        return WeightStore(self.manifest, memory, generation, digests=digests)

    def allocate(self, manifest: Manifest) -> Memory:
        """The memory that a client fills with tensors of this manifest."""
        return self._memory(manifest, self.wanted_on)

    @staticmethod
    def _memory(manifest: Manifest, device: torch.device | None) -> Memory:
        if device is None:
            return Arena.create(manifest.nbytes)
        empty = {
            spec.name: torch.empty_strided(spec.shape, spec.strides, dtype=DTYPES[spec.dtype], device=device)
            for spec in manifest.tensors
        }
        return LiveMemory(manifest, empty, device)

    def request(self, identity: ModelIdentity = IDENTITY, coordinates: RankCoordinates | None = None) -> Request:
        return Request(identity, coordinates or RankCoordinates(), self.manifest)

    def assert_in(self, memory: Memory) -> None:
        for spec in self.manifest.tensors:
            assert torch.equal(tensor_in(memory, spec).cpu(), self.by_name[spec.name]), spec.name


IN_PROCESS = (InProcessTransport(),)
SMALL = Tensors.of_shapes((16, 8), (5,), (33, 7))


def publication(role: str = "target", generation: int = 2, **attributes: AttributeValue) -> Publication:
    """SMALL, to be published in `role`; the server that publishes it closes its store."""
    store = replace(SMALL.store(generation), attributes=attributes)
    return Publication(msgspec.structs.replace(IDENTITY, role=role), RankCoordinates(), store)


@contextlib.contextmanager
def serving(
    tensors: Tensors,
    transports: Sequence[Transport],
    *,
    identity: ModelIdentity = IDENTITY,
    coordinates: RankCoordinates | None = None,
    timeouts: Timeouts = SHORT,
    host: str = "127.0.0.1",
    access: Access | None = None,
    verify: bool = True,
    **settings: Any,
) -> Iterator[tuple[WeightServer, Endpoint]]:
    """A server that holds `tensors`, and its address. `settings` are further fields of `Settings`."""
    access = access or Access()
    with WeightServer(host, 0, Settings(transports, timeouts, access, **settings)) as server:
        store = tensors.store(verify=verify)
        server.publish(Publication(identity, coordinates or RankCoordinates(), store))
        yield server, Endpoint(host, server.port)


def client_for(
    wanted: Tensors | Request, transports: Sequence[Transport], *, timeouts: Timeouts = SHORT, **options: Any
) -> Client:
    """A client that does not pause between tries. Further arguments are fields of `FetchOptions`."""
    request = wanted.request() if isinstance(wanted, Tensors) else wanted
    if isinstance(wanted, Tensors):
        options.setdefault("allocate", wanted.allocate)
    return Client(FetchOptions(request, timeouts, **options), transports, sleep=lambda _: None)


def fetch(
    wanted: Tensors | Request, transports: Sequence[Transport], *sources: Endpoint, **options: Any
) -> tuple[Client, Fetched]:
    """Fetches from the sources, and returns the client too. Raises SourcesExhausted."""
    client = client_for(wanted, transports, **options)
    return client, client.fetch(sources)


def reasons(error: pytest.ExceptionInfo[SourcesExhausted]) -> str:
    """Why no source delivered, one reason a line."""
    return "\n".join(error.value.reasons)


def logged(caplog: pytest.LogCaptureFixture, beginning: str) -> str:
    """The only line in the log that has this beginning."""
    (line,) = (record.getMessage() for record in caplog.records if record.getMessage().startswith(beginning))
    return line


def assert_serves(source: Endpoint, tensors: Tensors = SMALL, **options: Any) -> None:
    """A client that comes now gets everything from `source`, by tcp."""
    _, fetched = fetch(tensors, transports(["tcp"]), source, **{"timeouts": PATIENT, **options})
    tensors.assert_in(fetched.memory)
    fetched.memory.close()


@contextlib.contextmanager
def fetching(client: Client, *sources: Endpoint) -> Iterator[Callable[[], Fetched]]:
    """Fetches in a thread. The function that is given waits for what was fetched, and fails if nothing was."""
    results: list[Fetched | Exception] = []

    def run() -> None:
        try:
            results.append(client.fetch(sources))
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run, daemon=True)

    def result() -> Fetched:
        thread.join()
        (outcome,) = results
        assert isinstance(outcome, Fetched), outcome
        return outcome

    thread.start()
    yield result
