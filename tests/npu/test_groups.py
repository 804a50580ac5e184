"""Groups over HCCL whose peers do not come, or come and fall silent."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch._C._distributed_c10d import HashStore, PrefixStore
from vllm.platforms import current_platform

from support.peers.strangers import Intruder, netloader_threads
from support.sources import IDENTITY, SMALL, Tensors, fetch, serving
from support.wait import wait_until
from vllm_ascend.distributed import process_group
from vllm_ascend.model_loader.netloader.client.inquiry import inquire
from vllm_ascend.model_loader.netloader.transport.base import Timeouts
from vllm_ascend.model_loader.netloader.transport.registry import transports
from vllm_ascend.model_loader.netloader.weights.identity import RankCoordinates
from vllm_ascend.model_loader.netloader.wire.messages import Accept, Gather, Join, Offer, Publish

pytestmark = pytest.mark.timeout(120)

ON_FIRST, ON_SECOND = torch.device("npu", 0), torch.device("npu", 1)
BRIEF = Timeouts(connect=20.0, stall=2.0)


def test_clients_that_never_come_end_in_time_and_leave_the_device_working() -> None:
    tensors = Tensors(SMALL.by_name, ON_FIRST, ON_SECOND)
    with serving(tensors, transports(["process_group"], str(ON_FIRST)), timeouts=BRIEF) as (_, source):
        lines = [Intruder(source, f"127.0.0.{number}").greet() for number in range(3, 6)]
        for line in lines:
            offers = (Offer("process_group", "hccl"),)
            line.say(Join(IDENTITY, RankCoordinates(), tensors.manifest.digest, offers)).hear_kind(Accept)
            line.say(Gather()).hear_kind(Publish)
        lines[0].reset()
        for line in lines[1:]:
            line.hear_out()
            line.socket.close()
        wait_until(lambda: inquire(source, 10).sessions == 0)
        assert "netloader-gather" in netloader_threads()  # HCCL has more patience
        _, fetched = fetch(tensors, transports(["process_group"], str(ON_SECOND)), source)
        tensors.assert_in(fetched.memory)


def test_the_device_waits_for_a_silent_peer_as_long_as_the_group_was_told() -> None:
    store = HashStore()

    def join(rank: int) -> Any:
        current_platform.set_device((ON_FIRST, ON_SECOND)[rank])
        group = current_platform.stateless_init_device_torch_dist_pg(
            backend="hccl",
            prefix_store=PrefixStore("group", store),
            group_rank=rank,
            group_size=2,
            timeout=timedelta(seconds=1.5),
        )
        _exchange(group, rank)
        return group

    with ThreadPoolExecutor(2) as ranks:
        groups = [*ranks.map(join, range(2))]
        assert len(groups[0].group_name) == len(groups[1].group_name) <= 32

        with pytest.raises(RuntimeError, match="nothing has moved for 2 s"):
            ranks.submit(lambda: (current_platform.set_device(ON_SECOND), _exchange(groups[1], 1))).result()
    for group in groups:
        group.abort()
    with pytest.raises(RuntimeError, match="nothing has moved"):
        torch.accelerator.synchronize(ON_SECOND)  # which would otherwise fail in the next test


def _exchange(group: Any, rank: int) -> None:
    byte = torch.zeros(1, dtype=torch.uint8, device=(ON_FIRST, ON_SECOND)[rank])
    group._get_backend(byte.device).batch_isend_irecv([("isend", "irecv")[rank]], [byte], [1 - rank]).wait()
    torch.accelerator.current_stream(byte.device).synchronize()


def test_groups_come_about_on_a_device_one_at_a_time_and_none_waits_for_long() -> None:
    """torch-npu notes communicators without a lock, so two at once would damage the memory of a server."""
    order: list[str] = []
    first_is_in, first_may_leave = threading.Event(), threading.Event()

    def come_about(name: str, device: torch.device, patience: float) -> None:
        with process_group._one_at_a_time(device, patience):
            order.append(name)
            if name == "first":
                first_is_in.set()
                first_may_leave.wait()
                order.append("first is done")

    with ThreadPoolExecutor() as threads:
        leaving = threads.submit(come_about, "first", ON_FIRST, 60)
        first_is_in.wait()
        come_about("another device", ON_SECOND, 60)
        come_about("out of patience", ON_FIRST, 0.1)
        waiting = threads.submit(come_about, "second", ON_FIRST, 60)
        first_may_leave.set()
        leaving.result()
        waiting.result()
    assert order == ["first", "another device", "out of patience", "first is done", "second"]
