"""Weights go from one simulated NPU to another over HCCL: real vLLM workers and engines, one process for each NPU."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from support.caches import await_held, running, socket_of
from support.ports import two_free_ports
from support.quantised.files import copy_other_files, tensors_of
from support.vllm import checkpoints
from support.vllm.fetch_model import fetch_model
from support.vllm.loaders import Load, Loader, Pool, generation
from support.wait import wait_until
from vllm_ascend.model_loader.netloader.client.inquiry import inquire
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import UnsupportedModel
from vllm_ascend.model_loader.netloader.model.weights import LiveWeights
from vllm_ascend.model_loader.netloader.transport.digests import CHUNK_BYTES
from vllm_ascend.model_loader.netloader.weights.manifest import Manifest
from vllm_ascend.model_loader.netloader.wire.access import Access
from vllm_ascend.model_loader.netloader.wire.channel import Channel, Deadline
from vllm_ascend.model_loader.netloader.wire.conversation import frame
from vllm_ascend.model_loader.netloader.wire.greeting import greet
from vllm_ascend.model_loader.netloader.wire.messages import Accept, AskDigests, Join, Offer, Refuse

CPU_PYTHON = str(Path(torch.__file__).parents[4] / "bin" / "python")
"""Of the environment below this one, which has no torch-npu: vLLM's CPU platform."""
PROMPTS = [[5, 17, 31, 2], list(range(40, 200)), [7]]
ENGINE = {"dtype": "float32", "kv_cache_memory_bytes": 1 << 26, "max_num_batched_tokens": 512, "max_num_seqs": 4}
ON_CPU = {"dtype": "float32", "attention_backend": "CPU_MLA"}
"""The backend for MLA in all types, as that for processors with AMX is for bfloat16; others ignore it."""
SIMULATOR = {"CANN_SIM_DEVICES": "4", "CANN_SIM_ASYNC": "1"}
FROM_PEERS = {"FALLBACK": "error"}
SESSION_BYTES = 4 * CHUNK_BYTES
"""What a client takes of its device while weights come by HCCL."""
SLOW = 4 << 20
"""Bytes per second at which a transfer lasts long enough to be disturbed."""

ENDS_RELAYING = "it ended the session: its weights are being processed for its kernels"


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[tuple[str, str], Pool]]:
    pools: dict[tuple[str, str], Pool] = {}
    yield pools
    for pool in pools.values():
        pool.end()


@pytest.fixture
def start(
    pools: dict[tuple[str, str], Pool], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Loader]]:
    """start("0", model, extra, ...) loads on the NPUs of that number, start("cpu", ...) on vLLM's CPU platform.

    `nz` is VLLM_ASCEND_ENABLE_NZ.
    """
    started: list[Loader] = []

    def begin(where: str, model: str, extra: dict[str, Any] | None = None, nz: str = "1", **request: Any) -> Loader:
        if (where, nz) not in pools:
            directory = tmp_path_factory.mktemp(f"npu-{where.replace(',', '-')}")
            on_npus = {"ASCEND_RT_VISIBLE_DEVICES": where, "VLLM_ASCEND_ENABLE_NZ": nz, **SIMULATOR}
            pools[where, nz] = Pool(directory, CPU_PYTHON) if where == "cpu" else Pool(directory, environment=on_npus)
        engine = (ON_CPU if where == "cpu" else ENGINE) | request.pop("engine", {})
        started.append(pools[where, nz].load(model, extra, engine=engine, **request))
        return started[-1]

    yield begin
    for loader in started:
        loader.end()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def tokens(loader: Loader) -> list[list[int]]:
    return [[token for token, _ in answer] for answer in loader.answers]


KINDS = {
    "Llama": checkpoints.dense,
    "Qwen3 with tied embeddings": checkpoints.tied,
    "Qwen3-MoE": checkpoints.mixture_of_experts,
    "DeepSeek-V3": checkpoints.deepseek_v3,
}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS.keys())
def test_a_client_loads_by_hccl_and_answers_as_its_server_and_as_the_cpu_platform(
    make: Callable[[Path], str], start: Load, models: Path
) -> None:
    model = make(models)
    reference = start("cpu", model, {"SERVE": False}, prompts=PROMPTS)
    server = start("0", model, prompts=PROMPTS).finish_loading()
    client = start("1", model, {"SOURCE": [server.address], **FROM_PEERS}, prompts=PROMPTS).finish_loading()
    assert server.report["outcome"] == "disk"
    assert (client.report["outcome"], client.report["transport"]) == ("p2p", "process_group")
    assert client.report["verified"] == "blake3"
    assert client.digests == server.digests
    assert client.answers == server.answers
    assert tokens(client) == tokens(reference.finish_loading())

    in_turn = start("cpu", model, {"SOURCE": [client.address], **FROM_PEERS}, prompts=PROMPTS).finish_loading()
    assert in_turn.report["transport"] == "tcp"
    assert tokens(in_turn) == tokens(client)
    for loader in (reference, server, client, in_turn):
        loader.end()


