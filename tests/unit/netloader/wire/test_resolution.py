"""Names that resolve slowly, to nothing, or to addresses that do not answer. The name servers are stand-ins."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from support.sources import SMALL, fetch, serving
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import SourcesExhausted
from vllm_ascend.model_loader.netloader.transport.base import Timeouts
from vllm_ascend.model_loader.netloader.transport.in_process import InProcessTransport
from vllm_ascend.model_loader.netloader.wire.channel import connect
from vllm_ascend.model_loader.netloader.wire.resolution import resolve

pytestmark = pytest.mark.timeout(60)

Answer = Callable[[], list[str]]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, Answer]:
    """What the name servers answer for a name, by a function that may take its time."""
    answers: dict[str, Answer] = {}
    original: Any = socket.getaddrinfo

    def getaddrinfo(host: str, port: int, *arguments: Any, flags: int = 0, **further: Any) -> list[Any]:
        if host not in answers or flags & socket.AI_NUMERICHOST:
            found: list[Any] = original(host, port, *arguments, flags=flags, **further)
            return found
        return [
            answer
            for address in answers[host]()
            for answer in original(address, port, *arguments, flags=flags, **further)
        ]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return answers


@pytest.fixture
def hung(names: dict[str, Answer]) -> Iterator[str]:
    """A name that no name server answers."""
    end = threading.Event()

    def wait() -> list[str]:
        end.wait(60)
        return ["127.0.0.1"]

    names["hung.example"] = wait
    yield "hung.example"
    end.set()
    for thread in threading.enumerate():
        if thread.name.startswith("netloader-resolve"):
            thread.join(60)


def test_a_name_has_all_its_addresses_in_order_and_each_once(names: dict[str, Answer]) -> None:
    names["two.example"] = lambda: ["127.0.0.2", "::1", "127.0.0.2"]
    assert resolve(Endpoint("two.example", 7), 10) == [
        (socket.AF_INET, ("127.0.0.2", 7)),
        (socket.AF_INET6, ("::1", 7, 0, 0)),
    ]


def test_an_address_asks_no_name_server(names: dict[str, Answer]) -> None:
    threads = threading.active_count()
    names["127.0.0.1"] = lambda: pytest.fail("it was asked for")
    assert resolve(Endpoint("127.0.0.1", 7), 10) == [(socket.AF_INET, ("127.0.0.1", 7))]
    assert threading.active_count() == threads


def test_a_name_that_nobody_answers_is_given_up(hung: str) -> None:
    with pytest.raises(TimeoutError, match=r"no name server has told the address of hung\.example within 0\.1 s"):
        resolve(Endpoint(hung, 7), 0.1)


def test_what_cannot_be_a_name_has_no_address() -> None:
    with pytest.raises(socket.gaierror, match=r"'a\.\.b' cannot be a host name"):
        resolve(Endpoint("a..b", 7), 10)


def test_a_hung_name_server_leads_to_the_next_source(hung: str) -> None:
    transports = (InProcessTransport(),)
    with serving(SMALL, transports) as (_, source):
        client, fetched = fetch(SMALL, transports, Endpoint(hung, 19000), source, timeouts=Timeouts(0.2, 5))
    SMALL.assert_in(fetched.memory)
    assert [attempt.reason for attempt in client.attempts] == [
        "no connection: no name server has told the address of hung.example within 0.2 s"
    ]


def test_a_hung_name_server_of_the_only_source_ends_the_search(hung: str) -> None:
    with pytest.raises(SourcesExhausted, match="no name server has told"):
        fetch(SMALL, (InProcessTransport(),), Endpoint(hung, 19000), timeouts=Timeouts(0.2, 5))


@contextlib.contextmanager
def silent_port() -> Iterator[int]:
    """On all addresses of IPv4: connections to it come about only once others are accepted, and none are."""
    with socket.socket() as listener, contextlib.ExitStack() as waiting:
        listener.bind(("0.0.0.0", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        for _ in range(8):
            sock = waiting.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(("127.0.0.1", port))
        yield port


@pytest.mark.timeout(30)
def test_all_addresses_of_a_name_share_one_deadline(names: dict[str, Answer]) -> None:
    """With a deadline for each, these would take a minute."""
    names["many.example"] = lambda: [f"127.0.0.{number}" for number in range(1, 121)]
    with silent_port() as port, pytest.raises(OSError, match="timed out"):
        connect(Endpoint("many.example", port), 0.5)


def test_a_silent_address_leaves_time_for_the_next(names: dict[str, Answer]) -> None:
    names["two.example"] = lambda: ["127.0.0.1", "::1"]
    with silent_port() as port, socket.create_server(("::1", port), family=socket.AF_INET6):
        with connect(Endpoint("two.example", port), 0.5) as channel:
            assert channel.socket.getpeername()[:2] == ("::1", port)
