"""Identity that cannot be fooled, between a real server and a real client over real sockets.

Each row differs from what the server holds in one place only, and the refusal must say which, with both values. That no
byte moved is observed from outside, by what a delivery cannot do without: a session of the transport on either side,
progress, and the phases `allocate` and `transfer`. `assert_delivered` sees all of these happen, after every refusal and
on the same server, so their absence says something.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import socket
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import save_file

from support.sources import SHORT, client_for
from vllm_ascend.model_loader.netloader.checkpoint.fingerprint import checkpoint_fingerprint, files_in
from vllm_ascend.model_loader.netloader.client.inquiry import inquire
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import SourcesExhausted
from vllm_ascend.model_loader.netloader.model.views import manifest_of
from vllm_ascend.model_loader.netloader.server.publications import Publication
from vllm_ascend.model_loader.netloader.server.requests import Settings
from vllm_ascend.model_loader.netloader.server.server import WeightServer
from vllm_ascend.model_loader.netloader.transport.base import Reception, Timeouts
from vllm_ascend.model_loader.netloader.transport.chunks.delivery import Delivery
from vllm_ascend.model_loader.netloader.transport.digests import StoreDigests
from vllm_ascend.model_loader.netloader.transport.in_process import InProcessTransport
from vllm_ascend.model_loader.netloader.transport.sender import Sender
from vllm_ascend.model_loader.netloader.transport.store import Request, WeightStore
from vllm_ascend.model_loader.netloader.weights.arena import Arena
from vllm_ascend.model_loader.netloader.weights.identity import ModelIdentity, RankCoordinates, canonical_digest
from vllm_ascend.model_loader.netloader.weights.manifest import Alias
from vllm_ascend.model_loader.netloader.wire import greeting
from vllm_ascend.model_loader.netloader.wire.channel import Channel
from vllm_ascend.model_loader.netloader.wire.conversation import Role, frame
from vllm_ascend.model_loader.netloader.wire.messages import PROTOCOL_VERSION, Hello, Message, Welcome
from vllm_ascend.model_loader.netloader.wire.pacing import Pacer

CONFIG = {"hidden_size": 4, "rope_parameters": {"rope_theta": 10_000.0, "rope_type": "default"}}
CONFIG_OF_LONG_CONTEXT = {**CONFIG, "rope_parameters": {"rope_theta": 500_000.0, "rope_type": "default"}}

MODEL = ModelIdentity(
    name="org/model",
    architecture="LlamaForCausalLM",
    config_digest=canonical_digest(CONFIG),
    dtype="bfloat16",
    revision="v1",
    quantization="fp8",
    fingerprint="f00d",
    versions={"vllm": "0.32.0", "torch": "2.13.0"},
)
RANK = RankCoordinates(
    tp_rank=1,
    tp_size=4,
    pp_rank=2,
    pp_size=3,
    pcp_rank=3,
    pcp_size=5,
    ep_rank=4,
    ep_size=6,
    expert_placement="linear",
)


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


WEIGHTS = {"embed": empty(8, 4), "gate": empty(8, 4), "up": empty(8, 4), "norm": empty(4)}
HEAD = Alias("head", 0, 0, "bfloat16", (4, 4), (4, 1))
REQUEST = Request(MODEL, RANK, manifest_of(WEIGHTS.items(), (HEAD,)))


def model(of: Request = REQUEST, **changes: Any) -> Request:
    return replace(of, identity=msgspec.structs.replace(of.identity, **changes))


def rank(**changes: Any) -> Request:
    return replace(REQUEST, coordinates=msgspec.structs.replace(RANK, **changes))


def tensors(weights: dict[str, torch.Tensor], *aliases: Alias) -> Request:
    return replace(REQUEST, manifest=manifest_of(weights.items(), aliases))


def head(**changes: Any) -> Alias:
    return msgspec.structs.replace(HEAD, **changes)


NO_FINGERPRINTS = "; fingerprint (here none, there none)"
"""Says in a refusal why names decide."""
NO_FINGERPRINT = model(fingerprint="")
NAMED_BY_PATH = model(fingerprint="", name="/models/base", name_is_path=True)
DRAFT = model(role="draft", name="org/draft", fingerprint="cafe")


@dataclass(frozen=True)
class Row:
    """What a client wants, what a server holds, and how the refusal ends.

    `beside` are fields that differ as well, but say nothing about the weights.
    """

    here: Request
    named: str
    there: tuple[Request, ...] = (REQUEST,)
    protocol: int = PROTOCOL_VERSION
    beside: frozenset[str] = frozenset()

    @property
    def counterpart(self) -> Request:
        """What the server compares with; where it holds nothing of that role, what it holds."""
        return next((each for each in self.there if each.identity.role == self.here.identity.role), self.there[0])

    def differing_fields(self) -> set[str]:
        there = self.counterpart
        pairs = ((self.here.identity, there.identity), (self.here.coordinates, there.coordinates))
        fields = {
            name
            for ours, theirs in pairs
            for name in ours.__struct_fields__
            if getattr(ours, name) != getattr(theirs, name)
        }
        manifest = {"manifest"} if self.here.manifest.encoded != there.manifest.encoded else set()
        protocol = {"protocol"} if self.protocol != PROTOCOL_VERSION else set()
        return (fields | manifest | protocol) - self.beside


OTHER_MODELS = {
    "architecture": Row(
        model(architecture="MistralForCausalLM"),
        "architecture (here MistralForCausalLM, there LlamaForCausalLM)",
    ),
    "configuration, another rope theta": Row(
        model(config_digest=canonical_digest(CONFIG_OF_LONG_CONTEXT)),
        f"config_digest (here {canonical_digest(CONFIG_OF_LONG_CONTEXT)}, there {canonical_digest(CONFIG)})",
    ),
    "dtype": Row(model(dtype="float16"), "dtype (here float16, there bfloat16)"),
    "quantization": Row(model(quantization="awq"), "quantization (here awq, there fp8)"),
    "no quantization": Row(model(quantization=""), "quantization (here none, there fp8)"),
    "revision": Row(model(revision="v2"), "revision (here v2, there v1)"),
    "revision, no fingerprints": Row(
        model(NO_FINGERPRINT, revision="v2"), f"revision (here v2, there v1){NO_FINGERPRINTS}", there=(NO_FINGERPRINT,)
    ),
    "name": Row(model(name="org/other"), "name (here org/other, there org/model)"),
    "name, no fingerprints": Row(
        model(NO_FINGERPRINT, name="org/other"),
        f"name (here org/other, there org/model){NO_FINGERPRINTS}",
        there=(NO_FINGERPRINT,),
    ),
    "name, no fingerprint here": Row(
        model(NO_FINGERPRINT, name="org/other"),
        "name (here org/other, there org/model); fingerprint (here none, there f00d)",
        beside=frozenset({"fingerprint"}),
    ),
    "name, no fingerprint there": Row(
        model(name="org/other"),
        "name (here org/other, there org/model); fingerprint (here f00d, there none)",
        there=(NO_FINGERPRINT,),
        beside=frozenset({"fingerprint"}),
    ),
    "path, no fingerprints": Row(
        model(NAMED_BY_PATH, name="/models/other"),
        f"name (here /models/other, there /models/base){NO_FINGERPRINTS}",
        there=(NAMED_BY_PATH,),
    ),
    "a path here and a name there, no fingerprints": Row(
        NAMED_BY_PATH,
        f"name (here /models/base, there org/model){NO_FINGERPRINTS}",
        there=(NO_FINGERPRINT,),
        beside=frozenset({"name_is_path"}),
    ),
    "fingerprint": Row(model(fingerprint="beef"), "fingerprint (here beef, there f00d)"),
    "version of vllm": Row(
        model(versions={"vllm": "0.31.0", "torch": "2.13.0"}),
        "versions (here torch 2.13.0, vllm 0.31.0, there torch 2.13.0, vllm 0.32.0)",
    ),
    "version of torch": Row(
        model(versions={"vllm": "0.32.0", "torch": "2.12.1"}),
        "versions (here torch 2.12.1, vllm 0.32.0, there torch 2.13.0, vllm 0.32.0)",
    ),
    "version of torch not told": Row(
        model(versions={"vllm": "0.32.0"}),
        "versions (here vllm 0.32.0, there torch 2.13.0, vllm 0.32.0)",
    ),
    "load options, expert load balancing": Row(
        model(load_options="expert load balancing with 2 redundant experts"),
        "load_options (here expert load balancing with 2 redundant experts, there none)",
    ),
    # There is nothing to compare with, so the server names the roles that it holds instead of a field.
    "role that is not held, draft": Row(
        model(role="draft"), "this server does not hold draft weights: it holds target"
    ),
    "role that is not held, target": Row(
        model(DRAFT, role="target"), "this server does not hold target weights: it holds draft", there=(DRAFT,)
    ),
    "another draft for the same target": Row(
        model(DRAFT, fingerprint="decaf"), "fingerprint (here decaf, there cafe)", there=(REQUEST, DRAFT)
    ),
    "another target with the same draft": Row(
        model(fingerprint="beef"), "fingerprint (here beef, there f00d)", there=(REQUEST, DRAFT)
    ),
}

OTHER_RANKS = {
    "tp rank": Row(rank(tp_rank=0), "tp_rank (here 0, there 1)"),
    "tp size": Row(rank(tp_size=2), "tp_size (here 2, there 4)"),
    "pp rank": Row(rank(pp_rank=0), "pp_rank (here 0, there 2)"),
    "pp size": Row(rank(pp_size=4), "pp_size (here 4, there 3)"),
    "pcp rank": Row(rank(pcp_rank=4), "pcp_rank (here 4, there 3)"),
    "pcp size": Row(rank(pcp_size=4), "pcp_size (here 4, there 5)"),
    "ep rank": Row(rank(ep_rank=5), "ep_rank (here 5, there 4)"),
    "ep size": Row(rank(ep_size=8), "ep_size (here 8, there 6)"),
    "expert placement": Row(rank(expert_placement="round_robin"), "expert_placement (here round_robin, there linear)"),
    "no expert placement": Row(rank(expert_placement=""), "expert_placement (here none, there linear)"),
}

OTHER_TENSORS = {
    "hidden size, as many bytes": Row(
        tensors({**WEIGHTS, "gate": empty(4, 8)}, HEAD),
        "tensor gate (here bfloat16 [4, 8] at byte 64, there bfloat16 [8, 4] at byte 64)",
    ),
    "one dimension less, as many bytes": Row(
        tensors({**WEIGHTS, "gate": empty(32)}, HEAD),
        "tensor gate (here bfloat16 [32] at byte 64, there bfloat16 [8, 4] at byte 64)",
    ),
    "another name": Row(
        tensors({("scale" if name == "norm" else name): weight for name, weight in WEIGHTS.items()}, HEAD),
        "tensor scale (here bfloat16 [4] at byte 192, there none); "
        "tensor norm (here none, there bfloat16 [4] at byte 192)",
    ),
    "a tensor is missing": Row(
        tensors({name: weight for name, weight in WEIGHTS.items() if name != "norm"}, HEAD),
        "tensor norm (here none, there bfloat16 [4] at byte 192)",
    ),
    "a surplus tensor": Row(
        tensors({**WEIGHTS, "bias": empty(8)}, HEAD),
        "tensor bias (here bfloat16 [8] at byte 256, there none)",
    ),
    "a surplus tensor without elements": Row(
        tensors({**WEIGHTS, "bias": empty(0)}, HEAD),
        "tensor bias (here bfloat16 [0] at byte 256, there none)",
    ),
    "type of one tensor, as wide": Row(
        tensors({**WEIGHTS, "norm": empty(4, dtype=torch.float16)}, HEAD),
        "tensor norm (here float16 [4] at byte 192, there bfloat16 [4] at byte 192)",
    ),
    "order of a tensor's dimensions in memory": Row(
        tensors({**WEIGHTS, "gate": empty(4, 8).t()}, HEAD),
        "tensor gate (here bfloat16 [8, 4] strides [1, 8] at byte 64, there bfloat16 [8, 4] at byte 64)",
    ),
    "order of the tensors": Row(
        tensors({name: WEIGHTS[name] for name in ("embed", "up", "gate", "norm")}, HEAD),
        "tensor up (here bfloat16 [8, 4] at byte 64, there bfloat16 [8, 4] at byte 128); "
        "tensor gate (here bfloat16 [8, 4] at byte 128, there bfloat16 [8, 4] at byte 64)",
    ),
    "a tied tensor that is untied": Row(
        tensors({**WEIGHTS, "head": empty(4, 4)}),
        "tensor head (here bfloat16 [4, 4] at byte 256, there bfloat16 [4, 4] at byte 0, shared with embed)",
    ),
    "a tied tensor that is missing": Row(
        tensors(WEIGHTS), "tensor head (here none, there bfloat16 [4, 4] at byte 0, shared with embed)"
    ),
    "a tied tensor with another start": Row(
        tensors(WEIGHTS, head(start=32)),
        "tensor head (here bfloat16 [4, 4] at byte 32, shared with embed, "
        "there bfloat16 [4, 4] at byte 0, shared with embed)",
    ),
    "a tensor tied to another": Row(
        tensors(WEIGHTS, head(base=1)),
        "tensor head (here bfloat16 [4, 4] at byte 64, shared with gate, "
        "there bfloat16 [4, 4] at byte 0, shared with embed)",
    ),
    "a tied tensor of another type": Row(
        tensors(WEIGHTS, head(dtype="float16")),
        "tensor head (here float16 [4, 4] at byte 0, shared with embed, "
        "there bfloat16 [4, 4] at byte 0, shared with embed)",
    ),
}

OTHER_PROTOCOLS = {
    "a newer protocol": Row(
        REQUEST,
        f"protocol (here {PROTOCOL_VERSION + 1}, there {PROTOCOL_VERSION})",
        protocol=PROTOCOL_VERSION + 1,
    ),
    "an older protocol": Row(
        REQUEST,
        f"protocol (here {PROTOCOL_VERSION - 1}, there {PROTOCOL_VERSION})",
        protocol=PROTOCOL_VERSION - 1,
    ),
}

REFUSED = OTHER_MODELS | OTHER_RANKS | OTHER_TENSORS | OTHER_PROTOCOLS


class WatchedTransport(InProcessTransport):
    """Counts what either side begins with it."""

    def __init__(self) -> None:
        super().__init__()
        self.senders = 0
        self.receptions = 0

    def sender(self, store: WeightStore, timeouts: Timeouts, pacer: Pacer) -> Sender:
        self.senders += 1
        return super().sender(store, timeouts, pacer)

    def receive(self, reception: Reception, delivery: Delivery) -> None:
        self.receptions += 1
        super().receive(reception, delivery)


def contents(request: Request) -> bytes:
    """Bytes that no two different requests have in common."""
    seed = f"{request.identity} {request.coordinates} {request.manifest.digest}"
    return random.Random(seed).randbytes(request.manifest.nbytes)


def store(request: Request) -> WeightStore:
    arena = Arena.create(request.manifest.nbytes)
    with arena.writable() as destination:
        destination[:] = contents(request)
    arena.seal()
    return WeightStore(request.manifest, arena, 1, digests=StoreDigests(arena.reader()))


@contextlib.contextmanager
def holding(requests: Iterable[Request], transport: WatchedTransport) -> Iterator[Endpoint]:
    with WeightServer("127.0.0.1", 0, Settings((transport,), SHORT)) as server:
        for request in requests:
            server.publish(Publication(request.identity, request.coordinates, store(request)))
        yield Endpoint("127.0.0.1", server.port)


@contextlib.contextmanager
def clients_of_protocol(version: int) -> Iterator[None]:
    class OfAnotherRelease(Channel):
        def send(self, message: Message, timeout: float) -> None:
            if isinstance(message, Hello):
                message = msgspec.structs.replace(message, protocol=version)
            super().send(message, timeout)

    def connect(endpoint: Endpoint, timeout: float) -> Channel:
        return OfAnotherRelease(socket.create_connection(endpoint, timeout=timeout), Role.CLIENT)

    # The version is a constant of the release, so that a client of another release can only be had by patching.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(greeting, "connect", connect)
        yield


def assert_refused(row: Row) -> None:
    transport, moved = WatchedTransport(), list[int]()
    with holding(row.there, transport) as source:
        client = client_for(row.here, (transport,), progress=moved.append)
        with clients_of_protocol(row.protocol), pytest.raises(SourcesExhausted) as error:
            client.fetch([source])
        (reason,) = error.value.reasons
        assert reason.startswith(f"{source}: it refused: ")
        assert reason.endswith(f": {row.named}")
        assert client.phases.seconds.keys() <= {"connect", "join"}
        assert (transport.senders, transport.receptions, moved) == (0, 0, [])
        assert inquire(source, SHORT.connect).sessions == 0
        assert_delivered(row.counterpart, row.counterpart, source, transport)


def assert_delivered(here: Request, there: Request, source: Endpoint, transport: WatchedTransport) -> None:
    """`here` is what the client wants, `there` what the server compares with."""
    moved = list[int]()
    client = client_for(here, (transport,), progress=moved.append)
    with contextlib.closing(client.fetch([source]).memory) as arena:
        assert bytes(arena.contents()[:]) == contents(there)
    assert client.attempts == []
    assert {"allocate", "transfer"} <= client.phases.seconds.keys()
    assert (transport.senders, transport.receptions, sum(moved)) == (1, 1, there.manifest.nbytes)


@pytest.mark.parametrize("row", REFUSED.values(), ids=REFUSED.keys())
def test_one_difference_is_refused_by_its_name_before_any_byte_moves(row: Row) -> None:
    assert_refused(row)


@pytest.mark.parametrize("row", REFUSED.values(), ids=REFUSED.keys())
def test_each_row_differs_in_one_field_only(row: Row) -> None:
    assert len(row.differing_fields()) == 1


def test_the_rows_cover_every_field() -> None:
    # `name_is_path` says how to read the name and is not compared.
    fields = {*ModelIdentity.__struct_fields__, *RankCoordinates.__struct_fields__} - {"name_is_path"}
    assert set().union(*(row.differing_fields() for row in REFUSED.values())) == fields | {"manifest", "protocol"}


ACCEPTED: dict[str, tuple[Request, Request]] = {
    "the same weights under another path": (
        model(name="/models/base", name_is_path=True, revision=""),
        model(name="/mnt/copy", name_is_path=True, revision=""),
    ),
    "the same weights in a directory here and from the hub there": (
        model(name="/models/base", name_is_path=True, revision=""),
        REQUEST,
    ),
    "the same weights from the hub here and in a directory there": (
        REQUEST,
        model(name="/models/base", name_is_path=True, revision=""),
    ),
    "the same name, no fingerprint here": (NO_FINGERPRINT, REQUEST),
    "the same name, no fingerprint there": (REQUEST, NO_FINGERPRINT),
    "the same name, no fingerprints": (NO_FINGERPRINT, NO_FINGERPRINT),
    "the same path, no fingerprints": (NAMED_BY_PATH, NAMED_BY_PATH),
    # A place among replicas is no coordinate, so that this row can say no more than that.
    "another data-parallel replica": (rank(), REQUEST),
    "versions told in another order": (model(versions={"torch": "2.13.0", "vllm": "0.32.0"}), REQUEST),
    "a draft beside the target": (DRAFT, DRAFT),
}


@pytest.mark.parametrize(("here", "there"), ACCEPTED.values(), ids=ACCEPTED.keys())
def test_the_same_weights_are_delivered(here: Request, there: Request) -> None:
    transport = WatchedTransport()
    beside = DRAFT if there is not DRAFT else REQUEST
    with holding((there, beside), transport) as source:
        assert_delivered(here, there, source, transport)


def named_by_checkpoint(directory: Path) -> Request:
    """As for a model that is given as a directory."""
    fingerprint = checkpoint_fingerprint(files_in(directory, directory.iterdir()))
    return model(name=str(directory), name_is_path=True, revision="", fingerprint=fingerprint)


def base_checkpoint(directory: Path) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(64, 32, generator=generator).to(torch.bfloat16) for name in ("embed", "gate", "up", "down")
    }
    directory.mkdir()
    save_file(weights, directory / "model.safetensors")
    return weights


@pytest.mark.parametrize("changed", ["embed", "gate", "up", "down"])
def test_a_fine_tune_of_the_very_same_layout_is_refused_by_its_fingerprint(tmp_path: Path, changed: str) -> None:
    base, fine_tune = tmp_path / "base", tmp_path / "fine-tune"
    weights = base_checkpoint(base)
    weights[changed].view(-1)[weights[changed].numel() // 2] += 1
    fine_tune.mkdir()
    save_file(weights, fine_tune / "model.safetensors")

    ours, theirs = ((directory / "model.safetensors").read_bytes() for directory in (fine_tune, base))
    differing = [offset for offset, (here, there) in enumerate(zip(ours, theirs, strict=True)) if here != there]
    assert 1 <= len(differing) <= torch.bfloat16.itemsize
    assert differing[0] > int.from_bytes(ours[:8], "little")

    here, there = named_by_checkpoint(fine_tune), named_by_checkpoint(base)
    assert here.identity.fingerprint
    named = f"fingerprint (here {here.identity.fingerprint}, there {there.identity.fingerprint})"
    assert_refused(Row(here, named, there=(there,)))


def test_a_copy_of_a_checkpoint_at_another_path_is_delivered(tmp_path: Path) -> None:
    base_checkpoint(tmp_path / "base")
    shutil.copytree(tmp_path / "base", tmp_path / "copy")
    here, there = named_by_checkpoint(tmp_path / "copy"), named_by_checkpoint(tmp_path / "base")
    transport = WatchedTransport()
    with holding((there,), transport) as source:
        assert_delivered(here, there, source, transport)


def test_a_server_that_greets_in_another_protocol_is_not_asked_for_anything() -> None:
    heard = bytearray()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def greet() -> None:
            with listener.accept()[0] as connection:
                connection.sendall(frame(Welcome(PROTOCOL_VERSION + 1)))
                while data := connection.recv(4096):
                    heard.extend(data)

        thread = threading.Thread(target=greet)
        thread.start()
        source, transport = Endpoint("127.0.0.1", listener.getsockname()[1]), WatchedTransport()
        client = client_for(REQUEST, (transport,))
        with pytest.raises(SourcesExhausted, match=f"it speaks protocol {PROTOCOL_VERSION + 1}: expected"):
            client.fetch([source])
        thread.join()
    hello = msgspec.msgpack.decode(heard[4:-4], type=Hello)
    assert bytes(heard) == frame(Hello(challenge=hello.challenge))
    assert transport.receptions == 0