def test_weights_come_from_the_cache_of_the_host_in_one_copy(start: Load, models: Path, tmp_path: Path) -> None:
    """From an engine in host memory, which hands them over, and from one on an NPU, of which the cache is a client."""
    model = checkpoints.dense(models)
    with running(tmp_path / "of a CPU") as cache:
        use = {"CACHE": str(socket_of(tmp_path / "of a CPU"))}
        on_cpu = start("cpu", model, use, prompts=PROMPTS).finish_loading()
        await_held(cache)
        first = start("0", model, {**use, **FROM_PEERS}, prompts=PROMPTS).finish_loading()
    assert first.report["outcome"] == "cache"
    assert first.report["root"] == root_served_by(on_cpu)
    assert tokens(first) == tokens(on_cpu)

    with running(tmp_path / "of an NPU", sources=(Endpoint.parse(first.address),)) as cache:
        await_held(cache)
        first.end()
        use = {"CACHE": str(socket_of(tmp_path / "of an NPU"))}
        again = start("0", model, {**use, **FROM_PEERS}, prompts=PROMPTS).finish_loading()
    assert again.report["outcome"] == "cache"
    assert again.digests == first.digests
    assert again.answers == first.answers
    in_turn = start("cpu", model, {"SOURCE": [again.address], **FROM_PEERS}).finish_loading()
    assert in_turn.digests == on_cpu.digests
    for loader in (on_cpu, again, in_turn):
        loader.end()


def root_served_by(loader: Loader) -> str:
    """The root digest of what an instance serves."""

    def root() -> str:
        return inquire(Endpoint.parse(loader.address), 10).holdings[0].root

    wait_until(root)
    return root()


def test_an_encoder_loads_by_hccl_and_answers_as_its_server(start: Load, models: Path) -> None:
    model = checkpoints.multilingual_encoder(models)
    engine = {"runner": "pooling", "skip_tokenizer_init": False}
    server = start("0", model, prompts=PROMPTS, engine=engine).finish_loading()
    client = start("1", model, {"SOURCE": [server.address], **FROM_PEERS}, prompts=PROMPTS, engine=engine)
    client.finish_loading()
    assert (client.report["outcome"], client.report["transport"]) == ("p2p", "process_group")
    assert client.digests == server.digests
    assert client.answers == server.answers
    for loader in (server, client):
        loader.end()


@pytest.mark.parametrize(
    ("make", "engine"),
    [
        pytest.param(checkpoints.dense, {"dtype": "float32"}, id="dense"),
        pytest.param(checkpoints.modelslim_odd, {}, id="quantised, not in whole blocks", marks=pytest.mark.slow),
        pytest.param(
            checkpoints.w8a8_odd_experts, {"enable_expert_parallel": True}, id="experts", marks=pytest.mark.slow
        ),
    ],
)
def test_each_tensor_parallel_rank_takes_its_part_from_its_peer(
    make: Callable[[Path], str], engine: dict[str, Any], start: Load, models: Path, tmp_path: Path
) -> None:
    model, port = make(models), two_free_ports()
    engine = {"dtype": "bfloat16", "tensor_parallel_size": 2, **engine}

    def ranks(devices: str, extra: dict[str, Any]) -> list[Loader]:
        method = f"file://{tmp_path / devices.replace(',', '-')}"
        return [start(devices, model, extra, engine=engine, rank=rank, init_method=method) for rank in range(2)]

    servers = [server.finish_loading() for server in ranks("0,1", {"LISTEN_PORT": port})]
    clients = [client.finish_loading() for client in ranks("2,3", {"SOURCE": [servers[1].address], **FROM_PEERS})]
    assert servers[0].digests != servers[1].digests
    for server, client in zip(servers, clients, strict=True):
        assert client.digests == server.digests
        assert (client.report["source"], client.report["transport"]) == (server.address, "process_group")
    for loader in (*servers, *clients):
        loader.end()


