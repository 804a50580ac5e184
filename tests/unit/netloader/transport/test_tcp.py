"""The client's half of the tcp transport, where other sessions bring the same chunks."""

from __future__ import annotations

import contextlib
import random
import threading
from typing import Any

import pytest

from vllm_ascend.model_loader.netloader.client.swarm.pool import Pool, Share
from vllm_ascend.model_loader.netloader.client.verification import Evidence
from vllm_ascend.model_loader.netloader.errors import ConnectionLost, SessionEnded
from vllm_ascend.model_loader.netloader.transport.base import Reception, Timeouts
from vllm_ascend.model_loader.netloader.transport.chunks.arrival import Progress
from vllm_ascend.model_loader.netloader.transport.chunks.delivery import Delivery
from vllm_ascend.model_loader.netloader.transport.chunks.inventory import Inventory
from vllm_ascend.model_loader.netloader.transport.tcp import TcpTransport
from vllm_ascend.model_loader.netloader.weights.arena import Arena

NBYTES = 1000

pytestmark = pytest.mark.timeout(60)


def bring_all(share: Share) -> None:
    while (chunk := share.next(wait=False)) is not None:
        share.begin(chunk)
        assert share.claim(chunk)
        share.arrived(chunk, b"")


@pytest.mark.parametrize("source_ends", [True, False], ids=["the source ends the session", "a data connection breaks"])
def test_only_what_the_source_says_counts_when_others_have_brought_everything(source_ends: bool) -> None:
    inventory = Inventory(NBYTES)
    pool = Pool(inventory, Evidence((b"",), "c0ffee"), random.Random(1))
    mine, other = pool.join(has_all=True), pool.join(has_all=True)
    is_complete = threading.Event()

    def attend(_: object) -> None:
        bring_all(other)
        is_complete.set()
        if source_ends:
            raise SessionEnded("it has other weights now", denies=True)

    def connect() -> Any:
        is_complete.wait()
        raise ConnectionLost("the peer closed the connection")

    reception = Reception({}, NBYTES, bytes(16), None, connect, Timeouts(), attend)  # type: ignore[arg-type]
    with (
        contextlib.closing(Arena.create(NBYTES)) as memory,
        contextlib.closing(Delivery(memory, mine, (b"",), progress=Progress(lambda _: None), source="a")) as delivery,
        pytest.raises(SessionEnded) if source_ends else contextlib.nullcontext(),
    ):
        TcpTransport().receive(reception, delivery)
