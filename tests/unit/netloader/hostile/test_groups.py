"""Peers that do not want a process group to come about: what a rendezvous lets them do, and for how long.

A group is made of what libraries publish to each other. Gloo reads it without looking, so none of it may reach Gloo
before it is known to be what Gloo itself would say.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.logs import assert_orderly
from support.peers.corpus import Corpus
from support.peers.impostor import Act, Impostor, accepting, answering, hanging_up, outlives, saying, sending, silent
from support.peers.messages import payload
from support.peers.strangers import Intruder, Line, is_idle, many_hosts, netloader_threads
from support.sources import SMALL, fetch, serving
from support.wait import wait_until
from vllm_ascend.distributed.process_group import VALUES_LIMIT, Rendezvous
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import ProtocolError
from vllm_ascend.model_loader.netloader.transport.base import Timeouts
from vllm_ascend.model_loader.netloader.transport.process_group import _Exchange
from vllm_ascend.model_loader.netloader.transport.registry import transports
from vllm_ascend.model_loader.netloader.wire.channel import Channel
from vllm_ascend.model_loader.netloader.wire.conversation import Role, State, frame
from vllm_ascend.model_loader.netloader.wire.messages import (
    PUBLISH_LIMIT,
    End,
    Fetch,
    Gather,
    Gathered,
    Leave,
    Message,
    Publish,
)

pytestmark = pytest.mark.usefixtures("brief_explanations")

GROUP = transports(["process_group"])
BRIEF = Timeouts(connect=20.0, stall=0.3)
PATIENT = Timeouts(connect=20.0, stall=20.0)
STDOUT = "/proc/self/fd/1"


def rank_info(host: str, port: int, name: bytes = b"peer") -> bytes:
    """What Gloo publishes of a rank that listens there, of two."""
    address = socket.AF_INET.to_bytes(2, "little") + port.to_bytes(2, "big") + socket.inet_aton(host) + bytes(120)
    return with_size(name) + with_size(address + (1).to_bytes(8, "little")) + bytes(8) + (1).to_bytes(8, "little")


def with_size(content: bytes, size: int | None = None) -> bytes:
    return (len(content) if size is None else size).to_bytes(8, "little") + content


def gathering(source: Endpoint, host: str = "127.0.0.3") -> Intruder:
    """A client whose group the server is making."""
    line = Intruder(source, host).greet()
    line.accepted("process_group")
    line.say(Gather())
    line.hear_kind(Publish)
    return line


@contextlib.contextmanager
def sentinels(count: int = 200) -> Iterator[None]:
    """Descriptors of others, which nobody closes: afterwards each is still open, and is what it was."""
    pipes = [os.pipe() for _ in range(count)]
    before = [os.readlink(f"/proc/self/fd/{end}") for pipe in pipes for end in pipe]
    try:
        yield
        assert [os.readlink(f"/proc/self/fd/{end}") for pipe in pipes for end in pipe] == before
    finally:
        for pipe in pipes:
            for end in pipe:
                os.close(end)


def test_clients_that_never_come_to_the_group_cost_no_descriptor_and_no_standard_output(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The library once shared a descriptor with us: when the group did not come about, both closed it."""
    caplog.set_level(logging.CRITICAL)
    stdout, hosts = os.readlink(STDOUT), many_hosts()
    with serving(SMALL, GROUP, timeouts=BRIEF, max_clients=64) as (server, source):
        fetch(SMALL, GROUP, source, timeouts=PATIENT)[1].memory.close()
        wait_until(lambda: is_idle(server) and not gathering_threads())
        before = len(os.listdir("/proc/self/fd"))
        with sentinels():
            for _ in range(4):
                lines = [gathering(source, next(hosts)) for _ in range(16)]
                for line in lines[::2]:
                    with contextlib.suppress(ConnectionError):  # its time may be up
                        line.say(Publish("0/1", rank_info(line.socket.getsockname()[0], 9)))  # where nobody listens
                assert os.readlink(STDOUT) == stdout
                for line in lines[::4]:
                    line.reset()
                for line in lines:
                    with contextlib.suppress(OSError), line:
                        line.hear_out()
            wait_until(lambda: is_idle(server) and not gathering_threads())
        assert len(os.listdir("/proc/self/fd")) <= before
        assert os.readlink(STDOUT) == stdout
        fetch(SMALL, GROUP, source, timeouts=PATIENT)[1].memory.close()


def gathering_threads() -> list[str]:
    return [name for name in netloader_threads() if name == "netloader-gather"]


