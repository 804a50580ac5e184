"""Instances of several ranks: each rank of a client finds its peer, given one address of any rank."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from support.ports import two_free_ports
from support.vllm import checkpoints
from support.vllm.loaders import Load, Loader, generation
from support.vllm.pulled import CANNOT_BE_WRITTEN, assert_pulled, pull


@dataclass(frozen=True)
class Partition:
    """Engine arguments of two ranks, and the refusal of a client that is partitioned otherwise."""

    make: Callable[[Path], str]
    engine: dict[str, Any]
    otherwise: dict[str, Any]
    refusal: str
    is_pulled: bool = False
    """Whether the weights are also pulled, and loaded by vLLM's own sharded format."""


TWO_TENSOR_RANKS = {"tensor_parallel_size": 2}
EXPERTS = {**TWO_TENSOR_RANKS, "enable_expert_parallel": True}
PARTITIONS = {
    "tensor parallel": Partition(checkpoints.dense, TWO_TENSOR_RANKS, {}, "tp_size (here 1, there 2)"),
    "pipeline parallel": Partition(
        checkpoints.dense, {"pipeline_parallel_size": 2}, {}, "pp_size (here 1, there 2)", is_pulled=True
    ),
    "expert parallel": Partition(
        checkpoints.mixture_of_experts, EXPERTS, TWO_TENSOR_RANKS, "ep_size (here 1, there 2)", is_pulled=True
    ),
    "experts over data-parallel replicas": Partition(
        checkpoints.mixture_of_experts,
        {"data_parallel_size": 2, "enable_expert_parallel": True},
        EXPERTS,
        "tp_size (here 2, there 1)",
    ),
    "experts dealt in turn": Partition(
        checkpoints.mixture_of_experts,
        {**EXPERTS, "expert_placement_strategy": "round_robin"},
        EXPERTS,
        "expert_placement (here linear, there round_robin)",
    ),
}


@pytest.mark.parametrize("partition", PARTITIONS.values(), ids=PARTITIONS.keys())
def test_every_rank_finds_its_peer_from_one_address(
    partition: Partition, load: Load, models: Path, tmp_path: Path
) -> None:
    model, port = partition.make(models), two_free_ports()
    servers = start_ranks(load, model, tmp_path, {"LISTEN_PORT": port}, partition.engine)
    addresses = [server.finish_loading().address for server in servers]
    assert addresses == [f"127.0.0.1:{port}", f"127.0.0.1:{port + 1}"]
    assert servers[0].digests != servers[1].digests

    one_address = {"SOURCE": [addresses[1]], "FALLBACK": "error"}
    clients = start_ranks(load, model, tmp_path, one_address, partition.engine)
    for rank, client in enumerate(clients):
        assert client.finish_loading().digests == servers[rank].digests
        assert client.report["source"] == addresses[rank]
        assert client.report["attempts"] == []
        client.end()

    if partition.is_pulled:

        def again(directory: str, extra: dict[str, Any], load_format: str) -> list[Loader]:
            return start_ranks(load, directory, tmp_path, extra, partition.engine, load_format=load_format)

        assert_pulled(servers, tmp_path, again)
    elif "data_parallel_size" in partition.engine:
        assert pull(servers[0], tmp_path / "pulled") == CANNOT_BE_WRITTEN

    others = start_ranks(load, model, tmp_path, {"SOURCE": addresses}, partition.otherwise)
    for other in others:
        assert other.finish_loading().report["outcome"] == "disk"
        assert partition.refusal in other.report["attempts"][0]["reason"]


def test_each_rank_may_have_sources_of_its_own(load: Load, models: Path, tmp_path: Path) -> None:
    """SOURCE as upstream has it, by device; a rank without any loads from disk."""
    model = checkpoints.dense(models)
    servers = start_ranks(load, model, tmp_path, {}, TWO_TENSOR_RANKS)
    addresses = [server.finish_loading().address for server in servers]
    by_device = [{"device_id": 1, "sources": [addresses[1]]}]
    clients = start_ranks(load, model, tmp_path, {"SOURCE": by_device}, TWO_TENSOR_RANKS)
    assert [client.finish_loading().report["outcome"] for client in clients] == ["disk", "p2p"]
    assert [client.digests for client in clients] == [server.digests for server in servers]


