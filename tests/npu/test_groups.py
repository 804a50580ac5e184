"""Clients that ask for a group over HCCL and do not come to it: HCCL waits for them, the server does not."""

from __future__ import annotations

import pytest
import torch

from support.peers.strangers import Intruder, netloader_threads
from support.sources import IDENTITY, SMALL, Tensors, fetch, serving
from support.wait import wait_until
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
