"""Peers that are named by others and do not tell the truth: they cost time, and never change a byte."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from support.members import CHUNK, members
from support.peers.impostor import Act, Impostor, Misbehaved, silent
from support.sources import Tensors, client_for, serving
from vllm_ascend.model_loader.netloader.client.fetch import Client
from vllm_ascend.model_loader.netloader.client.fetched import Fetched
from vllm_ascend.model_loader.netloader.errors import SourcesExhausted
from vllm_ascend.model_loader.netloader.transport.base import Timeouts
from vllm_ascend.model_loader.netloader.transport.registry import transports
from vllm_ascend.model_loader.netloader.wire.messages import Accept, News

TCP = transports(["tcp"])
WEIGHTS = Tensors({"w": torch.arange(64 * CHUNK // 4, dtype=torch.int32)})
NBYTES = WEIGHTS.manifest.nbytes
TIMEOUTS = Timeouts(connect=5.0, stall=5.0)
EVERYTHING = tuple(range(64))

pytestmark = pytest.mark.timeout(120)


@contextlib.contextmanager
def relay(*, chunks: tuple[int, ...] = EVERYTHING, **acts: Act) -> Iterator[Impostor]:
    """A relay that says that it has `chunks`, and behaves except where `acts` say otherwise."""
    with Impostor(acts, WEIGHTS) as impostor:
        first = [True]

        def follow(line: Any, _: Any) -> None:
            line.say(News(chunks if first else ()))
            first.clear()

        accept = Accept(bytes(16), 1, "tcp", {}, digest="blake3", root=impostor.root, filling=True)
        impostor.acts["Join"] = acts.get("Join", lambda line, _: line.say(accept))
        impostor.acts["Follow"] = acts.get("Follow", follow)
        yield impostor


def fetched_beside(*liars: Impostor, rate: int = NBYTES) -> tuple[Client, Fetched, str]:
    """What a client gets from a source that names `liars`, and the address of the source."""
    with serving(WEIGHTS, TCP, max_bandwidth=rate, timeouts=TIMEOUTS) as (server, source):
        publication = server._publications.served("target")
        assert publication is not None
        for liar in liars:
            copy = server_copy(publication.store.generation)
            server._replicas.note_relaying(liar.endpoint, copy)
        client = client_for(WEIGHTS, TCP, timeouts=TIMEOUTS)
        fetched = client.fetch([source])
    WEIGHTS.assert_in(fetched.memory)
    assert fetched.source == source
    return client, fetched, str(source)


def server_copy(generation: int) -> Any:
    from vllm_ascend.model_loader.netloader.server.replicas import Copy

    return Copy("127.0.0.1", "target", generation)


def garbage(line: Any, heard: Any) -> None:
    line.send(bytes(heard["length"]))


def stale(line: Any, heard: Any) -> None:
    """Bytes of another chunk, as of weights that were replaced."""
    offset = (heard["offset"] + heard["length"]) % NBYTES
    line.send(bytes(WEIGHTS.store().bytes[offset : offset + heard["length"]]))


def half(line: Any, heard: Any) -> None:
    line.send(bytes(heard["length"] // 2))
    raise Misbehaved


def vanish(_: Any, __: Any) -> None:
    raise Misbehaved


def twice(line: Any, _: Any) -> None:
    line.say(News((1, 1)))


def beyond(line: Any, _: Any) -> None:
    line.say(News((64,)))


def without_end(line: Any, _: Any) -> None:
    while True:
        line.say(News())


def without_end_that_it_is_whole(line: Any, _: Any) -> None:
    while True:
        line.say(News(whole=True))


def the_same_peer_twice(line: Any, _: Any) -> None:
    line.say(News(peers=(":1", ":2", ":1")))


def more_peers_than_there_are(line: Any, _: Any) -> None:
    for port in range(1, 4200, 60):
        line.say(News(peers=tuple(f"[fd00::1]:{each}" for each in range(port, port + 60))))


@pytest.mark.parametrize("act", [garbage, stale, half, vanish], ids=lambda act: act.__name__)
def test_a_relay_that_sends_what_it_does_not_have_is_left(act: Act) -> None:
    with relay(Fetch=act) as liar:
        client, fetched, source = fetched_beside(liar)
    assert fetched.evidence is not None
    assert client.received[source] >= NBYTES
    assert {attempt.source for attempt in client.attempts} <= {str(liar.endpoint)}
    assert liar.heard.count("Join") == 1
    assert "Fetch" in liar.heard


@pytest.mark.parametrize("act", [twice, beyond], ids=lambda act: act.__name__)
def test_a_relay_that_tells_nonsense_is_left_by_name(act: Act) -> None:
    with relay(Follow=act) as liar:
        client, _, source = fetched_beside(liar)
    assert client.received[source] >= NBYTES
    (attempt,) = client.attempts
    assert attempt.source == str(liar.endpoint)
    assert "it tells of " in attempt.reason


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (without_end, "it says that there is nothing new without being asked"),
        (without_end_that_it_is_whole, "it says that there is nothing new without being asked"),
        (the_same_peer_twice, "it names a peer twice"),
        (more_peers_than_there_are, "it names more than 4096 peers"),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_a_relay_that_only_keeps_its_clients_busy_is_left_by_name(act: Act, reason: str) -> None:
    with relay(chunks=(), Follow=act) as liar:
        client, _, source = fetched_beside(liar)
    assert client.received[source] == NBYTES
    assert (str(liar.endpoint), reason) in [(attempt.source, attempt.reason) for attempt in client.attempts]


@pytest.mark.parametrize("act", [silent], ids=lambda act: act.__name__)
def test_a_relay_that_brings_nothing_costs_nothing(act: Act) -> None:
    with relay(chunks=(), Follow=act) as liar:
        client, _, source = fetched_beside(liar)
    assert client.received[source] == NBYTES


def test_a_relay_that_falls_silent_holds_up_only_what_it_was_asked_for() -> None:
    with relay(Fetch=silent) as liar:
        begun = time.monotonic()
        client, _, source = fetched_beside(liar, rate=4 * NBYTES)
        assert time.monotonic() - begun < 4 * TIMEOUTS.stall
    assert client.received[source] >= NBYTES
    assert "Fetch" in liar.heard


@pytest.mark.parametrize("step", ["Hello", "Join", "Attach", "Follow", "Fetch", "Done"])
def test_nobody_waits_for_a_relay_that_is_silent_from_some_point_on(step: str) -> None:
    with relay(**{step: silent}) as liar:  # type: ignore[arg-type]
        begun = time.monotonic()
        fetched_beside(liar)
        assert time.monotonic() - begun < 4 * TIMEOUTS.stall
    assert step in (*liar.heard, "Done")  # the source may have brought everything before


def test_a_relay_of_other_contents_is_left_before_anything_is_taken() -> None:
    accept = Accept(bytes(16), 1, "tcp", {}, digest="blake3", root="5eed" * 16, filling=True)
    with relay(Join=lambda line, _: line.say(accept), AskDigests=silent) as liar:
        client, _, source = fetched_beside(liar)
    assert client.received[source] == NBYTES
    assert "Fetch" not in liar.heard


ABSURD = (
    "",
    ":0",
    ":99999",
    "no port",
    "0.0.0.0:1",
    "[::]:1",
    "255.255.255.255:1",
    "224.0.0.1:1",
    "a.name.that.nobody.has.invalid:1",
    "x" * 4000 + ":1",
    "user@host:1",
    "-:1",
)


def test_absurd_addresses_of_peers_cost_little() -> None:
    def name_them(line: Any, _: Any) -> None:
        line.say(News(peers=ABSURD))

    with relay(chunks=(), Follow=name_them) as liar:
        begun = time.monotonic()
        client, _, source = fetched_beside(liar)
        assert time.monotonic() - begun < 4 * TIMEOUTS.stall
    assert client.received[source] == NBYTES
    assert len({attempt.source for attempt in client.attempts}) == len(client.attempts), "nobody is asked twice"


def test_a_relay_that_names_the_client_itself_gains_nothing() -> None:
    with (
        serving(WEIGHTS, TCP, max_bandwidth=NBYTES, timeouts=TIMEOUTS) as (server, source),
        members(1, WEIGHTS, TCP, timeouts=TIMEOUTS) as (member,),
    ):

        def name_it(line: Any, _: Any) -> None:
            line.say(News(peers=(str(member.endpoint), f"localhost:{member.endpoint.port}")))

        with relay(chunks=(), Follow=name_it) as liar:
            server._replicas.note_relaying(liar.endpoint, server_copy(1))
            member.start(source)
            member.join()
        assert member.client.received[str(source)] == NBYTES


def test_many_liars_at_once_change_nothing() -> None:
    acts: list[Callable[[Any, Any], None]] = [garbage, stale, half, vanish, garbage, stale]
    with contextlib.ExitStack() as scope:
        liars = [scope.enter_context(relay(Fetch=act)) for act in acts]
        fetched_beside(*liars, rate=NBYTES // 2)
        assert all("Fetch" in liar.heard for liar in liars)


def test_what_a_liar_sends_is_passed_on_to_nobody() -> None:
    """A member that takes from a liar serves what has passed, and that is right."""
    with (
        relay(Fetch=garbage) as liar,
        serving(WEIGHTS, TCP, max_bandwidth=NBYTES, timeouts=TIMEOUTS) as (server, source),
        members(2, WEIGHTS, TCP, timeouts=TIMEOUTS) as loading,
    ):
        server._replicas.note_relaying(liar.endpoint, server_copy(1))
        for member in loading:
            member.start(source)
        for member in loading:
            member.join()
            assert {attempt.source for attempt in member.client.attempts} <= {str(liar.endpoint)}


def test_where_only_liars_are_left_there_are_no_weights() -> None:
    with (
        relay(Fetch=garbage) as liar,
        serving(WEIGHTS, TCP, max_bandwidth=NBYTES, timeouts=TIMEOUTS) as (server, source),
    ):
        server._replicas.note_relaying(liar.endpoint, server_copy(1))

        def close_halfway(nbytes: int) -> None:
            moved.append(nbytes)
            if sum(moved) > NBYTES // 2 and not closed:
                closed.append(True)
                server.close()

        moved: list[int] = []
        closed: list[bool] = []
        client = client_for(WEIGHTS, TCP, timeouts=Timeouts(2.0, 1.0), progress=close_halfway)
        with pytest.raises(SourcesExhausted):
            client.fetch([source])