def test_all_ranks_reload_or_none(load: Load, models: Path, tmp_path: Path) -> None:
    old, new = checkpoints.dense(models), checkpoints.dense_retrained(models)
    settings = [tmp_path / f"{rank}.json" for rank in range(2)]
    init_method = f"file://{tmp_path}/{uuid.uuid4().hex}"
    ranks = []
    for rank, path in enumerate(settings):
        path.write_text("{}")
        extra = {"CONFIG_FILE": str(path)}
        ranks.append(load(old, extra, rank=rank, init_method=init_method, engine=TWO_TENSOR_RANKS))
    before = [generation(each.finish_loading()) for each in ranks]

    settings[1].write_text('{"FALLBACK": "error"}')
    for each in ranks:
        each.reload(weights_path=new)
    assert "another rank of this instance could not get its weights" in ranks[0].fails_with()
    assert "no SOURCE is configured for this rank" in ranks[1].fails_with()
    assert [generation(each) for each in ranks] == before

    # As if a checkpoint were replaced between two ranks.
    settings[1].write_text("{}")
    for each, checkpoint in zip(ranks, (new, old), strict=True):
        each.reload(weights_path=checkpoint)
    for each in ranks:
        assert "ReloadRefused: the ranks of this instance got weights of different checkpoints" in each.fails_with()
    assert [generation(each) for each in ranks] == before

    for each in ranks:
        each.reload(weights_path=new)
    for each in ranks:
        each.finish_loading()
    assert [generation(each) for each in ranks] == [number + 1 for number in before]
    from_ranks = {"SOURCE": [ranks[0].address], "FALLBACK": "error"}
    clients = start_ranks(load, new, tmp_path, from_ranks, TWO_TENSOR_RANKS)
    expected = start_ranks(load, new, tmp_path, {"SERVE": False}, TWO_TENSOR_RANKS)
    digests = [each.finish_loading().digests for each in clients]
    assert digests == [each.finish_loading().digests for each in expected]
    assert "different checkpoints" not in clients[0].log_text()


def test_ranks_that_load_different_checkpoints_say_so(load: Load, models: Path, tmp_path: Path) -> None:
    """As if the files, or what a source serves, were replaced between two ranks."""
    init_method = f"file://{tmp_path}/{uuid.uuid4().hex}"
    checkpoint = {0: checkpoints.dense(models), 1: checkpoints.dense_retrained(models)}
    ranks = [
        load(model, rank=rank, init_method=init_method, engine=TWO_TENSOR_RANKS) for rank, model in checkpoint.items()
    ]
    for each in ranks:
        assert "the ranks of this instance have weights of different checkpoints" in each.finish_loading().log_text()


def start_ranks(
    load: Load, model: str, directory: Path, extra: Mapping[str, object], engine: dict[str, Any], **request: Any
) -> list[Loader]:
    """The processes of an instance with these engine arguments, not waited for."""
    if "data_parallel_size" in engine:
        return start_replicas(load, model, extra, engine)
    # vLLM names shared memory after this file, so its name must not recur.
    init_method = f"file://{directory}/{uuid.uuid4().hex}"
    ranks = engine.get("tensor_parallel_size", 1) * engine.get("pipeline_parallel_size", 1)
    return [load(model, extra, rank=rank, init_method=init_method, engine=engine, **request) for rank in range(ranks)]


def start_replicas(load: Load, model: str, extra: Mapping[str, object], engine: dict[str, Any]) -> list[Loader]:
    """Data-parallel replicas of one rank each, as vLLM's engines start them."""
    address = {"data_parallel_address": "127.0.0.1"}
    meeting = {"data_parallel_master_port": two_free_ports(), "_data_parallel_master_port_list": []}
    return [
        load(model, extra, engine={**engine, **address, "data_parallel_rank": replica}, parallel=meeting)
        for replica in range(engine["data_parallel_size"])
    ]