HERE = "127.0.0.3"
WRONG_VALUES: dict[str, bytes] = {
    "nothing": b"",
    "less than a length": bytes(7),
    "only zeros": bytes(172),
    "the greatest value": b"\xff" * PUBLISH_LIMIT,
    "a name beyond the value": with_size(b"", 1 << 40) + rank_info(HERE, 9)[8:],
    "a name beyond memory": b"\xff" * 8 + rank_info(HERE, 9)[8:],
    "a name without end": rank_info(HERE, 9, b"x" * 4000),
    "an address beyond the value": with_size(b"peer") + with_size(rank_info(HERE, 9)[20:], 1 << 40),
    "an address of another length": with_size(b"peer") + with_size(rank_info(HERE, 9)[20:], 135),
    "no numbers of ranks": rank_info(HERE, 9)[:-16],
    "too many numbers of ranks": rank_info(HERE, 9) + bytes(8),
    "another family": rank_info(HERE, 9).replace(socket.AF_INET.to_bytes(2, "little"), b"\x01\x00", 1),
    "the address of another host": rank_info("127.0.0.9", 9),
}


@pytest.mark.parametrize("value", WRONG_VALUES.values(), ids=WRONG_VALUES.keys())
def test_what_gloo_would_read_beyond_its_end_never_reaches_it(value: bytes, caplog: pytest.LogCaptureFixture) -> None:
    with serving(SMALL, GROUP, timeouts=PATIENT) as (server, source):
        with gathering(source, HERE) as line:
            line.say(Publish("0/1", value))
            assert "the peer" in line.hear_kind(End)["reason"]
        wait_until(lambda: is_idle(server))
        fetch(SMALL, GROUP, source)[1].memory.close()
    assert_orderly(caplog)


def publishing_without_end(line: Intruder) -> None:
    for number in range(VALUES_LIMIT + 1):
        line.say(Publish(f"key {number}", bytes(PUBLISH_LIMIT)))


STRANGE_WORDS: dict[str, Callable[[Intruder], object]] = {
    "values without end": publishing_without_end,
    "a value twice": lambda line: line.say(Publish("a", b""), Publish("a", b"")),
    "a value of the server's": lambda line: line.say(Publish("0/0", b"")),
    "a value above the limit": lambda line: line.say(Publish("0/1", bytes(PUBLISH_LIMIT + 1))),
    "that the group works": lambda line: line.say(Gathered()),
    "that it gives up": lambda line: line.say(Leave("no\0\x1b[2J")),
    "a second wish": lambda line: line.say(Gather()),
    "a wish for weights": lambda line: line.say(Fetch(0, 64)),
    "nothing any more": lambda line: line.socket.shutdown(socket.SHUT_WR),
}


@pytest.mark.parametrize("say", STRANGE_WORDS.values(), ids=STRANGE_WORDS.keys())
def test_a_server_ends_the_session_of_a_client_that_says_while_gathering(
    say: Callable[[Intruder], object], caplog: pytest.LogCaptureFixture
) -> None:
    """It is noticed at once, though the timeout is long."""
    with serving(SMALL, GROUP, timeouts=PATIENT) as (server, source):
        with gathering(source) as line:
            with contextlib.suppress(ConnectionError):  # it may be over before all is said
                say(line)
            line.hear_out()
        wait_until(lambda: is_idle(server) and not gathering_threads())
        fetch(SMALL, GROUP, source)[1].memory.close()
    assert_orderly(caplog)


@pytest.mark.parametrize(("transport", "message"), [("tcp", Gather()), ("process_group", Fetch(0, 64))])
def test_nobody_gathers_for_another_transport_or_fetches_without_a_group(transport: str, message: Message) -> None:
    with serving(SMALL, transports([transport]), timeouts=PATIENT) as (_, source), Intruder(source).greet() as line:
        line.accepted(transport)
        line.say(message)
        line.hear_out()


@pytest.mark.parametrize("publish", [False, True], ids=["silent", "not coming to Gloo"])
def test_a_session_whose_group_does_not_come_about_can_be_ended_at_once(publish: bool) -> None:
    timeouts = Timeouts(connect=20.0, stall=2.0)
    with serving(SMALL, GROUP, timeouts=timeouts) as (server, source), gathering(source) as line:
        if publish:
            line.say(Publish("0/1", rank_info("127.0.0.3", 65535)))
            time.sleep(0.1)  # until Gloo waits, which nobody can see
        begun = time.monotonic()
        server.suspend("it sleeps")
        assert time.monotonic() - begun < timeouts.stall
        assert "it sleeps" in line.hear_kind(End)["reason"]
        wait_until(lambda: not gathering_threads())  # which hold no weights


def test_gloo_listens_only_on_the_address_by_which_the_client_came() -> None:
    with serving(SMALL, GROUP, timeouts=PATIENT, host="0.0.0.0") as (server, source):
        before = listening_addresses()
        with gathering(Endpoint("127.0.0.5", source.port)):
            assert listening_addresses() - before == {"127.0.0.5"}
        wait_until(lambda: is_idle(server) and not gathering_threads())