def test_a_server_that_goes_to_sleep_ends_its_session_and_serves_again_when_it_is_awake(
    start: Load, models: Path
) -> None:
    model = checkpoints.mixture_of_experts(models)
    engine = {"enable_sleep_mode": True}
    server = start("0", model, {"MAX_BANDWIDTH": SLOW}, prompts=PROMPTS, engine=engine).finish_loading()
    answers, first = server.answers, generation(server)
    client = start("1", model, {"SOURCE": [server.address]})
    wait_for_session(server)
    with clinging_to(server):
        server.call("sleep", level=1)
    client.finish_loading()
    assert client.report["outcome"] == "disk"
    assert "it sleeps" in client.report["attempts"][0]["reason"]
    client.end()

    server.call("wake_up")
    assert generation(server) > first
    after = start("1", model, {"SOURCE": [server.address], **FROM_PEERS}, prompts=PROMPTS).finish_loading()
    assert after.report["transport"] == "process_group"
    assert after.answers == answers
    after.end()

    server.call("sleep", level=2)
    server.reload(PROMPTS, weights_path=model)
    assert "while this instance sleeps: wake its weights up first" in server.fails_with()
    refused = start("1", model, {"SOURCE": [server.address]}).finish_loading()
    assert "its weights were dropped" in refused.report["attempts"][0]["reason"]
    refused.end()

    server.call("wake_up")
    server.reload(PROMPTS, weights_path=model)
    assert server.finish_loading().answers == answers
    reloaded = start("1", model, {"SOURCE": [server.address], **FROM_PEERS}, prompts=PROMPTS).finish_loading()
    assert reloaded.answers == answers
    reloaded.end()

    with clinging_to(server):
        server.reload(PROMPTS, weights_path=model)
        assert server.finish_loading().answers == answers
    before = generation(server)
    server.reload(PROMPTS, weights_path=model, is_checkpoint_format=False)
    assert "set is_checkpoint_format to true" in server.fails_with()
    assert generation(server) > before  # nothing has changed, so it is served again
    server.end()


@contextlib.contextmanager
def clinging_to(server: Loader) -> Iterator[None]:
    """A client that stops within a message, does not go, and would keep the weights from being moved."""
    source = Endpoint.parse(server.address)
    (holding,) = inquire(source, 10).holdings

    def join(manifest_digest: str) -> Channel:
        channel = greet(source, Access(), 10)
        channel.send(Join(holding.identity, holding.coordinates, manifest_digest, (Offer("tcp"),)), 10)
        return channel

    with join("another") as channel:
        refusal = channel.receive(Deadline(10))
        assert isinstance(refusal, Refuse)
    with join(Manifest.decode(refusal.manifest).digest) as channel:
        assert isinstance(channel.receive(Deadline(10)), Accept)

        channel.socket.sendall(frame(AskDigests(0, 1)) + b"\x00\x00\x10\x00half a frame")

        def read() -> None:
            with contextlib.suppress(OSError):
                while channel.socket.recv(1 << 16):
                    pass

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        yield
        channel.shut_down()
        reader.join()


def test_npus_that_load_at_once_bring_the_weights_to_each_other(start: Load) -> None:
    model = fetch_model()
    engine, slow = {"max_model_len": 256}, {"MAX_BANDWIDTH": 8 * SLOW}
    server = start("0", model, slow, engine=engine).finish_loading()
    extra = {"SOURCE": [server.address], "RELAY": True, **FROM_PEERS}
    loaders = [start(where, model, extra, engine=engine) for where in ("1", "2")]
    reports = [loader.finish_loading().report for loader in loaders]
    assert [report["transport"] for report in reports] == ["process_group"] * 2
    # One of them may be done sooner, and ends what it relays while the other takes the rest from the server.
    assert {each["reason"] for report in reports for each in report["attempts"]} <= {ENDS_RELAYING}
    assert [loader.digests for loader in loaders] == [server.digests] * 2
    assert sum(report["received"][server.address] for report in reports) < 1.9 * reports[0]["bytes"]
    for loader in (*loaders, server):
        loader.end()


def test_when_a_server_dies_midway_the_next_one_or_the_disk_brings_the_rest(start: Load) -> None:
    """A transfer that ends within HCCL leaves a device that goes on working (vllm-ascend #14483)."""
    model = fetch_model()
    engine, slow = {"max_model_len": 256}, {"MAX_BANDWIDTH": 8 * SLOW}
    killed = start("0", model, slow, engine=engine).finish_loading()
    second = start("2", model, {"SOURCE": [killed.address], **FROM_PEERS, **slow}, engine=engine).finish_loading()
    sources = [killed.address, second.address]
    client = start("1", model, {"SOURCE": sources, **FROM_PEERS}, engine=engine, prompts=PROMPTS[:1])
    kill_midway(killed)
    client.finish_loading()
    assert (client.report["source"], client.report["transport"]) == (second.address, "process_group")
    assert client.digests == second.digests
    assert 0 < client.report["received"][sources[0]] < client.report["bytes"]
    assert sum(client.report["received"].values()) <= 1.01 * client.report["bytes"] + CHUNK_BYTES
    client.end()

    alone = start("1", model, {"SOURCE": sources}, engine=engine, prompts=PROMPTS[:1])
    kill_midway(second)
    alone.finish_loading()
    assert alone.report["outcome"] == "disk"
    assert 0 < max(attempt["received"] for attempt in alone.report["attempts"]) < alone.report["bytes"]
    assert alone.digests == client.digests
    assert alone.answers == client.answers
    alone.end()


