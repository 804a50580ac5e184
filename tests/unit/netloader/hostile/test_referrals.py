"""Sources that send a client to others: it is not kept waiting, nor led in a circle, nor sent to everybody."""

from __future__ import annotations

import itertools
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest

from support.logs import assert_orderly
from support.peers.impostor import Act, Impostor, Misbehaved, answering, outlives, saying
from support.peers.strangers import Line
from support.sources import SMALL
from vllm_ascend.model_loader.netloader.client.search.order import REFERRALS_FOLLOWED, TRIES
from vllm_ascend.model_loader.netloader.transport.base import Timeouts
from vllm_ascend.model_loader.netloader.wire.messages import REFERRALS_LIMIT, Refuse, Wait

pytestmark = pytest.mark.usefixtures("brief_explanations")

IMPATIENT = Timeouts(connect=0.15, stall=0.15)
NULL = "no\0\r\n\x1b[2Jthing\u2028\u202e"
SMALL_ROOT = SMALL.store().root()


def waiting(*referrals: str) -> Act:
    """Tells a client for ever that it is not its turn, and that others have what it wants."""

    def act(line: Line, _: dict[str, Any]) -> None:
        while True:
            line.say(Wait(1, referrals, SMALL_ROOT, "f00d"))
            time.sleep(0.01)

    return act


@pytest.mark.timeout(60)
def test_a_client_does_not_wait_for_ever() -> None:
    with Impostor({"Join": waiting()}) as impostor:
        assert "its turns were taken for WAIT_TIMEOUT" in outlives(impostor, wait_timeout=0.3)


@pytest.mark.timeout(60)
def test_a_client_does_not_wait_for_a_source_that_falls_silent() -> None:
    with Impostor({"Join": answering(Wait(1))}) as impostor:
        assert "the peer was silent for" in outlives(impostor, timeouts=IMPATIENT)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("refer", [waiting, lambda *others: answering(Refuse("not here", referrals=others))])
def test_a_client_does_not_go_in_a_circle(refer: Callable[..., Act]) -> None:
    with Impostor({}) as first, Impostor({}) as second, Impostor({}) as third:
        circle = [str(impostor.endpoint) for impostor in (first, second, third)]
        for impostor in (first, second, third):
            impostor.acts["Join"] = refer(*circle)
        assert outlives(first, wait_timeout=0.1)
        everybody_heard = first.heard + second.heard + third.heard
    assert everybody_heard.count("Join") <= 3 * TRIES


NO_ENDPOINTS = (
    "",
    ":",
    ":0",
    ":65536",
    ":-1",
    ":99999999999999999999",
    ":" + "9" * 4000,
    "[",
    "[]:1",
    "[[::1]]:1",
    "::1:1",
    "a b:1",
    "a/b:1",
    "\0:1",
    "..:1",
    "x" * 4000 + ":1",
    "\u2028:1",
    "\u0130\u0131.\u202e:1",
    f"{NULL}:1",
    "1e3:1",
    "http://127.0.0.1:1",
)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("answer", [Wait, Refuse])
def test_a_client_leaves_out_referrals_that_are_none(
    answer: type[Wait] | type[Refuse], caplog: pytest.LogCaptureFixture
) -> None:
    message = Wait(1, NO_ENDPOINTS, SMALL_ROOT) if answer is Wait else Refuse("not here", referrals=NO_ENDPOINTS)
    with Impostor({"Join": saying(message)}) as impostor:
        assert outlives(impostor)
    assert_orderly(caplog)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("answer", [Wait, Refuse])
def test_a_client_follows_a_limited_number_of_referrals(answer: type[Wait] | type[Refuse]) -> None:
    number = itertools.count()

    def refer(line: Line, _: dict[str, Any]) -> None:
        """Names other addresses each time, at which nobody is."""
        others = tuple(f"127.9.{n // 250}.{n % 250 + 1}:{port}" for n in itertools.islice(number, REFERRALS_LIMIT // 2))
        line.say(Wait(1, others, SMALL_ROOT) if answer is Wait else Refuse("not here", referrals=others))
        if answer is Wait:
            raise Misbehaved  # so that it is asked again, and names others

    with socket.socket() as closed, Impostor({"Join": refer}) as impostor:
        closed.bind(("", 0))
        port = closed.getsockname()[1]
        reasons = outlives(impostor).splitlines()
    followed = REFERRALS_FOLLOWED if answer is Wait else REFERRALS_LIMIT // 2
    assert sum("127.9." in reason for reason in reasons) == followed


@pytest.mark.parametrize("answer", [Wait, Refuse])
def test_a_client_does_not_take_referrals_without_end(answer: type[Wait] | type[Refuse]) -> None:
    referrals = (":1",) * (REFERRALS_LIMIT + 1)
    message = Wait(1, referrals) if answer is Wait else Refuse("not here", referrals=referrals)
    with Impostor({"Join": saying(message)}) as impostor:
        assert "is no message" in outlives(impostor)


@pytest.mark.parametrize("answer", [Wait, Refuse])
def test_a_client_does_not_take_a_referral_of_a_million_characters(answer: type[Wait] | type[Refuse]) -> None:
    referrals = ("x" * 1_000_000 + ":19000",)
    message = Wait(1, referrals) if answer is Wait else Refuse("not here", referrals=referrals)
    with Impostor({"Join": saying(message)}) as impostor:
        assert "is no message" in outlives(impostor)