def listening_addresses() -> set[str]:
    """Where sockets of this process listen, by the kernel's tables."""
    inodes = {os.readlink(entry.path) for entry in os.scandir("/proc/self/fd") if os.path.lexists(entry.path)}
    found = set()
    for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
            found.add(socket.inet_ntoa(bytes.fromhex(fields[1][:8])[::-1]))
    return found


# A source that does not want a group.


def publishing(*values: tuple[str, bytes]) -> Act:
    return lambda line, _: line.say(*(Publish(key, value) for key, value in values))


REFUSALS: dict[str, tuple[Act, str]] = {
    "nothing, and hangs up": (hanging_up, "the peer closed the connection"),
    "silence": (silent, "the peer was silent for|no process group with"),
    "an end": (answering(End("no\0\x1b[2J")), r"it ended the session: no\?\?\[2J"),
    "that the group works": (saying(Gathered()), "in state GATHERING"),
    "other bytes than Gloo's": (publishing(("0/0", b"\xff" * 170)), "not what Gloo publishes"),
    "the address of another host": (publishing(("0/0", rank_info("127.0.0.9", 9))), "does not listen on 127.0.0.1"),
    "values without end": (publishing(*((f"{n}", b"") for n in range(20))), "not what Gloo publishes"),
    "a value above the limit": (publishing(("0/0", bytes(PUBLISH_LIMIT + 1))), "is no message"),
    "an address where nobody is": (publishing(("0/0", rank_info("127.0.0.1", 9))), "no process group with 127.0.0.1"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("answer", "reason"), REFUSALS.values(), ids=REFUSALS.keys())
def test_a_client_gives_up_a_source_that_answers_its_wish_for_a_group_with(
    answer: Act, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with Impostor({"Join": answering(accepting("process_group")), "Gather": answer}) as impostor:
        assert re.search(reason, outlives(impostor, kinds=GROUP, timeouts=BRIEF))
    assert_orderly(caplog)


def test_a_client_outlives_whatever_is_answered_to_its_wish_for_a_group(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    corpus, right = Corpus(5, Role.SERVER), Publish("0/0", rank_info("127.0.0.1", 9))
    for _ in range(20):
        content = corpus.content(payload(right))
        strange = sending(corpus.stream(content)) if corpus.random.random() < 0.3 else saying(content)
        with Impostor({"Join": answering(accepting("process_group")), "Gather": strange}) as impostor:
            assert outlives(impostor, kinds=GROUP, timeouts=Timeouts(20.0, 0.1))
    assert_orderly(caplog)


def test_where_no_group_comes_about_the_next_transport_of_the_same_source_is_tried() -> None:
    both = transports(["process_group", "tcp"])

    def join(line: Line, heard: dict[str, Any]) -> None:
        line.say(accepting(heard["offers"][0]["transport"]))

    with Impostor({"Join": join, "Gather": answering(End("no group here"))}) as impostor:
        client, fetched = fetch(SMALL, both, impostor.endpoint, timeouts=PATIENT)
        assert fetched.transport == "tcp"
        assert "no group here" in client.attempts[0].reason
        fetched.memory.close()


def test_a_peer_that_publishes_without_end_after_the_group_has_come_about_is_left() -> None:
    ours, theirs = socket.socketpair()
    with Channel(ours, Role.CLIENT) as control, theirs:
        control._conversation.state = State.GATHERED
        sending = threading.Thread(target=theirs.sendall, args=(frame(Publish("late", b"value")) * 1000,))
        sending.start()
        with pytest.raises(ProtocolError, match="publishes without end"):
            _Exchange(control, 20.0).finish()
        sending.join()


# The store by itself.


def test_a_rendezvous_that_is_over_neither_speaks_nor_listens() -> None:
    said: list[tuple[str, bytes]] = []
    rendezvous = Rendezvous(lambda key, value: said.append((key, value)), lambda: ("theirs", b"2"))
    rendezvous.set("ours", b"1")
    assert rendezvous.get("theirs") == b"2"
    rendezvous.close()
    rendezvous.set("late", b"3")
    assert said == [("ours", b"1")]
    assert rendezvous.check(["ours", "theirs", "late"])
    with pytest.raises(RuntimeError, match="the rendezvous failed"):
        rendezvous.get("another")
    assert "is over" in str(rendezvous.take_failure())
    assert rendezvous.take_failure() is None


@pytest.mark.parametrize("keys", [itertools.count(), itertools.repeat(1)], ids=["without end", "twice"])
def test_a_rendezvous_takes_few_values_and_each_once(keys: Iterator[int]) -> None:
    taken: list[int] = []

    def receive() -> tuple[str, bytes]:
        taken.append(next(keys))
        return str(taken[-1]), bytes(PUBLISH_LIMIT)

    with pytest.raises(RuntimeError, match="the rendezvous failed"):
        Rendezvous(lambda _, __: None, receive).get("another")
    assert len(taken) <= VALUES_LIMIT + 1