def kill_midway(server: Loader) -> None:
    wait_for_session(server)
    time.sleep(4)  # of the 17 that it takes for all
    server.process.process.kill()


def wait_for_session(server: Loader) -> None:
    wait_until(lambda: inquire(Endpoint.parse(server.address), 10).sessions > 0, 300, interval=0.02)


SUMS_KEPT = {"INT8_CACHE": "dram", "INT8_CACHE_NAME": ["scale_bias"]}
QUANTISED: dict[str, tuple[Callable[[Path], str], bool, dict[str, Any]]] = {
    "dense, through the CPU platform": (checkpoints.w8a8, True, {}),
    "experts, which that platform does not compute in int8": (checkpoints.w8a8_experts, False, {}),
}
OF_MODELSLIM: dict[str, tuple[Callable[[Path], str], bool, dict[str, Any]]] = {
    "ModelSlim's, static": (checkpoints.modelslim_static, False, {}),
    "ModelSlim's experts": (checkpoints.modelslim_experts, False, {}),
    "DeepSeek-V3": (checkpoints.w8a8_deepseek, False, {}),
    "ModelSlim's DeepSeek-V3": (checkpoints.modelslim_deepseek, False, {}),
    "ModelSlim's experts of four bits": (checkpoints.modelslim_four_bits, False, SUMS_KEPT),
}


@pytest.mark.parametrize(
    ("make", "through_cpu", "keys"),
    [pytest.param(*row, id=name) for name, row in QUANTISED.items()]
    + [pytest.param(*row, id=name, marks=pytest.mark.slow) for name, row in OF_MODELSLIM.items()],
)
def test_quantised_weights_travel_as_they_were_loaded_whatever_becomes_of_them_and_are_held_once(
    make: Callable[[Path], str], through_cpu: bool, keys: dict[str, Any], start: Load, models: Path
) -> None:
    model, engine = make(models), {"dtype": "bfloat16"}
    plain = start("0", model, engine=engine, load_format="auto").finish_loading()
    plain.end()
    server = start("0", model, keys, engine=engine).finish_loading()
    assert any(name.endswith("weight") for name in server.report["changed"])
    assert server.result["device_bytes"] <= 1.01 * plain.result["device_bytes"]

    def take(where: str, source: Loader, cache: str, transport: str, **request: Any) -> Loader:
        only = {"TRANSPORT": ["tcp"]} if transport == "tcp" else {}
        extra = {"SOURCE": [source.address], "INT8_CACHE": cache, **FROM_PEERS, **only}
        taken = start(where, model, extra, engine=engine, **request).finish_loading()
        assert taken.report["transport"] == transport
        assert taken.digests == plain.digests
        return taken

    client = take("1", server, "hbm", "process_group", prompts=PROMPTS)
    server.end()
    in_turn = take("cpu", client, "no", "tcp") if through_cpu else client
    back = take("0", in_turn, "dram", "tcp", prompts=PROMPTS)
    answers = client.answers
    assert back.answers == answers

    back.reload(PROMPTS, weights_path=model)
    assert back.finish_loading().answers == answers
    for loader in (client, in_turn, back):
        loader.end()


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["no", "hbm", "dram"])
@pytest.mark.parametrize("make", [checkpoints.w8a8_wide, checkpoints.w8a8_experts_wide], ids=["dense", "experts"])
def test_quantised_weights_are_those_of_a_load_from_disk_with_every_cache_and_by_every_transport(
    make: Callable[[Path], str], cache: str, start: Load, models: Path
) -> None:
    model, request = make(models), {"engine": {"dtype": "bfloat16"}, "prompts": PROMPTS}
    server = start("0", model, {"INT8_CACHE": cache}, **request)
    plain = start("1", model, load_format="auto", **request).finish_loading()
    plain.end()
    server.finish_loading()
    assert any(name.endswith("weight") for name in server.report["changed"])
    assert (server.digests, server.answers) == (plain.digests, plain.answers)

    for transport in ("process_group", "tcp"):
        extra = {"SOURCE": [server.address], "TRANSPORT": [transport], "INT8_CACHE": cache, **FROM_PEERS}
        client = start("1", model, extra, **request).finish_loading()
        assert client.report["transport"] == transport
        assert (client.digests, client.answers) == (plain.digests, plain.answers)
        assert client.report["changed"] == server.report["changed"]
        client.end()
    server.end()


@pytest.mark.slow
@pytest.mark.parametrize("make", [checkpoints.w8a8_large, checkpoints.w8a8_large_experts], ids=["dense", "experts"])
def test_an_instance_takes_as_much_of_its_device_as_without_netloader_at_most_and_in_the_end(
    make: Callable[[Path], str], start: Load, models: Path
) -> None:
    model, request = make(models), {"engine": {"dtype": "bfloat16"}}
    plain = start("0", model, load_format="auto", **request).finish_loading()
    plain.end()
    originals = sum(file.stat().st_size for file in Path(model).glob("*.safetensors"))
    for cache in ("no", "dram", "hbm"):
        kept = originals if cache == "hbm" else 0
        server = start("0", model, {"INT8_CACHE": cache}, **request).finish_loading()
        extra = {"SOURCE": [server.address], "INT8_CACHE": cache, **FROM_PEERS}
        client = start("1", model, extra, **request).finish_loading()
        assert client.report["transport"] == "process_group"
        for each, buckets in ((server, 0), (client, SESSION_BYTES)):
            assert each.result["device_peak"] <= 1.02 * plain.result["device_peak"] + kept + buckets
            assert each.result["device_bytes"] <= 1.01 * plain.result["device_bytes"]
            each.end()


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["process_group", "tcp"])
def test_weights_travel_between_instances_that_arrange_them_differently(
    transport: str, start: Load, models: Path
) -> None:
    model, request = checkpoints.modelslim_static(models), {"engine": {"dtype": "bfloat16"}, "prompts": PROMPTS}
    here, source, loaded = "0", dict[str, Any](), list[Loader]()
    changed: dict[str, set[str]] = {}
    for nz in ("2", "0", "1", "2"):
        loaded.append(start(here, model, source, nz=nz, **request).finish_loading())
        changed[nz] = set(loaded[-1].report["changed"])
        source = {"SOURCE": [loaded[-1].address], "TRANSPORT": [transport], **FROM_PEERS}
        here = "1" if here == "0" else "0"
    assert "model.layers.1.mlp.down_proj.weight" in changed["2"] - changed["1"]  # it is not quantised
    assert [each.report["transport"] for each in loaded[1:]] == [transport] * 3
    assert all((each.digests, each.answers) == (loaded[0].digests, loaded[0].answers) for each in loaded)
    for each in loaded:
        each.end()


@pytest.mark.parametrize("load_format", ["netloader", pytest.param("auto", marks=pytest.mark.slow)])
def test_a_checkpoint_that_lacks_integers_is_named_and_changes_no_model_that_netloader_serves(
    load_format: str, start: Load, models: Path
) -> None:
    model, engine, missing = checkpoints.w8a8(models), {"dtype": "bfloat16"}, "model.layers.1.self_attn.k_proj.weight"
    incomplete = without(missing, Path(model), models / "incomplete")
    named = f"the checkpoint has no {missing}, or not all of it"
    assert named in start("0", incomplete, engine=engine, load_format=load_format).fails_with()

    loader = start("0", model, engine=engine, load_format=load_format, prompts=PROMPTS).finish_loading()
    loader.reload(PROMPTS, weights_path=incomplete)
    assert named in loader.fails_with()
    if load_format == "netloader":
        assert loader.ask(PROMPTS) == loader.answers
    loader.end()


def without(missing: str, checkpoint: Path, target: Path) -> str:
    target.mkdir(exist_ok=True)
    copy_other_files(checkpoint, target)
    tensors = {name: tensor for name, tensor in tensors_of(checkpoint) if name != missing}
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return str(target)


@pytest.fixture
def private_formats() -> Iterator[None]:
    config: Any = torch.get_device_module("npu").config
    config.allow_internal_format = True
    yield
    config.allow_internal_format = False


@pytest.mark.usefixtures("private_formats")
def test_weights_in_a_private_format_are_not_served_as_if_they_were_plain() -> None:
    import torch_npu

    model = torch.nn.Linear(64, 64, bias=False, device="npu:0", dtype=torch.float16)
    model.weight.data = torch_npu.npu_format_cast(model.weight.data, 29)
    with pytest.raises(UnsupportedModel, match="weight lies in a private format"):
        LiveWeights(model, torch.device("npu", 0))
